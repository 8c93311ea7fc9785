"""What `enginehouse plan` needs to know of a model, from an engine's program or from a checkpoint's config.json.

Both go through the program, which is what is run: an engine has it in the store, and for a checkpoint the builder's own
code makes it on the meta device, without reading a weight.
"""

from collections.abc import Callable, Sequence
from collections.abc import Mapping as Values
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from engine import blobs, registry
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.manifest import Limits
from engine.opset import PACKED, packed_inputs
from engine.program import Program, TensorType
from engine.store import Store
from enginehouse.roofline import ITEM_SIZE, Attention, Experts, Shape

T = TypeVar("T")


@dataclass(frozen=True)
class Divided:
    """A model among its ranks.

    Attributes:
        whole: of all ranks together.
        stages: for each place of the pipeline what one rank of it has; the `tp` ranks of a place have as much each.
    """

    whole: Shape
    stages: tuple[Shape, ...]
    tp: int = 1

    def map(self, change: Callable[[Shape], Shape]) -> "Divided":
        """The same with other dtypes, for example."""
        return replace(self, whole=change(self.whole), stages=tuple(map(change, self.stages)))


def of_engine(store: Store, engine: str) -> Divided:
    """An engine in a store, by name or id; nothing of its weights is read, and torch is not imported.

    Raises:
        NotFound, InvalidArgument: no such engine, or several.
    """
    manifest = registry.manifest(store, registry.find_engine(store, engine))
    label = f"engine {manifest.engine_id[:12]}" if manifest.engine_id.startswith(engine) else engine
    tp = manifest.mapping.tp_size
    stages = []
    for rank in manifest.ranks[::tp]:
        program = Program.from_json(blobs.read(store, rank.program))
        shape = of_program(program, manifest.limits, name=label, tp=tp)
        stages.append(replace(shape, dummy_weights=manifest.dummy_weights))
    return _together(stages, tp, manifest.model.num_parameters)


def _together(stages: Sequence[Shape], tp: int, num_parameters: int) -> Divided:
    """What several ranks hold together: heads, norms and embeddings that more of them have count as often."""
    if len(stages) == tp == 1:
        return Divided(stages[0], tuple(stages))
    last = stages[-1]
    sizes: dict[str, int] = {}
    for shape in stages:
        for dtype, size in shape.weight_bytes.items():
            sizes[dtype] = sizes.get(dtype, 0) + tp * size
    whole = replace(
        last,
        weight_bytes=sizes,
        layer_parameters=tp * sum(shape.layer_parameters for shape in stages),
        layer_bytes=tp * sum(shape.layer_bytes for shape in stages),
        head_parameters=tp * last.head_parameters,
        head_bytes=tp * last.head_bytes,
        replicated_bytes=tp * sum(shape.replicated_bytes for shape in stages),
        attention=tuple(
            replace(kind, num_heads=tp * kind.num_heads, num_kv_heads=tp * kind.num_kv_heads)
            for shape in stages
            for kind in shape.attention
        ),
        experts=tuple(replace(kind, parameters=tp * kind.parameters) for shape in stages for kind in shape.experts),
        num_parameters=num_parameters,
    )
    return Divided(whole, tuple(stages), tp)


