"""The one way from a checkpoint to an engine; each step is a function that can be used by itself.

checkpoint -> config + named weights -> module -> program -> blobs + manifest -> store
"""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch

from builder_svc.checkpoint.digests import file_digests
from builder_svc.checkpoint.huggingface import HuggingFaceCheckpoint
from builder_svc.checkpoint.quantized import open_quantized
from builder_svc.checkpoint.quantized.resolve import Resolved, resolve
from builder_svc.lower.program import lower
from builder_svc.models.config import DecoderConfig
from builder_svc.models.decoder import Decoder
from builder_svc.models.families import find_family
from builder_svc.options import DTYPES, BuildOptions, Progress
from builder_svc.tokenizer import NormalizedTokenizer, normalize
from builder_svc.weights import check_weights, write_weights
from engine import registry
from engine.blobs import describe, put_bytes, put_file
from engine.errors import InvalidArgument, NotFound, Unimplemented
from engine.fingerprint import Fingerprint
from engine.manifest import FORMAT_VERSION, Limits, Manifest, ModelFacts, Parallelism, Rank, engine_id
from engine.opset import OPSET_VERSION
from engine.pins import pinned
from engine.program import SCHEMA_VERSION, Program
from engine.store import Store

RECIPE_VERSION = 2  # raised when the same inputs give another engine than before


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been understood, and what will be made of it."""

    weights: Resolved
    config: DecoderConfig
    tokenizer: NormalizedTokenizer
    dtype: str
    limits: Limits
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        reused: the engine was in the store already, and nothing was built.
        ours: everything that its manifest names is what this build has made, whoever published it first.
    """

    manifest: Manifest
    reused: bool
    ours: bool

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest as it is stored."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()


