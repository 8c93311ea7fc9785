"""Executors that die, stand still or cannot be reached while streams run: every stream ends in the text that it has without."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import grpc
import pytest

from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from protos.rpc import from_rpc_error
from protos.v1 import gateway_pb2_grpc
from tests.integration.fleet import Elsewhere, Fleet, Stream, Valve, fleet, follow, leaves_no_files, request
from tests.memory import tree
from tests.seaweed import SeaweedFS

STREAMS = 50


@pytest.fixture(scope="module")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A directory store with a model in float32."""
    store = open_store(str(tmp_path_factory.mktemp("failover") / "store"))
    registry.set_name(store, "tiny", build(checkpoint, store=store).manifest.engine_id)
    yield store.url


async def begun(made: Fleet, count: int = STREAMS) -> tuple[list[Stream], "list[asyncio.Task[Stream]]"]:
    """Streams that have said something each."""
    streams = [Stream() for _ in range(count)]
    tasks = [
        asyncio.create_task(follow(made.stub.Generate(request(number), timeout=60), stream))
        for number, stream in enumerate(streams)
    ]
    async with asyncio.timeout(60):
        while not all(stream.said for stream in streams):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    return streams, tasks


def kill(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


async def end_alike(made: Fleet, tasks: "list[asyncio.Task[Stream]]", before: float = 0) -> None:
    """All streams end in the text that they have undisturbed, and some were moved for that beside those of before."""
    found = await asyncio.wait_for(asyncio.gather(*tasks), 60)
    moved = made.metric("gateway_streams_resumed_total")
    for stream, alone in zip(found, await made.alone(range(len(tasks))), strict=True):
        stream.check(alone)
    assert moved > before


@pytest.mark.drill
async def test_executors_told_to_stop_or_killed_under_streams_lose_nothing(store: str, tmp_path: Path) -> None:
    """Who is told to stop lets its streams end for no time at all, so that they go on elsewhere, too."""
    async with fleet(store, tmp_path, 3, drain=0) as made:
        stopped, killed, survivor = made.executors
        with leaves_no_files(made.gateway.process.pid):
            _, tasks = await begun(made, 20)
            stopped.process.send_signal(signal.SIGTERM)
            await end_alike(made, tasks)
            assert await asyncio.to_thread(stopped.process.wait, 60) == 0
            moved = made.metric("gateway_streams_resumed_total")
            _, tasks = await begun(made)
            kill(tree(killed.process.pid), signal.SIGKILL)
            await end_alike(made, tasks, moved)
            assert made.metric("gateway_requests_lost_total") == 0
            await made.settled([survivor])


@pytest.mark.drill
async def test_streams_of_a_killed_worker_go_on_when_it_is_back(store: str, tmp_path: Path) -> None:
    """There is no other executor; its front starts the worker again."""
    async with fleet(store, tmp_path, 1) as made:
        _, tasks = await begun(made, 20)
        kill(tree(made.executors[0].process.pid)[1:2], signal.SIGKILL)
        await end_alike(made, tasks)
        await made.settled()


async def test_without_another_executor_a_stream_ends_in_one_clear_status(store: str, tmp_path: Path) -> None:
    async with fleet(store, tmp_path, 1, lambda address: address, "--failover-patience", "0.5") as made:
        _, tasks = await begun(made, 10)
        killed = time.monotonic()
        kill(tree(made.executors[0].process.pid), signal.SIGKILL)
        for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60):
            assert isinstance(result, grpc.aio.AioRpcError)
            error = from_rpc_error(result)
            assert (error.code, error.reason) == (14, "EXECUTOR_LOST")
            assert "nobody could go on with it: no executor has engine" in error.message
        assert time.monotonic() - killed < 30
        await made.settled([])


