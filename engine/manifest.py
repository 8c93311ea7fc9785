"""The manifest of an engine: the one file that says what belongs to it. Written last, never changed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from engine import token_table
from engine.errors import FailedPrecondition, InvalidArgument
from engine.fingerprint import Fingerprint

FORMAT_VERSION = 1
CHUNK_SIZE = 32 * 1024 * 1024


class _Version(msgspec.Struct):
    """Read first, so that a manifest of another format is told by that and not by its fields."""

    format_version: int


class FileRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An immutable file of the engine.

    Attributes:
        name: what it is called in an engine directory.
        size: bytes.
        digest: SHA-256 of the whole, hexadecimal; its address in the store.
        chunks: SHA-256 of each CHUNK_SIZE bytes, so that ranged reads are verified as they arrive.
    """

    name: str
    size: int
    digest: str
    chunks: tuple[str, ...]


class ModelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What executors, gateways and planners need to know of the model: the whole one, over however many ranks it is spread."""

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    dtype: str
    kv_bytes_per_token: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one step and one sequence may hold."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int


class Parallelism(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Over how many ranks the model is spread."""

    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1


class Rank(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one rank runs.

    Attributes:
        native: plans, which are code and not data: `engine/trust.py` says who may load them.
        kernels: compiled kernels, which are code, too; but an executor that may not load them, or for which they are not made,
            compiles its own.
        network: of plans, what TensorRT was given, for people (layers by kind, profiles).
        random_seed: of dummy weights: those that are in no file, which a loader makes at random. None where all are in files.
    """

    program: FileRef
    weights: tuple[FileRef, ...]
    native: tuple[
        FileRef, ...
    ] = ()  # omitted where empty: manifests without keep their bytes, over which signatures are
    kernels: tuple[FileRef, ...] = ()
    random_seed: int | None = None
    network: dict[str, Any] | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine.

    Attributes:
        identity: everything that decided the result; `engine_id` is its digest.
        source: where the checkpoint was found, for people.
        tokenizer: tokenizer.json, tokenizer_config.json with the chat template, and the bytes of tokens
            (`engine/token_table.py`) if they can be told; empty for a model of token ids alone.
    """

    engine_id: str
    identity: dict[str, Any]
    source: str
    created: str
    model: ModelFacts
    limits: Limits
    mapping: Parallelism
    fingerprint: Fingerprint
    ranks: tuple[Rank, ...]
    tokenizer: tuple[FileRef, ...]
    quantization: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def files(self) -> list[FileRef]:
        """Every file of the engine; one that several ranks have stands here once."""
        ranks = [file for rank in self.ranks for file in (rank.program, *rank.weights, *rank.native, *rank.kernels)]
        return list(dict.fromkeys([*ranks, *self.tokenizer]))

    @property
    def token_table(self) -> FileRef | None:
        """The bytes of its tokens; None for an engine without, which cannot be guided."""
        return next((file for file in self.tokenizer if file.name == token_table.FILE), None)

    @property
    def dummy_weights(self) -> bool:
        """Whether its weights are random, made where it is loaded."""
        return any(rank.random_seed is not None for rank in self.ranks)

    def weight_bytes(self) -> int:
        """Bytes of weights over all ranks."""
        return sum(file.size for rank in self.ranks for file in rank.weights)

    def to_json(self) -> bytes:
        """Deterministic, readable JSON."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1)

    @staticmethod
    def from_json(data: bytes) -> "Manifest":
        """Reads and checks.

        Raises:
            FailedPrecondition: a manifest of another format.
            InvalidArgument: no manifest, or one whose id is not its identity's; the message says where.
        """
        try:
            version = msgspec.json.decode(data, type=_Version).format_version
            if version != FORMAT_VERSION:
                raise FailedPrecondition(
                    f"the manifest has format {version}, this release reads {FORMAT_VERSION}: build the engine again",
                    reason="MANIFEST_FORMAT",
                )
            manifest = msgspec.json.decode(data, type=Manifest)
        except msgspec.MsgspecError as error:
            raise InvalidArgument(f"manifest: {error}", reason="MANIFEST_INVALID") from None
        if engine_id(manifest.identity) != manifest.engine_id:
            raise InvalidArgument(
                f"manifest says engine {manifest.engine_id}, but its identity gives {engine_id(manifest.identity)}",
                reason="MANIFEST_INVALID",
            )
        for file in manifest.files():
            if len(file.chunks) != max(1, -(-file.size // CHUNK_SIZE)):  # a missing digest would leave bytes unread
                raise InvalidArgument(
                    f"manifest of engine {manifest.engine_id[:12]}: {file.name} of {file.size} bytes has "
                    f"{len(file.chunks)} chunk digests",
                    reason="MANIFEST_INVALID",
                )
        return manifest


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def engine_id(identity: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, over the canonical JSON of everything that decides a build's result."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()
