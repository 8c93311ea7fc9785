"""How the ranks of an engine find each other, and that they are those of one engine."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist

from engine.errors import FailedPrecondition, Unavailable
from engine.manifest import Manifest
from executor_svc.frames import FrameSocket
from executor_svc.group import ALONE, Group
from executor_svc.network import listen
from executor_svc.ranks import Ranks
from protos.v1.worker_pb2 import FromWorker, Join, ToWorker

MEETING = 30.0  # seconds within which all ranks must have come


def find_place(
    front: FrameSocket,
    manifest: Manifest,
    device: str,
    join: Join | None,
    machines: int = 1,
    host: str = "127.0.0.1",
) -> Group:
    """This worker's place among the ranks of an engine. Rank 0 lets the front start the others; all of them wait for each other.

    Args:
        join: of a rank that is not 0, what the front has told it.
        machines: that share the ranks, for rank 0. host: the interface where it listens for them.

    Raises:
        Unavailable, FailedPrecondition: as `meet`; also for too few GPUs, and a manifest that does not hold together.
    """
    engine, count, mapping = manifest.engine_id[:12], len(manifest.ranks), manifest.mapping
    if join is None and count == 1:
        return ALONE
    if not count == mapping.world_size == mapping.tp_size * mapping.pp_size:
        raise FailedPrecondition(
            f"the manifest of engine {engine} has {count} ranks and a mapping of {mapping.tp_size} * {mapping.pp_size} = "
            f"{mapping.world_size}: build the engine again",
            reason="MAPPING_INVALID",
        )
    if join is None and count % machines:
        raise FailedPrecondition(
            f"engine {engine} has {count} ranks, which cannot be divided among {machines} machines: build it with another "
            "--tp or --pp, or start the executor with other --machines",
            reason="MACHINES_UNEVEN",
        )
    here = join.local_world_size if join else count // machines
    if device == "cuda" and (there := torch.cuda.device_count()) < here:
        raise FailedPrecondition(
            f"engine {engine} needs {here} GPUs{' of each machine' if here < count else ''}, this node has {there}: build it "
            "with a smaller --tp or --pp, or use a node that has as many",
            reason="DEVICES_TOO_FEW",
        )
    with contextlib.ExitStack() as stack:
        listener = None
        if join is None:  # it has the port from now on, and lets no other have it
            listener = stack.enter_context(listen(host))
            front.send(FromWorker(ranks=count, port=listener.getsockname()[1]).SerializeToString())
            join = _joined(front)
        os.environ |= {
            "RANK": str(join.rank), "WORLD_SIZE": str(join.world_size),
            "LOCAL_RANK": str(join.local_rank), "LOCAL_WORLD_SIZE": str(here),
            "MASTER_ADDR": join.address, "MASTER_PORT": str(join.port),
        }  # fmt: skip
        if device == "cpu":  # whose cores they share
            torch.set_num_threads(max(1, torch.get_num_threads() // here))
        return meet(manifest, device, listener=listener)


def _joined(front: FrameSocket) -> Join:
    """What the front tells rank 0 when it has started the others; what comes before is the end of others' clients."""
    while True:
        for data in front.receive(None):
            message = ToWorker.FromString(data)
            if message.HasField("join"):
                return message.join


def meet(
    manifest: Manifest,
    device: str,
    patience: float = MEETING,
    environment: Mapping[str, str] = os.environ,
    listener: socket.socket | None = None,
) -> Ranks:
    """Waits for the other ranks where the environment says: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Args:
        listener: of rank 0, which listens there already. It is taken over.

    Raises:
        Unavailable: a rank has not come within so many seconds.
        FailedPrecondition: they are not the ranks of one engine, or not of one release.
    """
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    runs = f"enginehouse {version('enginehouse')} with torch {torch.__version__}"
    mine = f"engine {manifest.engine_id} of {len(manifest.ranks)} ranks by {runs}"
    host = listener.getsockname()[0] if listener else address
    until = time.monotonic() + patience
    try:
        # torchrun has opened the store itself, where it has started the ranks: executors' workers only inherit what it has told
        served = listener is None and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = rank == 0 and not served
        store = dist.TCPStore(
            address,
            port,
            is_master=serves,
            wait_for_workers=False,
            timeout=timedelta(seconds=patience),
            master_listen_fd=listener.detach() if listener else None,
        )
        store.set(f"rank {rank}", mine)
        missing = [other for other in range(size) if not _comes(store, other, until)]
        theirs = {other: store.get(f"rank {other}").decode() for other in range(size) if other not in missing}
    except dist.DistError as error:
        what = "cannot listen" if rank == 0 else f"has not found rank 0 within {patience:.0f} s, or has lost it,"
        raise Unavailable(f"rank {rank} of {size} {what} at {address}:{port}: {error}", reason="RANK_MISSING") from None
    for other, runs in theirs.items():
        if runs != mine:
            raise FailedPrecondition(
                f"rank {rank} runs {mine}, but rank {other} runs {runs}: start all ranks with one engine and one release",
                reason="RANKS_DIFFER",
            )
    if missing:
        raise Unavailable(
            f"of {size} ranks, these have not come to {address}:{port} within {patience:.0f} s: "
            f"{', '.join(map(str, missing))}; look into their logs, or start them",
            reason="RANK_MISSING",
        )
    if size != len(manifest.ranks):
        raise FailedPrecondition(
            f"engine {manifest.engine_id[:12]} is for {len(manifest.ranks)} ranks, but {size} have met: start as many",
            reason="RANKS_UNSUPPORTED",
        )
    here = int(environment.get("LOCAL_WORLD_SIZE", size))
    return Ranks(rank, manifest.mapping, store, address, device, here=here, host=host)


def _comes(store: dist.TCPStore, rank: int, until: float) -> bool:
    """Whether a rank has told what it runs by a time of time.monotonic()."""
    try:
        store.wait([f"rank {rank}"], timedelta(seconds=max(until - time.monotonic(), 0.001)))
    except dist.DistError:
        return False
    return True
