"""Services that are told to stop while streams run: what has begun ends well, nothing new is taken, and all is said."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from engine.errors import EnginehouseError
from protos.rpc import from_rpc_error
from protos.v1 import executor_pb2 as pb
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria, TokenIds
from protos.v1.executor_pb2_grpc import ExecutorStub
from protos.v1.gateway_pb2 import GenerateRequest, ListModelsRequest
from protos.v1.gateway_pb2_grpc import GatewayStub
from tests.integration.services import Service, service
from tests.memory import tree

STREAMS, TOKENS = 60, 220  # several batches of them: some wait


@pytest.fixture(scope="module")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = open_store(str(tmp_path_factory.mktemp("drain") / "store"))
    registry.set_name(made, "tiny", build(checkpoint, store=made).manifest.engine_id)
    return made.url


@pytest.fixture(scope="module")
def executor(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("executor") / "log"
    with service("executor_svc", log, "--store", store, "--engine", "tiny") as started:
        yield started


def submit(store: str, number: int) -> pb.Submit:
    return pb.Submit(
        engine_id=registry.resolve(open_store(store), "tiny").engine_id,
        token_ids=range(number + 2, number + 30),
        sampling=SamplingParams(temperature=1.0, seed=number),
        stopping=StoppingCriteria(max_tokens=TOKENS, ignore_eos=True),
    )


def generate(number: int, max_tokens: int = TOKENS) -> GenerateRequest:
    return GenerateRequest(
        model="tiny",
        token_ids=TokenIds(ids=range(number + 2, number + 30)),
        sampling=SamplingParams(temperature=1.0, seed=number),
        stopping=StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
    )


async def rest(call: Any) -> list[int]:
    tokens: list[int] = []
    while (part := await call.read()) is not grpc.aio.EOF:
        tokens += part.token_ids
    return tokens


async def end(call: Any) -> tuple[int, str]:
    """How many tokens came, and the reason for which it failed; empty if it did not."""
    count = 0
    try:
        while (part := await call.read()) is not grpc.aio.EOF:
            count += len(part.token_ids)
    except grpc.aio.AioRpcError as error:
        return count, from_rpc_error(error).reason
    return count, ""


async def error_of(call: Any) -> EnginehouseError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (rest(call) if hasattr(call, "read") else call)
    return from_rpc_error(caught.value)


async def health(channel: grpc.aio.Channel) -> int:
    return (await HealthStub(channel).Check(HealthCheckRequest())).status


async def ended(of: Service) -> int:
    return await asyncio.to_thread(of.process.wait, 60)


async def ready(gateway: GatewayStub) -> None:
    async with asyncio.timeout(60):
        while not (await gateway.ListModels(ListModelsRequest())).models[0].ready_executors:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_gateway_lets_its_streams_end(store: str, executor: Service, tmp_path: Path) -> None:
    arguments = ("--store", store, "--executor", executor.address)
    with service("gateway", tmp_path / "gateway.log", *arguments) as front:
        async with grpc.aio.insecure_channel(front.address) as channel:
            gateway = GatewayStub(channel)
            await ready(gateway)
            calls = [gateway.Generate(generate(number)) for number in range(STREAMS)]
            first = await calls[0].read()
            front.process.send_signal(signal.SIGTERM)
            found = await asyncio.gather(*(end(call) for call in calls))
            found[0] = (len(first.token_ids) + found[0][0], found[0][1])
            whole = [tokens for tokens, reason in found if not reason]
            assert whole == [TOKENS] * len(whole)
            assert found[0] == (TOKENS, "")
            assert {(tokens, reason) for tokens, reason in found if reason} <= {(0, "UNAVAILABLE"), (0, "CANCELLED")}
            assert await ended(front) == 0
            assert (await error_of(gateway.Generate(generate(1)))).code == 14
    with service("gateway", tmp_path / "again.log", *arguments, "--drain-seconds", "0") as front:
        async with grpc.aio.insecure_channel(front.address) as channel:
            gateway = GatewayStub(channel)
            await ready(gateway)
            calls = [gateway.Generate(generate(number)) for number in range(STREAMS)]
            await calls[0].read()
            front.process.send_signal(signal.SIGTERM)
            reasons = {(await asyncio.wait_for(end(call), 60))[1] for call in calls}
            assert "SERVICE_STOPPED" in reasons and reasons <= {"", "SERVICE_STOPPED", "UNAVAILABLE", "CANCELLED"}
            assert await ended(front) == 0


async def test_an_executor_ends_what_runs_and_takes_nothing_new(store: str, executor: Service, tmp_path: Path) -> None:
    arguments = ("--store", store, "--executor", executor.address)
    with service("gateway", tmp_path / "gateway.log", *arguments) as front:
        async with (
            grpc.aio.insecure_channel(front.address) as channel,
            grpc.aio.insecure_channel(executor.address) as beside,
        ):
            gateway, direct = GatewayStub(channel), ExecutorStub(beside)
            await ready(gateway)
            calls = [gateway.Generate(generate(number)) for number in range(STREAMS)]
            calls += [direct.Generate(submit(store, number)) for number in range(4)]
            first = await calls[0].read()
            worker = tree(executor.process.pid)[1]
            os.kill(worker, signal.SIGSTOP)  # so that nothing ends before it has been looked at
            executor.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                while not (status := await direct.GetStatus(pb.GetStatusRequest())).draining:
                    pass
            assert status.engines[0].state == pb.ENGINE_STATE_READY
            assert await health(beside) == HealthCheckResponse.NOT_SERVING
            refused = await error_of(direct.Generate(submit(store, 1)))
            assert (refused.code, refused.reason) == (14, "EXECUTOR_DRAINING")
            error = await error_of(direct.LoadEngine(pb.LoadEngineRequest(model="tiny")))
            assert error.reason == "EXECUTOR_DRAINING"
            late = await error_of(gateway.Generate(generate(1)))
            assert late.code == 14 and late.reason in ("ENGINE_NOT_READY", "EXECUTOR_DRAINING")
            os.kill(worker, signal.SIGCONT)
            found = await asyncio.gather(*(end(call) for call in calls))
            found[0] = (len(first.token_ids) + found[0][0], found[0][1])
            # whole, or refused before they began: those that were still on their way
            assert {reason for tokens, reason in found} <= {"", "ENGINE_NOT_READY", "EXECUTOR_DRAINING"}
            assert {tokens for tokens, reason in found if reason} <= {0}
            whole = [tokens for tokens, reason in found if not reason]
            assert whole == [TOKENS] * len(whole)
            assert found[0] == (TOKENS, "")
            assert await ended(executor) == 0
    assert "Traceback" not in executor.log.read_text()