def build(
    checkpoint: Path,
    store: Store,
    options: BuildOptions = BuildOptions(),  # noqa: B008  (frozen)
    *,
    source: str | None = None,
    again: Callable[[str], bool] = lambda _: False,
    work_dir: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Built:
    """Builds an engine of a checkpoint directory into a store, or finds it there.

    Args:
        source: where the checkpoint was found, for the manifest; by default the directory.
        again: asked with the id of an engine that is in the store, whether to build it all the same, to see that it is right.
        work_dir: for the weights before they are uploaded, as large as the engine; by default the system's.
        progress: called as the phases go on.

    Raises:
        NotFound, InvalidArgument, DataLoss: the checkpoint is not there, does not hold together or is damaged.
        Unimplemented: a known kind of model that we do not support.
        ResourceExhausted, Unavailable, PermissionDenied: the store or the work directory.
    """
    model = read_model(checkpoint, options)
    identity = build_identity(model, options, progress)
    found = registry.find_manifest(store, engine_id(identity))
    if found and not registry.missing_files(store, found) and not again(found.engine_id):
        return Built(found, reused=True, ours=False)
    progress("program", 0, 1, "")
    with torch.device("meta"):
        decoder = Decoder(model.config)
    model.weights.check({name: tuple(weight.shape) for name, weight in decoder.named_parameters()})
    program, constants = make_program(model)
    check_weights(model.weights.checkpoint, model.weights.sources, program)
    progress("program", 1, 1, "")
    with tempfile.TemporaryDirectory(prefix="enginehouse-", dir=work_dir) as directory:
        files = write_weights(
            model.weights.checkpoint,
            model.weights.sources,
            constants,
            program,
            Path(directory),
            lambda done, total: progress("weights", done, total, "bytes"),
        )
        program_json = program.to_json()
        rank = Rank(describe("program.json", program_json), tuple(ref for ref, _ in files))
        manifest = Manifest(
            engine_id=engine_id(identity),
            identity=identity,
            source=source or str(checkpoint),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=model_facts(model, program),
            limits=model.limits,
            mapping=Parallelism(),
            fingerprint=Fingerprint("torch", options.device, program.opset_version, options.compute_capability),
            ranks=(rank,),
            tokenizer=(
                describe("tokenizer.json", model.tokenizer.tokenizer_json),
                describe("tokenizer_config.json", model.tokenizer.config_json),
            ),
            quantization=model.weights.facts,
        )
        with pinned(store, [file.digest for file in manifest.files()]) as pin:
            before, total = 0, sum(ref.size for ref, _ in files)

            def uploaded(done: int, _: int) -> None:
                pin.refresh()
                progress("upload", before + done, total, "bytes")

            for ref, path in files:
                put_file(store, ref, path, uploaded)
                before += ref.size
            progress("publish", 0, 1, "")
            put_bytes(store, "program.json", program_json)
            put_bytes(store, "tokenizer.json", model.tokenizer.tokenizer_json)
            put_bytes(store, "tokenizer_config.json", model.tokenizer.config_json)
            published = registry.publish(store, manifest)
    progress("publish", 1, 1, "")
    as_ours = msgspec.structs.replace(manifest, created=published.created, source=published.source)
    return Built(published, reused=False, ours=published == as_ours)


def read_model(checkpoint: Path, options: BuildOptions) -> Model:
    """Opens a checkpoint, finds its family and resolves what the options leave open. Reads no weights."""
    if not checkpoint.is_dir():
        raise NotFound(
            f"{checkpoint} is no directory; give a checkpoint in Hugging Face layout", reason="CHECKPOINT_NOT_FOUND"
        )
    opened = open_quantized(HuggingFaceCheckpoint(checkpoint))
    family, architecture = find_family(opened.config)
    config = family.decoder_config(opened.config, architecture)
    longest = config.max_position_embeddings
    max_seq_len = options.max_seq_len or longest
    if max_seq_len > longest:
        raise InvalidArgument(
            f"max_seq_len is {max_seq_len}, more than the model's {longest} positions: give at most {longest}",
            reason="MAX_SEQ_LEN_INVALID",
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if options.device == "cpu" else opened.dtype()
        if dtype not in DTYPES[1:]:
            raise Unimplemented(
                f"{checkpoint} is stored in {dtype}; choose one of {', '.join(DTYPES[1:])} for the engine"
            )
    limits = Limits(options.max_batch_size, max_seq_len, options.max_num_tokens)
    tokenizer = normalize(checkpoint, config.vocab_size)
    weights = resolve(opened, family.NAMES.sources(config, opened.shapes))
    return Model(weights, config, tokenizer, dtype, limits, opened.eos_token_ids())


def build_identity(model: Model, options: BuildOptions, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Everything that decides the engine, as JSON values; its digest is the engine id."""
    digests = file_digests(
        model.weights.checkpoint.files(), lambda done, total: progress("checkpoint", done, total, "bytes")
    )
    return {
        "checkpoint": digests,
        "tokenizer": [
            describe("", data).digest for data in (model.tokenizer.tokenizer_json, model.tokenizer.config_json)
        ],
        "dtype": model.dtype,
        "limits": msgspec.to_builtins(model.limits),
        "quantization": model.weights.facts,
        "mapping": msgspec.to_builtins(Parallelism()),
        "target": {"backend": "torch", "device": options.device, "compute_capability": options.compute_capability},
        "format": {"manifest": FORMAT_VERSION, "program": SCHEMA_VERSION, "operators": OPSET_VERSION},
        "recipe_version": RECIPE_VERSION,
    }


def make_program(model: Model) -> tuple[Program, dict[str, torch.Tensor]]:
    """The model's program, and the weights that no checkpoint holds."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, model.dtype))
    try:
        with torch.device("meta"):
            decoder = Decoder(model.config, model.weights.packed)
        program = lower(decoder, max_num_tokens=model.limits.max_num_tokens, rope_lengths=model.config.rope_lengths)
    finally:
        torch.set_default_dtype(default)
    return program, decoder.constants()


def model_facts(model: Model, program: Program) -> ModelFacts:
    """What others need to know of the model."""
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
        eos_token_ids=model.eos_token_ids,
        num_parameters=sum(program.parameters().values()),
    )
