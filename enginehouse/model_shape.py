"""What `enginehouse plan` needs to know of a model, from an engine's program or from a checkpoint's config.json.

Both go through the program, which is what is run: an engine has it in the store, and for a checkpoint the builder's own
code makes it on the meta device, without reading a weight.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from engine import blobs, registry
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.manifest import Limits
from engine.opset import PACKED, packed_inputs
from engine.program import Program
from engine.store import Store
from enginehouse.roofline import Attention, Experts, Shape

T = TypeVar("T")


def of_engine(store: Store, engine: str) -> Shape:
    """An engine in a store, by name or id; nothing of its weights is read, and torch is not imported.

    Raises:
        NotFound, InvalidArgument: no such engine, or several.
        FailedPrecondition: an engine of several ranks, each of which has a program of its own.
    """
    manifest = registry.manifest(store, registry.find_engine(store, engine))
    if len(manifest.ranks) != 1:
        raise FailedPrecondition(
            f"engine {manifest.engine_id[:12]} has {len(manifest.ranks)} ranks: plan its checkpoint with --tp instead",
            reason="ENGINE_SHARDED",
        )
    program = Program.from_json(blobs.read(store, manifest.ranks[0].program))
    label = f"engine {manifest.engine_id[:12]}" if manifest.engine_id.startswith(engine) else engine
    return replace(of_program(program, manifest.limits, name=label), dummy_weights=manifest.dummy_weights)


def of_checkpoint(source: str, dtype: str | None) -> Shape:
    """A checkpoint, as a build would make an engine of it.

    Args:
        source: a directory with config.json, or hf://ORG/NAME[@REVISION], of which config.json alone is downloaded.
        dtype: float32, bfloat16 or float16; None takes the one that the config declares.

    Raises:
        FailedPrecondition: the builder's extra is not installed.
        EnginehouseError: no config.json, one that no family reads, or one without a dtype.
    """
    try:
        import torch  # noqa: F401  (what the extra lacks first)

        from builder_svc.auto import open_model
        from builder_svc.build_config import BuildConfig
        from builder_svc.checkpoint.sources import HUB
        from builder_svc.lower.program import lower
        from builder_svc.models.decoder import Decoder
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
    options = BuildConfig()
    program = lower(
        Decoder.on_meta(decoder, chosen, model.resolve("cuda").packed),
        max_num_tokens=options.max_num_tokens,
        rope_lengths=decoder.rope_lengths,
    )
    limits = Limits(options.max_batch_size, decoder.max_position_embeddings, options.max_num_tokens)
    return replace(of_program(program, limits, name=name), max_batch_size=None)


def of_program(program: Program, limits: Limits, *, name: str) -> Shape:
    """Counts a program's weights, attention and experts."""
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
        elif op.op not in ("embedding", "attention", "linear", "experts"):
            continue  # such as a norm that has a row of weights for each head
        if op.op == "embedding":
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
    return Shape(
        name=name,
        dtype=dtype,
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
    )


def _int(value: object) -> int:
    return int(str(value))


def _declared(config: Mapping[str, object], where: str) -> str:
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
