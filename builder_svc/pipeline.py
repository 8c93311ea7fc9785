"""The one way from a checkpoint to an engine; each step is a function that can be used by itself.

checkpoint -> config + named weights -> quantize -> shard (Mapping) -> module -> program -> blobs + manifest -> store
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from builder_svc.build_config import RECIPE_VERSION, BuildConfig, Progress
from builder_svc.causal_lm import DUMMY_SEED, CausalLM
from builder_svc.kernels import compile_kernels, compiler
from builder_svc.lower.program import lower
from builder_svc.mapping import Mapping
from builder_svc.model import Model, parallelism, read_model
from builder_svc.models.decoder import Decoder
from builder_svc.ranks import RankPart, write_ranks
from builder_svc.shard import cuts
from builder_svc.tensorrt_plans import Planner
from builder_svc.token_bytes import engine_files
from builder_svc.weights import check_weights
from builder_svc.work_directory import WorkDirectory, clear
from engine import registry
from engine.artifact import Engine
from engine.backends import TRANSFER_PATIENCE, open_store
from engine.blobs import describe, put_bytes, put_file
from engine.directory import DirectoryStore
from engine.fingerprint import Fingerprint
from engine.lifetime import at_end
from engine.manifest import FORMAT_VERSION, Manifest, ModelFacts, Rank, engine_id
from engine.opset import OPSET_VERSION
from engine.pins import pinned
from engine.program import SCHEMA_VERSION, Program
from engine.store import Store

_temporaries: WeakValueDictionary[str, Engine] = WeakValueDictionary()
"""Engines of several ranks in temporary stores, by id."""


def build(
    model: Path | CausalLM,
    build_config: BuildConfig | None = None,
    *,
    store: Store | str | None = None,
    source: str | None = None,
    again: Callable[[str], bool] = lambda _: False,
    work_dir: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Engine:
    """Builds an engine of a model into a store, or finds it there.

    Args:
        model: a checkpoint, in Hugging Face layout, in GGUF or saved by `save_checkpoint`; or a model of the Python API. With a
            mapping of several ranks the engine is for all of them, whichever the model's is.
        build_config: what else decides the engine.
        store: where it goes, or a store's URL; by default a temporary directory (in $TMPDIR), which is gone with the result:
            `Engine.save` and `Engine.push` keep the engine.
        source: where the checkpoint was found, for the manifest; by default the directory or repository.
        again: asked with the id of an engine that is in the store, whether to build it all the same, to see that it is right.
        work_dir: for the weights before they are uploaded, as large as the engine; by default the system's.
        progress: called as the phases go on.

    Raises:
        NotFound, InvalidArgument, DataLoss: the checkpoint is not there, does not hold together or is damaged.
        Unimplemented: a known kind of model that we do not support.
        ResourceExhausted, Unavailable, PermissionDenied: the store or the work directory.

    Example:
        >>> from enginehouse import AutoModelForCausalLM, BuildConfig, build
        >>> model = AutoModelForCausalLM.from_hugging_face("examples/demo-model")
        >>> engine = build(model, BuildConfig(max_batch_size=8, max_seq_len=256))
        >>> engine.manifest.limits.max_seq_len
        256
    """
    options = build_config or BuildConfig()
    options.check()
    Planner.of(options)  # what it lacks is told before the work
    if store is None:
        return _temporary(model, options, source, progress)
    if isinstance(store, str):
        store = open_store(store, TRANSFER_PATIENCE)
    resolved = read_model(model, options)
    pretrained = resolved.pretrained
    identity = build_identity(resolved, options, progress)
    found = registry.find_manifest(store, engine_id(identity))
    if found and not registry.missing_files(store, found) and not again(found.engine_id):
        return Engine(store, found, reused=True)
    with WorkDirectory(work_dir) as directory:
        if not pretrained.dummy:
            resolved = quantized(resolved, options, directory / "quantized", progress)
        return _write(resolved, identity, options, store, source or pretrained.config.source, directory, progress)


def quantized(model: Model, options: BuildConfig, directory: Path, progress: Progress) -> Model:
    """A model that has a plan, quantized: its weights are then those of a saved checkpoint in this directory."""
    if model.plan is None:
        return model
    model.pretrained.write_quantized(model.plan, directory, progress)
    read = type(model.pretrained).from_checkpoint(directory)
    weights, kv = read.resolve(options.target), read.config.quantized
    scales = kv.kv_scales if kv and kv.kv_scales else model.kv_scales
    return replace(model, pretrained=read, weights=weights, kv_scales=scales, plan=None)


def _write(
    resolved: Model,
    identity: dict[str, Any],
    options: BuildConfig,
    store: Store,
    source: str,
    directory: Path,
    progress: Progress,
) -> Engine:
    """From the module on."""
    pretrained, planner = resolved.pretrained, Planner.of(options)
    progress("program", 0, 1, "")
    weights = resolved.weights
    if weights.facts:
        dense = Decoder.on_meta(resolved.config, resolved.dtype).declared()
        weights.check({name: tuple(map(int, type.shape)) for name, type in dense.items()})
    whole = make_rank(resolved, Mapping())
    if weights.checkpoint:
        check_weights(weights.checkpoint, weights.sources, whole.program.weights)
    parts = [whole]
    if resolved.mapping.world_size > 1:
        parts = [make_rank(resolved, rank) for rank in resolved.mapping.ranks()]
    if planner:
        planner.check([part.program for part in parts])
    progress("program", 1, 1, "")
    written = write_ranks(parts, weights, directory, lambda done, total: progress("weights", done, total, "bytes"))
    programs = [part.program.to_json() for part in parts]
    kernels = compile_kernels(programs, resolved.limits, options, directory)
    ranks = tuple(
        Rank(
            describe("program.json", program),
            tuple(ref for numbers, ref, _ in written if number in numbers),
            random_seed=DUMMY_SEED if pretrained.dummy else None,
            kernels=tuple(ref for ref, _ in kernels[program]),
        )
        for number, program in enumerate(programs)
    )
    files = [(ref, path) for _, ref, path in written] + [file for made in kernels.values() for file in made]
    if planner:
        of_ranks = [part.program for part in parts]
        ranks, files = planner.ranks(of_ranks, written, resolved.limits, store, directory, progress)
    facts = model_facts(resolved, whole.program)
    tokenizer = engine_files(resolved.tokenizer, facts.vocab_size, facts.eos_token_ids)
    opset = max(part.program.opset_version for part in parts)
    manifest = Manifest(
        engine_id=engine_id(identity),
        identity=identity,
        source=source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=facts,
        limits=resolved.limits,
        mapping=parallelism(resolved.mapping),
        fingerprint=planner.fingerprint(opset)
        if planner
        else Fingerprint("torch", options.target, opset, options.compute_capability),
        ranks=ranks,
        tokenizer=tuple(describe(name, data) for name, data in tokenizer.items()),
        quantization=weights.facts,
    )
    with pinned(store, [file.digest for file in manifest.files()]) as pin:
        before, total = 0, sum(ref.size for ref, _ in files)

        def uploaded(done: int, _: int) -> None:
            pin.refresh()
            progress("upload", before + done, total, "bytes")

        for ref, path in files:
            put_file(store, ref, path, uploaded, move=True)
            before += ref.size
        progress("publish", 0, 1, "")
        for program in kernels:
            put_bytes(store, "program.json", program)
        for name, data in tokenizer.items():
            put_bytes(store, name, data)
        published = registry.publish(store, manifest)
    progress("publish", 1, 1, "")
    as_ours = msgspec.structs.replace(manifest, created=published.created, source=published.source)
    return Engine(store, published, ours=published == as_ours)


def _temporary(model: Path | CausalLM, options: BuildConfig, source: str | None, progress: Progress) -> Engine:
    """An engine of several ranks that is still there serves: a loop over ranks asks for it once a rank."""
    several = options.tp_size * options.pp_size > 1 or (
        isinstance(model, CausalLM) and model.config.mapping.world_size > 1
    )
    if several:
        found = _temporaries.get(engine_id(build_identity(read_model(model, options), options, progress)))
        if found is not None:
            return found
    clear(None)
    work = WorkDirectory(None)
    try:
        engine = build(
            model,
            options,
            store=DirectoryStore(work.path / "store"),
            source=source,
            work_dir=work.path,
            progress=progress,
        )
    except BaseException:
        work.remove()
        raise
    at_end(engine, work.remove)
    if several:
        _temporaries[engine.engine_id] = engine
    return engine


def build_identity(model: Model, options: BuildConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Everything that decides the engine, as JSON values; its digest is the engine id."""
    tokenizer = model.tokenizer.files() if model.tokenizer else {}
    identity = {
        "checkpoint": model.pretrained.digests(progress),
        "tokenizer": [describe("", data).digest for data in tokenizer.values()],
        "dtype": model.dtype,
        "kv_cache_dtype": _kv_dtype(model),
        "limits": msgspec.to_builtins(model.limits),
        "quantization": model.weights.facts,
        "mapping": msgspec.to_builtins(parallelism(model.mapping)),
        "target": planner.identity()
        if (planner := Planner.of(options))
        else {"backend": "torch", "device": options.target, "compute_capability": options.compute_capability},
        "format": {"manifest": FORMAT_VERSION, "program": SCHEMA_VERSION, "operators": OPSET_VERSION},
        "recipe_version": RECIPE_VERSION,
    }
    made = {"random_seed": DUMMY_SEED if model.pretrained.dummy else None, "kernels": compiler(options)}
    return identity | {name: value for name, value in made.items() if value is not None}


