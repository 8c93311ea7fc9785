"""The worker process: one rank of one engine, which it loads.

Started by the front (`executor_svc/launch.py`) with one end of a socket pair, on which it is told its engine; it ends when
the other end closes. Of several ranks, rank 0 runs the loop (`loop.py`), and the others compute what it tells them (`ranks.py`).
"""

import argparse
import atexit
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engine import blobs
from engine.backends import TRANSFER_PATIENCE, open_store
from engine.errors import EnginehouseError
from engine.manifest import Manifest
from engine.store import Store
from engine.token_table import TokenTable
from engine.trust import Trust
from executor_svc.budget import Budget, weights
from executor_svc.frames import FrameSocket
from executor_svc.group import ALONE
from executor_svc.guides import Guides
from executor_svc.kernels import prepare, unpack
from executor_svc.loader import begin_load
from executor_svc.loop import Worker
from executor_svc.node import this_node
from executor_svc.runner import KV_SHARE, Runner, free_memory
from executor_svc.runners import make_plan_runner, make_runner, on_triton
from protos import logs, tracing
from protos.rpc import to_failure
from protos.v1.executor_pb2 import LoadEngineProgress
from protos.v1.worker_pb2 import FromWorker, ToWorker

_KV_SHARES = {"cpu": KV_SHARE, "cuda": 0.9}  # of what weights leave of a limit

log = logging.getLogger(__name__)


