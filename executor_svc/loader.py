"""An engine from the store into memory: trust, fingerprint, then chunks in parallel, each verified where it will stay."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import blobs, fingerprint
from engine.errors import DataLoss, FailedPrecondition
from engine.fingerprint import Node
from engine.manifest import Manifest
from engine.program import Program
from engine.store import Store
from engine.trust import Trust
from executor_svc import memory, random_weights

_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32, "I64": torch.int64,
    "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class LoadedEngine:
    """A rank of an engine, in memory.

    Attributes:
        weights: by the program's names; dummy weights are on the node's device, others in main memory.
        size: bytes that were read or made.
    """

    manifest: Manifest
    program: Program
    weights: dict[str, Tensor]
    size: int


def load_engine(
    store: Store,
    engine_id: str,
    node: Node,
    progress: Callable[[int, int], None] = lambda *_: None,
    trust: Trust = Trust(),  # noqa: B008  (frozen)
) -> LoadedEngine:
    """Loads an engine of one rank.

    Args:
        node: what is here; an engine that needs something else is refused before a byte of it is read.
        progress: called with (bytes done, bytes in all) of weights, read or made at random.
        trust: whose engines may be used; by default everybody's that hold no native code.

    Raises:
        NotFound: no such engine, or a blob of it is missing.
        FailedPrecondition: it needs what this node has not, or may not be used here (`Trust.admit` says why).
        DataLoss: stored bytes do not match their digest; nothing of them is used.
    """
    manifest = trust.admit(store, engine_id)
    fingerprint.check(
        engine_id, manifest.source, manifest.fingerprint, node, store.url, dummy_weights=manifest.dummy_weights
    )
    if len(manifest.ranks) != 1:
        raise FailedPrecondition(
            f"engine {engine_id[:12]} is for {len(manifest.ranks)} ranks; this executor runs engines of one",
            reason="RANKS_UNSUPPORTED",
        )
    rank = manifest.ranks[0]
    program = Program.from_json(blobs.read(store, rank.program))
    buffers = [memory.zeros(file.size) for file in rank.weights]
    total, done = sum(file.size for file in rank.weights), 0
    if rank.random_seed is not None:
        total = sum(declared.nbytes for declared in program.weights.values())

    def arrived(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    blobs.read_into(
        store, [(file, memoryview(buffer.numpy())) for file, buffer in zip(rank.weights, buffers, strict=True)], arrived
    )
    weights: dict[str, Tensor] = {}
    for buffer in buffers:
        weights.update(_tensors(buffer))
    if rank.random_seed is not None:
        random = [name for name in program.weights if name not in weights]
        total = done + sum(program.weights[name].nbytes for name in random)
        weights |= random_weights.make(program, random, rank.random_seed, node.device, arrived)
    for name, declared in program.weights.items():
        found = weights.get(name)
        if found is None or (str(found.dtype), tuple(found.shape)) != (f"torch.{declared.dtype}", declared.shape):
            raise DataLoss(
                f"engine {engine_id[:12]}: weight {name!r} is missing or not what the program declares",
                reason="WEIGHTS_INVALID",
            )
    return LoadedEngine(manifest, program, weights, done)


def _tensors(buffer: Tensor) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its bytes."""
    start = 8 + int.from_bytes(bytes(buffer[:8].numpy()), "little")
    header = json.loads(bytes(buffer[8:start].numpy()))
    return {
        name: buffer[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(_DTYPES[entry["dtype"]])
        .view(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