def of_checkpoint(source: str, dtype: str | None, tp: int = 1, pp: int = 1) -> Divided:
    """A checkpoint, as a build would make an engine of it.

    Args:
        source: a directory with config.json, or hf://ORG/NAME[@REVISION], of which config.json alone is downloaded.
        dtype: float32, bfloat16 or float16; None takes the one that the config declares.
        tp, pp: ranks that each layer is divided among, and groups of ranks that the layers are.

    Raises:
        FailedPrecondition: the builder's extra is not installed.
        EnginehouseError: no config.json, one that no family reads, or one without a dtype; a model that cannot be divided so.
    """
    try:
        import torch  # noqa: F401  (what the extra lacks first)

        from builder_svc.auto import open_model
        from builder_svc.build_config import BuildConfig
        from builder_svc.checkpoint.sources import HUB
        from builder_svc.lower.program import lower
        from builder_svc.mapping import Mapping
        from builder_svc.models.decoder import Decoder
        from builder_svc.shard import check_shards
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"planning for a checkpoint needs {error.name}: pip install 'enginehouse[builder]'; for an engine in a store it "
            "needs nothing",
            reason="EXTRA_MISSING",
        ) from None
    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).partition("@")
        path = download_config(name, revision or None)
    else:
        path = Path(source).expanduser()
        name = path.resolve().name
    model = open_model(path, dummy_weights=True)
    config, decoder = model.config, model.config.decoder
    chosen = dtype or _declared(config.hugging_face if config.auto_dtype else {"dtype": config.dtype}, str(path))
    options, packed = BuildConfig(), model.resolve("cuda").packed
    limits = Limits(options.max_batch_size, decoder.max_position_embeddings, options.max_num_tokens)
    mapping = Mapping(tp * pp, tp_size=tp, pp_size=pp)
    check_shards(decoder, mapping, packed)

    def shape_of(rank: Mapping) -> Shape:
        made = Decoder.on_meta(decoder, chosen, packed, None, rank)
        program = lower(
            made, max_num_tokens=options.max_num_tokens, rope_lengths=decoder.rope_lengths, ranks=rank.tp_size
        )
        return replace(of_program(program, limits, name=name, tp=rank.tp_size), max_batch_size=None)

    whole = shape_of(Mapping())
    stages = tuple(map(shape_of, mapping.ranks()[::tp])) if mapping.world_size > 1 else (whole,)
    return Divided(whole, stages, tp)


def of_program(program: Program, limits: Limits, *, name: str, tp: int = 1) -> Shape:
    """Counts a program's weights, attention and experts, and what it sends to other ranks, of which `tp` divide a layer."""
    sizes: dict[str, int] = {}
    for declared in program.weights.values():
        sizes[declared.dtype] = sizes.get(declared.dtype, 0) + declared.nbytes
    parameters = program.parameters()
    layers: dict[str, None] = {}  # the matrices, and the tensors of packed ones
    head: list[str] = []
    tables: set[str] = set()
    dtype = layer_dtype = ""
    attention: dict[Attention, int] = {}
    experts: dict[Experts, int] = {}
    for op in program.ops:
        matrices = [used for used in op.inputs if used in program.weights and len(program.weights[used].shape) > 1]
        if op.op in PACKED:
            weight, scales, *_ = packed_inputs(op.op, op.inputs)
            matrices = [weight, *filter(None, scales)]
        elif op.op not in ("embedding", "embedding_shard", "attention", "linear", "experts"):
            continue  # such as a norm that has a row of weights for each head
        if op.op.startswith("embedding"):
            tables.add(matrices[0])
        elif op.op == "attention":
            cache, head_dim = program.caches[_int(op.attrs["cache"])], _int(op.attrs["head_dim"])
            heads = _int(op.outputs[0].type.shape[-1]) // head_dim
            kind = Attention(0, heads, cache.num_kv_heads, head_dim, _int(op.attrs["window"]))
            attention[kind] = attention.get(kind, 0) + 1
        elif matrices and op.outputs[0].type.shape[0] == "num_logits":
            head, dtype = matrices, op.outputs[0].type.dtype
        else:
            layers |= dict.fromkeys(matrices)
            layer_dtype = layer_dtype or op.outputs[0].type.dtype
        if op.op == "experts":
            num_experts = _int(program.weights[matrices[0]].shape[0])
            size = sum(program.weights[matrix].size for matrix in matrices) // num_experts
            alike = Experts(0, num_experts, _int(op.attrs["top_k"]), size)
            experts[alike] = experts.get(alike, 0) + 1
    divided = {*head, *tables, *layers}
    per_token, per_row = _sent(program, tp)
    return Shape(
        name=name,
        dtype=dtype or layer_dtype,  # a rank that is not its pipeline's last has no head
        layer_dtype=layer_dtype,
        weight_bytes=sizes,
        layer_parameters=sum(parameters[matrix] for matrix in layers),
        layer_bytes=sum(program.weights[matrix].nbytes for matrix in layers),
        head_parameters=sum(parameters[matrix] for matrix in head),
        head_bytes=sum(program.weights[matrix].nbytes for matrix in head),
        replicated_bytes=sum(declared.nbytes for weight, declared in program.weights.items() if weight not in divided),
        attention=tuple(replace(kind, layers=count) for kind, count in attention.items()),
        experts=tuple(replace(kind, layers=count) for kind, count in experts.items()),
        kv_dtype="fp8" if program.caches[0].dtype == "float8_e4m3fn" else program.caches[0].dtype,
        num_parameters=sum(parameters.values()),
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
        max_batch_size=limits.max_batch_size,
        sent_per_token=per_token,
        sent_per_row=per_row,
        vocab_size=_int(outputs[0].shape[1]) if (outputs := _outputs(program)) else 0,
    )


