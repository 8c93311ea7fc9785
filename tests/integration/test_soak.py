"""Random arrivals, lengths, cancellations and disconnects, through the gateway, on a cache that is too small for them all.

Every request is one of a few (prompt, settings) with another max_tokens; what it must say is a prefix of what that one says when
it runs alone. So a token that is lost, doubled or of somebody else shows.
"""

import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from protos.v1 import executor_pb2, executor_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from protos.v1.common_pb2 import FinishReason, SamplingParams, StoppingCriteria, TokenIds
from tests.integration.services import Service, service

KINDS, LONGEST = 12, 60


@pytest.fixture
def addresses(checkpoint: Path, tmp_path: Path) -> object:
    """A gateway and one executor whose cache holds two and a half of the longest sequences."""
    url = str(tmp_path / "store")
    store = open_store(url)
    manifest = build(
        checkpoint, BuildConfig(max_seq_len=160, max_batch_size=16, max_num_tokens=48), store=store
    ).manifest
    registry.set_name(store, "tiny", manifest.engine_id)
    memory = str(25 * 16 * manifest.model.kv_bytes_per_token)
    with ExitStack() as stack:

        def start(package: str, *arguments: str) -> Service:
            return stack.enter_context(service(package, tmp_path / f"{package}.log", "--store", url, *arguments))

        executor = start("executor_svc", "--engine", "tiny", "--kv-memory", memory)
        yield executor.address, start("gateway", "--executor", executor.address).address


def request(kind: int, max_tokens: int) -> gateway_pb2.GenerateRequest:
    """Prompts share prefixes; every second is sampled."""
    numbers = random.Random(kind)
    prompt = [5 + kind % 3] * 20 + [numbers.randrange(2, 300) for _ in range(numbers.randrange(1, 70))]
    sampling = (
        SamplingParams(temperature=0) if kind % 2 else SamplingParams(temperature=1.0, top_k=40, top_p=0.9, seed=kind)
    )
    stopping = StoppingCriteria(max_tokens=max_tokens, ignore_eos=True)
    return gateway_pb2.GenerateRequest(
        model="tiny", token_ids=TokenIds(ids=prompt), sampling=sampling, stopping=stopping
    )


async def settled(executor: executor_pb2_grpc.ExecutorStub) -> executor_pb2.EngineLoad:
    """The engine's load once nothing runs."""
    for _ in range(1200):
        load = (await executor.GetStatus(executor_pb2.GetStatusRequest())).engines[0].load
        if not load.running and not load.waiting:
            break
        await asyncio.sleep(0.05)
    return load


async def soak(executor_address: str, gateway_address: str, count: int, at_once: int, seed: int = 0) -> None:
    numbers = random.Random(seed)
    async with (
        grpc.aio.insecure_channel(gateway_address) as channel,
        grpc.aio.insecure_channel(executor_address) as direct,
    ):
        gateway, executor = gateway_pb2_grpc.GatewayStub(channel), executor_pb2_grpc.ExecutorStub(direct)
        for _ in range(600):
            if (await gateway.ListModels(gateway_pb2.ListModelsRequest())).models[0].ready_executors:
                break
            await asyncio.sleep(0.1)
        alone = {
            kind: [token async for part in gateway.Generate(request(kind, LONGEST)) for token in part.token_ids]
            for kind in range(KINDS)
        }
        assert all(len(text) == LONGEST for text in alone.values())
        gate = asyncio.Semaphore(at_once)

        async def one(kind: int, max_tokens: int, fate: str, after: int) -> str:
            async with gate:
                own = grpc.aio.insecure_channel(gateway_address) if fate == "disconnect" else None
                stub = gateway_pb2_grpc.GatewayStub(own) if own else gateway
                got: list[int] = []
                finishes = []
                call = stub.Generate(request(kind, max_tokens))
                try:
                    async for part in call:
                        assert not finishes, "a message after the finish"
                        got += part.token_ids
                        if part.HasField("finish"):
                            finishes.append(part.finish.reason)
                        if fate != "finish" and len(got) >= after and not finishes:
                            if own:
                                await own.close()
                            else:
                                call.cancel()
                            break
                except (asyncio.CancelledError, grpc.aio.AioRpcError):
                    assert fate != "finish", "an undisturbed request failed"
                assert got == alone[kind][: len(got)]
                if fate == "finish":
                    assert finishes == [FinishReason.FINISH_REASON_LENGTH] and len(got) == max_tokens
                if own:
                    await own.close()
                return fate

        tasks = []
        for _ in range(count):
            fate = numbers.choice(["finish", "finish", "finish", "cancel", "disconnect"])
            tasks.append(
                asyncio.create_task(
                    one(numbers.randrange(KINDS), numbers.randrange(1, LONGEST + 1), fate, numbers.randrange(0, 40))
                )
            )
            await asyncio.sleep(numbers.expovariate(1 / 0.01))
        fates = await asyncio.gather(*tasks)
        assert {"finish", "cancel", "disconnect"} == set(fates)
        load = await settled(executor)
        assert (load.running, load.waiting, load.queued_tokens) == (0, 0, 0)
        assert load.free_kv_blocks == load.total_kv_blocks == 25


async def test_five_hundred_random_requests(addresses: tuple[str, str]) -> None:
    await soak(*addresses, count=500, at_once=64)
