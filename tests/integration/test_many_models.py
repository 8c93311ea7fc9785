"""Several engines in one executor's memory: what fits, what makes room, a name that moves under load, an end without grace."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from engine.errors import EnginehouseError, ResourceExhausted
from engine.store import Store
from enginehouse import ExecutorClient
from executor_svc.budget import Budget, weights
from protos.rpc import from_rpc_error
from protos.v1 import executor_pb2 as pb
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria, TokenIds
from protos.v1.executor_pb2_grpc import ExecutorStub
from protos.v1.gateway_pb2 import GenerateRequest, ListModelsRequest
from protos.v1.gateway_pb2_grpc import GatewayStub
from tests.integration.services import Service, service

TOKENS = 200
UNLOADING = pb.EngineStatus(state=pb.ENGINE_STATE_UNLOADING)
MEMORY = 8_000_000  # bytes: two of the engines, with the KV caches that they would like, and not three


@dataclass(frozen=True)
class Running:
    executor: Service
    gateway: Service
    store: Store
    engines: tuple[str, str, str]


@pytest.fixture(scope="module")
def running(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("many")
    store = open_store(str(directory / "store"))
    engines = [build(checkpoint, BuildConfig(max_batch_size=size), store=store) for size in (8, 9, 10)]
    first, second, third = (made.manifest.engine_id for made in engines)
    registry.set_name(store, "tiny", first)
    arguments = ("--store", store.url, "--memory", f"{MEMORY}", "--drain-seconds", "0.05")
    with service("executor_svc", directory / "executor.log", *arguments, "--engine", "tiny") as executor:
        known = ("--store", store.url, "--executor", executor.address)
        with service("gateway", directory / "gateway.log", *known) as gateway:
            yield Running(executor, gateway, store, (first, second, third))


@pytest.fixture
async def executor(running: Running) -> AsyncIterator[ExecutorClient]:
    async with ExecutorClient(running.executor.address) as client:
        yield client


async def load(executor: ExecutorClient, engine: str, **options: Any) -> pb.EngineStatus:
    return [step async for step in executor.load(engine, **options)][-1].engine


async def loaded(executor: ExecutorClient) -> dict[str, pb.EngineStatus]:
    return {found.engine_id: found for found in (await executor.status()).engines}


def request(number: int) -> GenerateRequest:
    return GenerateRequest(
        model="tiny",
        token_ids=TokenIds(ids=range(number % 200 + 2, number % 200 + 30)),
        sampling=SamplingParams(temperature=1.0, seed=number),
        stopping=StoppingCriteria(max_tokens=TOKENS, ignore_eos=True),
    )


def submit(engine_id: str) -> pb.Submit:
    return pb.Submit(
        engine_id=engine_id,
        token_ids=range(2, 30),
        sampling=SamplingParams(temperature=1.0, seed=3),
        stopping=StoppingCriteria(max_tokens=TOKENS, ignore_eos=True),
    )


async def test_a_name_moves_under_load_and_no_stream_is_dropped(running: Running, executor: ExecutorClient) -> None:
    first, second, _ = running.engines
    async with grpc.aio.insecure_channel(running.gateway.address) as channel:
        gateway = GatewayStub(channel)
        async with asyncio.timeout(60):
            while not (await gateway.ListModels(ListModelsRequest())).models[0].ready_executors:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        stop = asyncio.Event()
        ended: list[int] = []

        async def client(number: int) -> None:
            while not stop.is_set():
                call = gateway.Generate(request(number))
                ended.append(sum([len(part.token_ids) async for part in call]))
                number += 10

        clients = [asyncio.create_task(client(number)) for number in range(6)]
        registry.set_name(running.store, "tiny", second)
        status = await load(executor, "tiny")  # the name's newest engine
        assert (status.engine_id, status.state) == (second, pb.ENGINE_STATE_READY)
        async with asyncio.timeout(60):  # until the gateway has moved
            while not (await loaded(executor))[second].load.running:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        async with grpc.aio.insecure_channel(running.executor.address) as beside:
            stub = ExecutorStub(beside)
            calls = [stub.Generate(submit(first)) for _ in range(20)]
            begun = list((await calls[0].read()).token_ids)  # of one of these, and not of what came by the gateway
            last = [asyncio.create_task(end(call)) for call in calls]
            unloading = asyncio.create_task(executor.unload(first, drain=60))
            async with asyncio.timeout(60):
                while (await loaded(executor)).get(first, UNLOADING).state != pb.ENGINE_STATE_UNLOADING:
                    pass
            _, refused = await end(stub.Generate(submit(first)))
            assert refused and refused.reason == "ENGINE_NOT_LOADED"
            (rest, error), *others = await asyncio.gather(*last)
            ends = [(begun + rest, error), *others]
            assert {(len(tokens), error and error.reason) for tokens, error in ends} <= {
                (TOKENS, None),
                (0, "ENGINE_NOT_LOADED"),
            }
            assert not ends[0][1]
            await unloading
        assert list(await loaded(executor)) == [second]
        before = len(ended)
        async with asyncio.timeout(60):
            while len(ended) < before + 6:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        stop.set()
        await asyncio.gather(*clients)
        assert ended == [TOKENS] * len(ended)


async def test_what_does_not_fit_is_refused_with_numbers_or_takes_the_place_of_what_was_used_longest_ago(
    running: Running, executor: ExecutorClient
) -> None:
    first, second, third = running.engines
    size = (await loaded(executor))[second].memory_bytes
    assert size > registry.manifest(running.store, second).weight_bytes()
    assert (await executor.status()).memory_limit_bytes == MEMORY
    with pytest.raises(ResourceExhausted, match="what --memory leaves is") as refused:
        await load(executor, third, kv_memory=MEMORY)
    assert refused.value.reason == "MEMORY_TOO_SMALL" and f"beside {second[:12]} (" in refused.value.message
    assert int(refused.value.metadata["free_bytes"]) == MEMORY - size
    status = await load(executor, third, kv_memory=MEMORY - size - 1_000_000)
    assert MEMORY - size - 1_100_000 < status.memory_bytes <= MEMORY - size
    with pytest.raises(ResourceExhausted, match="or load with --evict"):
        await load(executor, first, kv_memory=3_000_000)
    async with grpc.aio.insecure_channel(running.executor.address) as channel:
        stopping = StoppingCriteria(max_tokens=2, ignore_eos=True)
        stub = ExecutorStub(channel)
        used = pb.Submit(engine_id=second, token_ids=[5, 6, 7], stopping=stopping)
        assert [part async for part in stub.Generate(used)]
    await load(executor, first, kv_memory=3_000_000, evict=True)
    assert set(await loaded(executor)) == {second, first}


def test_the_check_counts_what_ranks_share(running: Running) -> None:
    manifest = registry.manifest(running.store, running.engines[0])
    sizes = weights(running.store, manifest, "cpu")
    whole, cache = manifest.weight_bytes(), manifest.limits.max_seq_len * manifest.model.kv_bytes_per_token
    Budget("cpu", whole + cache).check(manifest, sizes, None)
    with pytest.raises(ResourceExhausted, match="and the free main memory is") as refused:
        Budget("cpu", whole + cache - 1).check(manifest, sizes, None)
    assert refused.value.metadata == {"needed_bytes": f"{whole + cache}", "free_bytes": f"{whole + cache - 1}"}
    with pytest.raises(ResourceExhausted, match="the free GPU memory is"):
        Budget("cuda", whole).check(manifest, sizes, 1)


async def test_what_does_not_end_in_the_grace_can_go_on_elsewhere(running: Running) -> None:
    """The last test: it ends the executor."""
    request = submit(running.engines[1])
    async with grpc.aio.insecure_channel(running.executor.address) as channel:
        stub = ExecutorStub(channel)
        whole, _ = await end(stub.Generate(request))
        calls = [stub.Generate(request) for _ in range(60)]
        tokens = list((await calls[0].read()).token_ids)
        running.executor.process.send_signal(signal.SIGTERM)
        reasons = []
        for call in calls:
            more, error = await end(call)
            reasons.append(error and error.reason)
            tokens += more
            assert tokens == whole[: len(tokens)]  # what the next executor is told
            assert error or len(tokens) == TOKENS
            # gRPC itself ends calls that come in the server's last moment
            assert reasons[-1] in (None, "EXECUTOR_DRAINING") or (
                reasons[-1] in ("UNAVAILABLE", "CANCELLED") and not tokens
            )
            tokens = []
        assert "EXECUTOR_DRAINING" in reasons
    assert await asyncio.to_thread(running.executor.process.wait, 60) == 0


async def end(call: Any) -> tuple[list[int], EnginehouseError | None]:
    """The tokens that came, and how it failed."""
    tokens: list[int] = []
    try:
        while (part := await call.read()) is not grpc.aio.EOF:
            tokens += part.token_ids
    except grpc.aio.AioRpcError as error:
        return tokens, from_rpc_error(error)
    return tokens, None