def main() -> int:
    """The process; 0 when the front has gone, 1 when the engine could not be loaded or has failed."""
    parser = argparse.ArgumentParser(prog="executor_svc.worker", description="started by the executor's front process")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--kv-memory", type=int)
    parser.add_argument("--kv-tokens", type=int)
    parser.add_argument("--kv-share", type=float)
    parser.add_argument("--no-block-reuse", action="store_true")
    parser.add_argument("--trusted-keys", action="append", default=[])
    parser.add_argument("--trust-native", action="store_true")
    parser.add_argument("--max-waiting", type=int)
    logs.add_options(parser)
    tracing.add_options(parser)
    arguments = parser.parse_args()
    arguments.imports = _age()
    logs.configure("executor", arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # the front decides when the end is; it closes the socket
        signal.signal(number, signal.SIG_IGN)
    front = FrameSocket(socket.socket(fileno=arguments.fd))
    status = 1
    try:
        tracing.configure("executor", arguments.traces)
        _serve(front, arguments)
    except ConnectionError:
        status = 0
    except Exception as error:
        if not isinstance(error, EnginehouseError):
            log.exception("the worker has failed")
        with contextlib.suppress(ConnectionError):
            front.send(FromWorker(failure=to_failure(error)).SerializeToString())
    if torch.distributed.is_initialized():  # whose threads would wait for ranks that have ended
        atexit._run_exitfuncs()
        os._exit(status)
    return status


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return 0.0


def _serve(front: FrameSocket, arguments: argparse.Namespace) -> None:
    while not (messages := front.receive(None)):
        pass
    first = ToWorker.FromString(messages[0])  # behind it may be the ends of others' clients
    join = first.join if first.HasField("join") else None
    engine_id = join.engine_id if join else first.load_engine.engine_id
    kv_memory = (join or first.load_engine).kv_memory_bytes or arguments.kv_memory
    began, waited = time.monotonic(), _age() - arguments.imports
    asked = arrived = 0.0  # seconds until the first of the weights was asked for, and the last was there

    def progress(done: int, total: int) -> None:
        nonlocal arrived
        arrived = time.monotonic() - began
        front.send(FromWorker(progress=LoadEngineProgress(bytes_done=done, bytes_total=total)).SerializeToString())

    trust = Trust.of_files(arguments.trusted_keys, arguments.trust_native)
    store = open_store(arguments.store, TRANSFER_PATIENCE)
    if join and arguments.device == "cuda":
        torch.cuda.set_device(join.local_rank)  # what "cuda" means from now on
    node = this_node(arguments.device)
    budget = Budget(
        arguments.device, free_memory(arguments.device), first.memory_bytes if first.HasField("memory_bytes") else None
    )
    group = ALONE

    def place(manifest: Manifest) -> int:
        nonlocal group, asked
        rank, machines = (join.rank, join.world_size // join.local_world_size) if join else (0, first.machines or 1)
        budget.check(manifest, weights(store, manifest, arguments.device, rank, machines), kv_memory)
        if join or len(manifest.ranks) > 1:
            from executor_svc.meeting import find_place  # here, because most engines have one rank

            group = find_place(front, manifest, arguments.device, join, machines, first.host or "127.0.0.1")
        asked = time.monotonic() - began
        return group.rank

    loaded = begin_load(store, engine_id, node, progress, trust, place)
    manifest, size, program, plan = loaded.manifest, loaded.size, loaded.program, loaded.plan
    here = group.here if arguments.device == "cpu" else 1  # ranks that share a memory

    def memory() -> dict[str, Any]:
        """What the cache may take, beside weights that have their place."""
        most_memory, share = kv_memory, arguments.kv_share
        if arguments.kv_tokens:  # of which each rank keeps its part
            most_memory = arguments.kv_tokens * sum(cache.bytes_per_token for cache in program.caches)
        if most_memory is None and budget.limit is not None:
            most = budget.kv_memory(
                program, manifest.limits, size * here, (share or _KV_SHARES[arguments.device]) / here
            )
            if arguments.device == "cpu":
                most_memory = most
            else:  # a part of what is free, since steps take of it, too
                share = min(share or 1.0, most / max(1, free_memory("cuda")))
        return {"kv_memory": most_memory, "kv_share": share}

    runner: Runner
    with loaded.arriving:  # a runner's graphs need to know where weights will be, and not yet their values
        if plan is not None:
            backend = manifest.fingerprint.backend
            runner = make_plan_runner(program, plan, backend, manifest.limits, group=group, **memory())
            del loaded, plan
        else:
            program, unpacked = unpack(arguments.device, program, loaded.weights)
            del loaded  # what was read is given back where it has been unpacked
            table: dict[Any, Any] = {}
            if on_triton(arguments.device):
                from executor_svc.kernel_archive import adopt_from  # here, because it needs Triton

                table = adopt_from(store, manifest, trust, node.compute_capability or "", group.rank)
            prepared = prepare(arguments.device, program, unpacked)
            settings = {"device": arguments.device, "table": table, **memory()}
            runner = make_runner(program, prepared, manifest.limits, group=group, **settings)
        token_table = _token_table(store, manifest) if group.rank == 0 else None
        ready = time.monotonic() - began
    gc.freeze()  # a collection, which stops the loop, need not look through all of torch each time
    log.info(
        "engine %s: %.1f MB loaded in %.2f s (weights from %.2f to %.2f s, runner %.2f s) by a worker that took %.2f s to start "
        "and then waited %.2f s",
        *(engine_id[:12], size / 1e6, time.monotonic() - began, asked, arrived, ready, arguments.imports, waited),
    )
    if group.rank:
        group.follow(front, runner)
    can = runner.capabilities
    cache = can.num_blocks * can.block_size * sum(cache.bytes_per_token for cache in program.caches)
    taken = (size + cache) * here
    worker = Worker(
        front, manifest, runner, arguments.max_waiting, not arguments.no_block_reuse, taken, Guides(token_table)
    )
    told = LoadEngineProgress(bytes_done=size, bytes_total=size, engine=worker.status())
    front.send(FromWorker(progress=told).SerializeToString())
    worker.run()


def _token_table(store: Store, manifest: Manifest) -> TokenTable | None:
    """The bytes of an engine's tokens; None if it does not tell them."""
    file = manifest.token_table
    return TokenTable.from_bytes(blobs.read(store, file)) if file else None


if __name__ == "__main__":
    sys.exit(main())