@pytest.mark.drill
@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "its front"])
async def test_a_stopped_executor_is_left_within_seconds(store: str, tmp_path: Path, whole: bool) -> None:
    """SIGSTOP: its connections stand, and nothing comes. What it had is cancelled there when it goes on."""
    async with fleet(store, tmp_path) as made:
        victim = made.executors[0]
        pids = tree(victim.process.pid) if whole else [victim.process.pid]
        _, tasks = await begun(made)
        kill(pids, signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            await asyncio.wait_for(asyncio.gather(*tasks), 60)
            assert time.monotonic() - stopped < 40
        finally:
            kill(pids, signal.SIGCONT)
        await end_alike(made, tasks)
        await made.ready(2)
        await made.settled()


@pytest.mark.drill
async def test_half_open_connections_are_left_within_seconds(store: str, tmp_path: Path) -> None:
    """The network between the gateway and one executor takes everything and delivers nothing."""
    made = Fleet(store, tmp_path)
    async with AsyncExitStack() as stack:
        stack.callback(made.close)
        valves = [Valve(made.add_executor().address) for _ in range(2)]
        made.add_gateway([await stack.enter_async_context(valve.served()) for valve in valves])
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(made.gateway.address))
        made.stub = gateway_pb2_grpc.GatewayStub(channel)
        await made.ready(2)
        _, tasks = await begun(made)
        valves[0].shut()
        await end_alike(made, tasks)
        valves[0].reopen()
        await made.ready(2)
        await made.settled()


@pytest.mark.drill
async def test_a_cable_that_is_cut_is_noticed_within_seconds(store: str, tmp_path: Path) -> None:
    """Between two network namespaces: connections stay half-open on both sides, by the kernel's own rules."""
    async with AsyncExitStack() as stack:
        try:
            elsewhere = Elsewhere(stack.enter_context(ExitStack()))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        made = Fleet(store, tmp_path)
        stack.callback(made.close)
        there = made.add_executor("--host", elsewhere.address, "--insecure", within=elsewhere.within)
        made.add_gateway([there.address, made.add_executor().address])
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(made.gateway.address))
        made.stub = gateway_pb2_grpc.GatewayStub(channel)
        await made.ready(2)
        _, tasks = await begun(made)
        elsewhere.cut()
        await end_alike(made, tasks)
        elsewhere.mend()
        await made.ready(2)
        await made.settled()


@pytest.mark.drill
async def test_faults_one_after_another_under_load_while_the_store_is_away(
    bucket: SeaweedFS, checkpoint: Path, tmp_path: Path
) -> None:
    """For half a minute there is no store, executors die in turn and come back, and clients go on asking."""
    store = open_store(bucket.url("failover"))
    registry.set_name(store, "tiny", build(checkpoint, store=store).manifest.engine_id)
    async with fleet(store.url, tmp_path, 3) as made:
        alone = await made.alone(range(20))
        counts = {"asked": 0}

        async def client(number: int, until: float) -> None:
            while time.monotonic() < until:
                counts["asked"] += 1
                (await follow(made.stub.Generate(request(number), timeout=60), Stream())).check(alone[number])

        bucket.stop(signal.SIGKILL)
        try:
            clients = [asyncio.create_task(client(number, time.monotonic() + 30)) for number in range(20)]
            for victim in made.executors:
                await asyncio.sleep(6)
                kill(tree(victim.process.pid)[1:2], signal.SIGKILL)  # its worker, whose files are in the store
                kill([victim.process.pid], signal.SIGSTOP)
                await asyncio.sleep(1)
                kill([victim.process.pid], signal.SIGCONT)
                if victim is made.executors[1]:
                    break  # the third one has to do it all
            await asyncio.wait_for(asyncio.gather(*clients), 120)
        finally:
            bucket.start()
        assert counts["asked"] > 40
        assert made.metric("gateway_streams_resumed_total") > 0
        await made.ready(3)
        await made.settled()


