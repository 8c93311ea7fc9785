"""An engine from the store into memory: trust, fingerprint, then chunks in parallel, each verified where it will stay."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor

from engine import blobs, fingerprint
from engine.errors import DataLoss, FailedPrecondition
from engine.fingerprint import Node
from engine.manifest import Manifest, Rank
from engine.program import Program
from engine.store import Store
from engine.trust import Trust
from executor_svc import memory, random_weights
from executor_svc.arrival import Arrival, views


@dataclass(frozen=True)
class LoadedEngine:
    """A rank of an engine, in memory.

    Attributes:
        weights: by the program's names, on the node's device; none where there is a plan, which holds them.
        size: bytes that are read or made.
        plan: a plan of the manifest's backend, uint8 in main memory; None for a program.
        arriving: leaving this context waits until the weights have their values, and raises what reading them raises.
    """

    manifest: Manifest
    program: Program
    weights: dict[str, Tensor]
    size: int
    arriving: ExitStack = field(default_factory=ExitStack)
    plan: Tensor | None = None


def only_rank(manifest: Manifest) -> int:
    """The rank of an engine that has one. Raises FailedPrecondition for several."""
    if len(manifest.ranks) != 1:
        raise FailedPrecondition(
            f"engine {manifest.engine_id[:12]} is for {len(manifest.ranks)} ranks, and one is to be loaded here: let an "
            "executor run it",
            reason="RANKS_UNSUPPORTED",
        )
    return 0


def load_engine(
    store: Store,
    engine_id: str,
    node: Node,
    progress: Callable[[int, int], None] = lambda *_: None,
    trust: Trust = Trust(),  # noqa: B008  (frozen)
) -> LoadedEngine:
    """Loads an engine of one rank; arguments and errors are `begin_load`'s."""
    loaded = begin_load(store, engine_id, node, progress, trust)
    with loaded.arriving:
        return loaded


def begin_load(
    store: Store,
    engine_id: str,
    node: Node,
    progress: Callable[[int, int], None] = lambda *_: None,
    trust: Trust = Trust(),  # noqa: B008  (frozen)
    which: Callable[[Manifest], int] = only_rank,
) -> LoadedEngine:
    """Begins to load a rank of an engine: to a GPU, its weights may still be arriving when this returns.

    Args:
        node: what is here; an engine that needs something else is refused before a byte of it is read.
        progress: called with (bytes done, bytes in all) of weights, read or made at random; not from two threads at once.
        trust: whose engines may be used; by default everybody's that hold no native code.
        which: finds the rank to load, once the engine may run here and before a file of it is read.

    Raises (also leaving `arriving`):
        NotFound: no such engine, or a blob of it is missing.
        FailedPrecondition: it needs what this node has not, or may not be used here (`Trust.admit` says why).
        DataLoss: stored bytes do not match their digest; nothing of them is used.
    """
    manifest = trust.admit(store, engine_id)
    fingerprint.check(
        engine_id, manifest.source, manifest.fingerprint, node, store.url, dummy_weights=manifest.dummy_weights
    )
    rank = manifest.ranks[which(manifest)]
    program = Program.from_json(blobs.read(store, rank.program))
    total, done = sum(file.size for file in rank.weights), 0
    if rank.random_seed is not None:
        total = sum(declared.nbytes for declared in program.weights.values())
    one = threading.Lock()

    def arrived(count: int) -> None:
        nonlocal done
        with one:
            done += count
            progress(done, total)

    if manifest.fingerprint.backend != "torch":
        if len(rank.native) != 1:
            raise DataLoss(
                f"engine {engine_id[:12]}: {len(rank.native)} plans of a rank, expected one", reason="PLAN_INVALID"
            )
        total = rank.native[0].size
        plan = memory.zeros(total)
        blobs.read_into(store, [(rank.native[0], memoryview(plan.numpy()))], arrived)
        return LoadedEngine(manifest, program, {}, total, plan=plan)
    with ExitStack() as arriving:
        weights = _weights(store, rank, node.device, arrived, arriving)
        if rank.random_seed is not None:
            random = [name for name in program.weights if name not in weights]
            total = sum(file.size for file in rank.weights) + sum(program.weights[name].nbytes for name in random)
            weights |= random_weights.make(program, random, rank.random_seed, node.device, arrived)
        for name, declared in program.weights.items():
            found = weights.get(name)
            if found is None or (str(found.dtype), tuple(found.shape)) != (f"torch.{declared.dtype}", declared.shape):
                raise DataLoss(
                    f"engine {engine_id[:12]}: weight {name!r} is missing or not what the program declares",
                    reason="WEIGHTS_INVALID",
                )
        return LoadedEngine(manifest, program, weights, total, arriving.pop_all())


def _weights(
    store: Store, rank: Rank, device: str, arrived: Callable[[int], None], arriving: ExitStack
) -> dict[str, Tensor]:
    """What the rank's files hold: in main memory read to where it stays, to a GPU on its way."""
    if device == "cuda":
        return arriving.enter_context(Arrival(store, rank.weights, device, arrived)).tensors()
    buffers = [memory.zeros(file.size) for file in rank.weights]
    blobs.read_into(
        store, [(file, memoryview(buffer.numpy())) for file, buffer in zip(rank.weights, buffers, strict=True)], arrived
    )
    weights: dict[str, Tensor] = {}
    for buffer in buffers:
        weights |= views(memoryview(buffer.numpy()), buffer)
    return weights