def _kv_dtype(model: Model) -> str:
    if model.kv_scales is None:
        return model.dtype
    return "int8" if model.kv_int8 else "float8_e4m3fn"


def make_rank(model: Model, rank: Mapping) -> RankPart:
    """The program of one rank, the weights that no checkpoint holds, and what it has of the others."""
    config, packed = model.config, model.weights.packed
    decoder = Decoder.on_meta(config, model.dtype, packed, model.kv_scales, rank, model.kv_int8)
    tokens = model.limits.max_num_tokens
    program = lower(decoder, max_num_tokens=tokens, rope_lengths=config.rope_lengths, ranks=rank.tp_size)
    return RankPart(program, decoder.constants(), cuts(config, rank, packed))


def model_facts(model: Model, program: Program) -> ModelFacts:
    """What others need to know of the model, whose whole program is given."""
    attention = model.config.layers[0].attention
    return ModelFacts(
        architecture=model.config.architecture,
        vocab_size=model.config.vocab_size,
        num_layers=len(model.config.layers),
        hidden_size=model.config.hidden_size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        dtype=model.dtype,
        kv_bytes_per_token=sum(cache.bytes_per_token for cache in program.caches),
        eos_token_ids=model.pretrained.config.eos_token_ids,
        num_parameters=sum(program.parameters().values()),
    )