def _outputs(program: Program) -> list[TensorType]:
    types = {value.name: value.type for op in program.ops for value in op.outputs}
    return [types[name] for name in program.outputs]


def _sent(program: Program, tp: int) -> tuple[float, float]:
    """Bytes that a rank sends for a token, and for a row of logits, where sums and gatherings go around in a ring.

    Of n bytes to be added up, 2 (tp - 1) / tp n are sent (Patarasuk and Yuan 2009); of n to be gathered, tp - 1 times its own.
    """
    types = program.inputs | {value.name: value.type for op in program.ops for value in op.outputs}
    copies = {"all_reduce": 2 * (tp - 1) / tp, "all_gather": tp - 1, "send": 1}
    sent = {"num_tokens": 0.0, "num_logits": 0.0}
    for op in program.ops:
        if op.op in copies:
            rows, columns = types[op.inputs[0]].shape
            sent[str(rows)] += copies[op.op] * _int(columns) * ITEM_SIZE[types[op.inputs[0]].dtype]
    return sent["num_tokens"], sent["num_logits"]


def _int(value: object) -> int:
    return int(str(value))


def _declared(config: Values[str, object], where: str) -> str:
    declared = config.get("dtype") or config.get("torch_dtype")
    if declared not in ("float32", "bfloat16", "float16"):
        raise InvalidArgument(
            f"{where} declares dtype {declared!r}: choose float32, bfloat16 or float16 with --dtype",
            reason="DTYPE_NEEDED",
        )
    return str(declared)


def download_config(repo: str, revision: str | None) -> Path:
    """The directory in the hub's cache that has the repository's config.json. Raises what `hub.explain` makes of errors."""
    from huggingface_hub import errors, hf_hub_download

    from builder_svc.checkpoint import hub

    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision)).parent
    except errors.RemoteEntryNotFoundError:
        raise NotFound(
            f"{repo} has no config.json: it is no model in Hugging Face layout", reason="FILE_NOT_FOUND"
        ) from None
    except Exception as error:
        raise hub.explain(error, repo, f"{repo}@{revision}" if revision else repo) from error


def ranks_json(model: Divided) -> list[dict[str, object]]:
    """What each rank has and sends, for programs."""
    ranks = [shape for shape in model.stages for _ in range(model.tp)]
    last = len(ranks) - model.tp
    home = {last: 4 * ranks[last].vocab_size} if last else {}  # a row of float32 logits, for rank 0
    return [
        {
            "rank": number,
            "layers": shape.layers,
            "weight_bytes": shape.total_bytes,
            "kv_bytes_per_token": shape.kv_bytes(1),
            "sent_bytes_per_token": shape.sent_per_token,
            "sent_bytes_per_row_of_logits": shape.sent_per_row + home.get(number, 0),
        }
        for number, shape in enumerate(ranks)
    ]


def to_json(shape: Shape) -> dict[str, object]:
    """The facts that `plan` prints, for programs."""
    return {
        "name": shape.name,
        "parameters": shape.num_parameters,
        "active_parameters": shape.active_parameters,
        "dummy_weights": shape.dummy_weights,
        "dtype": shape.layer_dtype,
        "weight_bytes": shape.total_bytes,
        "weight_bytes_by_dtype": dict(shape.weight_bytes),
        "kv_dtype": shape.kv_dtype,
        "kv_bytes_per_token": shape.kv_bytes(1),
        "max_seq_len": shape.max_seq_len,
        "attention": [asdict(kind) for kind in shape.attention],
        "experts": [asdict(kind) for kind in shape.experts],
    }
