"""Ends of groups of machines: a rank elsewhere, the machine that leads, and a network that loses one of two without a word."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from enginehouse.cluster import hold_ports
from executor_svc.group_options import PORT
from protos.v1 import executor_pb2 as pb
from protos.v1.executor_pb2_grpc import ExecutorStub
from tests.integration.llm_harness import gone, workers
from tests.integration.machines import (
    LIMITS,
    WITHIN,
    begun,
    kill,
    loaded,
    lost,
    one_rank,
    ready,
    says,
    tokens,
    where_to_join,
)
from tests.integration.services import service

pytestmark = pytest.mark.drill
LEADING = ("--machines", "2", "--machines-port", "0", "--join-timeout", "5")


def engine(checkpoint: Path, store: Path, tp: int, pp: int) -> str:
    options = BuildConfig(tp_size=tp, pp_size=pp, **LIMITS)
    return build(checkpoint, options, store=DirectoryStore(store)).manifest.engine_id


async def test_the_end_of_a_rank_elsewhere_and_of_the_machine_that_leads(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    expected, engine_id = one_rank(checkpoint, store), engine(checkpoint, store, 2, 2)
    uneven, here = engine(checkpoint, store, 1, 3), ("--store", str(store))
    with contextlib.ExitStack() as stack:
        leader = stack.enter_context(service("executor_svc", tmp_path / "leader", *here, *LEADING))
        where = where_to_join(leader)
        async with grpc.aio.insecure_channel(leader.address) as channel:
            stub = ExecutorStub(channel)
            alone = engine(checkpoint, store, 1, 1)
            await loaded(stub, alone)  # which needs nobody
            assert await tokens(stub, alone) == expected
            await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=alone))
            other = ("--store", str(tmp_path / "other"), "--join", where)
            with (
                service("executor_svc", tmp_path / "with another store", *other),
                pytest.raises(grpc.aio.AioRpcError, match="machine 1, 127.0.0.1: no engine"),
            ):
                await loaded(stub, engine_id)
            member = stack.enter_context(service("executor_svc", tmp_path / "member", *here, "--join", where))
            with pytest.raises(grpc.aio.AioRpcError, match="has 3 ranks, which cannot be divided among 2 machines"):
                await loaded(stub, uneven)
            await loaded(stub, engine_id)
            assert len(workers(leader.process.pid)) == len(workers(member.process.pid)) == 2
            assert await tokens(stub, engine_id) == expected
            for victim in (member, leader):
                ranks = [*workers(leader.process.pid), *workers(member.process.pid)]
                call = await begun(stub, engine_id)
                killed = time.monotonic()
                os.kill(workers(victim.process.pid)[1], signal.SIGKILL)
                await lost(call)
                assert time.monotonic() - killed < WITHIN and gone(ranks, WITHIN)
                await ready(stub)
                assert await tokens(stub, engine_id) == expected
            ranks = [*workers(leader.process.pid), *workers(member.process.pid)]
            kill(leader)
            assert gone(ranks, WITHIN)
        assert says(member.log, "the machine that leads is gone")
        again = ("--machines-port", where.rpartition(":")[2], "--join-timeout", "60", "--engine", engine_id)
        leader = stack.enter_context(service("executor_svc", tmp_path / "again", *here, "--machines", "2", *again))
        async with grpc.aio.insecure_channel(leader.address) as channel:
            stub = ExecutorStub(channel)
            assert await tokens(stub, engine_id) == expected
            await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=engine_id))


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two hosts by their addresses: network namespaces with a cable between them."""
    names = {address: f"eh{os.getpid()}{end}" for address, end in (("10.77.0.1", "a"), ("10.77.0.2", "b"))}

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    with contextlib.ExitStack() as stack:
        try:
            for name in names.values():
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        first, second = names.values()
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for address, name in names.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names


def cable(hosts: dict[str, str], state: str) -> None:
    subprocess.run(["ip", "-n", hosts["10.77.0.2"], "link", "set", "cable", state], check=True)


@contextlib.contextmanager
def executor(namespace: str, log: Path, *options: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "executor_svc", "--port", "0", *options]
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, **environment}
        )
    assert process.stdout
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_network_that_is_cut(hosts: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    """No word reaches the other machine: neither the end of a process nor that of a connection."""
    store = tmp_path / "store"
    engine_id = engine(checkpoint, store, 2, 1)
    lws = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "10.77.0.1"}
    options = ("--store", str(store), "--engine", engine_id, "--host", "0.0.0.0", "--insecure", "--join-timeout", "60")  # noqa: S104
    first, second = hosts.values()
    logs = [tmp_path / "leader", tmp_path / "member"]
    with (
        executor(first, logs[0], *options, LWS_WORKER_INDEX="0", **lws) as leader,
        executor(second, logs[1], *options, LWS_WORKER_INDEX="1", **lws) as member,
    ):
        assert leader.stdout and "listening" in await asyncio.to_thread(leader.stdout.readline), logs[0].read_text()
        assert says(logs[0], f"join it on 0.0.0.0:{PORT}") and says(logs[1], "machine 1 of the group")
        ranks = [*workers(leader.pid), *workers(member.pid)]
        assert len(ranks) == 2
        cable(hosts, "down")
        assert gone(ranks, WITHIN), "each machine finds out by itself"
        cable(hosts, "up")
        began = time.monotonic()
        while logs[0].read_text().count(" MB loaded in ") < 2:
            assert time.monotonic() - began < 60, "the group comes back with the network"
            await asyncio.sleep(0.2)


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()  # torchrun hands it on
        process.wait()


async def test_machines_that_torchrun_starts(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    expected, engine_id = one_rank(checkpoint, store), engine(checkpoint, store, 2, 1)
    (held,) = hold_ports(1)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    where = ("--master-addr", "127.0.0.1", "--master-port", str(held.getsockname()[1]))
    ours = ("-m", "executor_svc", "--store", str(store), "--port", "0", "--join-timeout", "60")
    with held, contextlib.ExitStack() as stack:
        logs = [tmp_path / "log0", tmp_path / "log1"]
        for rank, log in enumerate(logs):
            stack.enter_context(running([*torchrun, "--node-rank", str(rank), *where, *ours], log))
        assert all(says(log, " listening on ") for log in logs), [log.read_text() for log in logs]
        address = re.search(r"listening on (\S+)", logs[0].read_text())
        assert address and says(logs[1], "machine 1 of the group that 127.0.0.1 leads")
        async with grpc.aio.insecure_channel(address[1]) as channel:
            stub = ExecutorStub(channel)
            await loaded(stub, engine_id)
            assert await tokens(stub, engine_id) == expected