@pytest.mark.drill
async def test_clients_that_do_not_read_or_have_vanished_hold_nobody_up(store: str, tmp_path: Path) -> None:
    """Half of them leave everything unread; between the others and the gateway nothing comes through any more."""
    async with fleet(store, tmp_path) as made:
        alone = await made.alone(range(20))
        valve = Valve(made.gateway.address)
        with leaves_no_files(made.gateway.process.pid):
            async with (
                valve.served() as address,
                grpc.aio.insecure_channel(made.gateway.address, options=[("grpc.http2.bdp_probe", 0)]) as slow,
                grpc.aio.insecure_channel(address) as vanishing,
            ):
                calls = []
                for channel in (slow, vanishing):
                    for number in range(20):
                        wide = request(number)
                        wide.n = 16
                        wide.output.logprobs = 20  # more than a connection holds
                        calls.append(gateway_pb2_grpc.GatewayStub(channel).Generate(wide, timeout=20))
                readers = [call.__aiter__() for call in calls[20:]]
                await asyncio.gather(*(anext(reader) for reader in readers))
                valve.shut()
                for stream, expected in zip(await made.alone(range(20)), alone, strict=True):
                    stream.check(expected)
                ends = await asyncio.gather(*(follow(reader, Stream()) for reader in readers), return_exceptions=True)
                assert {end.code() for end in ends} == {grpc.StatusCode.DEADLINE_EXCEEDED}  # type: ignore[union-attr]
                await made.settled()  # nobody has read anything, and nothing of it is left
                for call in calls[:20]:
                    call.cancel()


def garbage(numbers: random.Random) -> bytes:
    """What no client sends: bytes, other protocols, HTTP/2 whose frames are wrong."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
    kind = numbers.randrange(5)
    if kind == 0:
        return numbers.randbytes(numbers.randrange(1, 5000))
    if kind == 1:
        return b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    if kind == 2:
        return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + numbers.randbytes(500)
    frames = b""
    for _ in range(numbers.randrange(1, 20)):
        payload = numbers.randbytes(numbers.randrange(60))
        length = len(payload) if numbers.random() < 0.8 else numbers.randrange(1 << 24)
        frames += length.to_bytes(3, "big") + bytes([numbers.randrange(12), numbers.randrange(256)])
        frames += numbers.randrange(1 << 31).to_bytes(4, "big") + payload
    return preface[: numbers.randrange(10, len(preface))] if kind == 3 else preface + frames


@pytest.mark.drill
async def test_garbage_ends_its_own_connection_alone(store: str, tmp_path: Path) -> None:
    numbers = random.Random(1)
    async with fleet(store, tmp_path) as made:
        alone = await made.alone(range(10))
        for target in (made.gateway, made.executors[0]):
            host, _, port = target.address.rpartition(":")
            with leaves_no_files(target.process.pid):
                busy = asyncio.create_task(made.alone(range(10)))
                sockets = []
                for _ in range(300):
                    client = socket.create_connection((host, int(port)), timeout=10)
                    sockets.append(client)
                    client.sendall(garbage(numbers))
                    if numbers.random() < 0.5:
                        client.close()
                    await asyncio.sleep(0)
                for stream, expected in zip(await busy, alone, strict=True):
                    stream.check(expected)
                for client in sockets:
                    client.close()
                await asyncio.sleep(1)
        for name in ("Generate", "Tokenize", "Detokenize", "ListModels"):
            async with grpc.aio.insecure_channel(made.gateway.address) as channel:
                call = channel.unary_stream(f"/enginehouse.v1.Gateway/{name}")
                for _ in range(100):
                    try:
                        async for _ in call(numbers.randbytes(numbers.randrange(1, 300)), timeout=60):
                            pass
                    except grpc.aio.AioRpcError as error:
                        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), error
        await made.settled()


@pytest.mark.drill
async def test_a_gateway_that_starts_again_finds_everything(store: str, tmp_path: Path) -> None:
    """Its streams end with it, in one status and at once; a client that sends them again has them whole."""
    async with fleet(store, tmp_path) as made:
        alone = await made.alone(range(10))
        _, tasks = await begun(made, 20)
        made.gateway.process.kill()
        ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert {end.code() for end in ends} == {grpc.StatusCode.UNAVAILABLE}  # type: ignore[union-attr]
        made.gateway.process.wait()
        executors = [executor.address for executor in made.executors]
        made.add_gateway(executors)
        await made.ready(2)
        for stream, expected in zip(await made.alone(range(10)), alone, strict=True):
            stream.check(expected)
        await made.settled()
