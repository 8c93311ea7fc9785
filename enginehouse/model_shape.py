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
from engine.opset import PACKED
from engine.program import Program
from engine.store import Store
from enginehouse.roofline import Attention, Shape

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
    return of_program(program, manifest.limits, name=label)


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
        import torch

        from builder_svc.checkpoint.huggingface import read_json
        from builder_svc.checkpoint.quantized import find_method
        from builder_svc.checkpoint.quantized.resolve import planned
        from builder_svc.checkpoint.sources import HUB
        from builder_svc.lower.program import lower
        from builder_svc.models.decoder import Decoder
        from builder_svc.models.families import find_family
        from builder_svc.models.fields import Fields
        from builder_svc.options import BuildOptions
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"planning for a checkpoint needs {error.name}: pip install 'enginehouse[builder]'; for an engine in a store it "
            "needs nothing",
            reason="EXTRA_MISSING",
        ) from None
    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).partition("@")
        directory = download_config(name, revision or None)
    else:
        directory = Path(source).expanduser()
        name = directory.resolve().name
    fields = Fields(read_json(directory / "config.json"), str(directory / "config.json"))
    family, architecture = find_family(fields)
    config = family.decoder_config(fields, architecture)
    chosen = dtype or _declared(fields.values, fields.where)

    packed = {}
    if method := find_method(fields, directory):
        with torch.device("meta"):
            columns = Decoder(config).linears()
        sources = family.NAMES.sources(config, (family.NAMES.prefix,))
        scales = fields.values.get("dtype") or fields.values.get("torch_dtype") or chosen
        packed = planned(method, sources, columns, str(scales))
    # Layers that are alike are traced once: the result is the same, and 80 of them would take a minute.
    layers = [(layer, _within(packed, f"layers.{index}.")) for index, layer in enumerate(config.layers)]
    distinct = [layer for number, layer in enumerate(layers) if layer not in layers[:number]]
    repeats = [layers.count(layer) for layer in distinct]
    forms = {name: form for name, form in packed.items() if not name.startswith("layers.")}
    for index, (_, inner) in enumerate(distinct):
        forms |= {f"layers.{index}.{name}": form for name, form in inner.items()}
    options = BuildOptions()
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, chosen))
    try:
        with torch.device("meta"):
            decoder = Decoder(replace(config, layers=tuple(layer for layer, _ in distinct)), forms)
        program = lower(decoder, max_num_tokens=options.max_num_tokens, rope_lengths=config.rope_lengths)
    finally:
        torch.set_default_dtype(default)
    limits = Limits(options.max_batch_size, config.max_position_embeddings, options.max_num_tokens)
    return replace(of_program(program, limits, name=name, repeats=repeats), max_batch_size=None)


def of_program(program: Program, limits: Limits, *, name: str, repeats: list[int] | None = None) -> Shape:
    """Counts a program's weights and attention.

    Args:
        repeats: how many layers each layer of the program stands for; by default one. Weights of a layer are called
            layers.<index>.<...>, and its attention has the cache of that index.
    """

    def times(weight: str) -> int:
        parts = weight.split(".")
        return repeats[int(parts[1])] if repeats and parts[0] == "layers" else 1

    sizes: dict[str, int] = {}
    for weight, declared in program.weights.items():
        sizes[declared.dtype] = sizes.get(declared.dtype, 0) + declared.nbytes * times(weight)
    parameters = program.parameters()
    layers: dict[str, int] = {}  # matrix, or a tensor of a packed one -> how often it is there
    head: list[str] = []
    tables = dtype = layer_dtype = ""
    attention: dict[Attention, int] = {}
    for op in program.ops:
        matrices = [used for used in op.inputs if used in program.weights and len(program.weights[used].shape) > 1]
        if op.op in PACKED:
            matrices = [used for used in op.inputs[1:-1] if used]
        if op.op == "embedding":
            tables = matrices[0]
        elif op.op == "attention":
            cache, head_dim = program.caches[_int(op.attrs["cache"])], _int(op.attrs["head_dim"])
            heads = _int(op.outputs[0].type.shape[-1]) // head_dim
            kind = Attention(0, heads, cache.num_kv_heads, head_dim, _int(op.attrs["window"]))
            count = repeats[_int(op.attrs["cache"])] if repeats else 1
            attention[kind] = attention.get(kind, 0) + count
        elif matrices and op.outputs[0].type.shape[0] == "num_logits":
            head, dtype = matrices, op.outputs[0].type.dtype
        elif matrices:
            layers |= {matrix: times(matrix) for matrix in matrices}
            layer_dtype = layer_dtype or op.outputs[0].type.dtype
    divided = {*head, tables, *layers} - {""}
    return Shape(
        name=name,
        dtype=dtype,
        layer_dtype=layer_dtype,
        weight_bytes=sizes,
        layer_parameters=sum(parameters[matrix] * count for matrix, count in layers.items()),
        layer_bytes=sum(program.weights[matrix].nbytes * count for matrix, count in layers.items()),
        head_parameters=sum(parameters[matrix] for matrix in head),
        head_bytes=sum(program.weights[matrix].nbytes for matrix in head),
        replicated_bytes=sum(
            declared.nbytes * times(weight) for weight, declared in program.weights.items() if weight not in divided
        ),
        attention=tuple(replace(kind, layers=count) for kind, count in attention.items()),
        kv_dtype=program.caches[0].dtype,
        num_parameters=sum(count * times(weight) for weight, count in parameters.items()),
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
        max_batch_size=limits.max_batch_size,
    )


def _within(found: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


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
        "dtype": shape.layer_dtype,
        "weight_bytes": shape.total_bytes,
        "weight_bytes_by_dtype": dict(shape.weight_bytes),
        "kv_dtype": shape.kv_dtype,
        "kv_bytes_per_token": shape.kv_bytes(1),
        "max_seq_len": shape.max_seq_len,
        "attention": [asdict(kind) for kind in shape.attention],
    }
