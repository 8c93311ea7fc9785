"""Executors that run engines together, each as a machine would: a process with ranks of its own."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from engine.errors import EnginehouseError
from executor_svc.core import Sampling, Sequence
from protos.rpc import from_rpc_error
from protos.v1 import executor_pb2 as pb
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2_grpc import ExecutorStub
from tests.integration.services import Service
from tests.running import Engine, make_engine

LIMITS = {"max_batch_size": 4, "max_seq_len": 112, "max_num_tokens": 24}
WITHIN = 30.0  # seconds in which all of a group have ended: at once, or 3 s after a network has gone silent
_PROMPT, _TOKENS = list(range(2, 40)), 60


def one_rank(checkpoint: Path, store: Path) -> list[int]:
    """What one rank gives, in this process."""
    one = Sequence(0, 0, list(_PROMPT), len(_PROMPT), _TOKENS, Sampling(0.8, seed=3))
    Engine(make_engine(checkpoint, store, **LIMITS)).run([one])
    return one.token_ids[len(_PROMPT) :]


def submit(engine_id: str) -> pb.Submit:
    sampling = SamplingParams(temperature=0.8, seed=3)
    stopping = StoppingCriteria(max_tokens=_TOKENS, ignore_eos=True)
    return pb.Submit(engine_id=engine_id, token_ids=_PROMPT, sampling=sampling, stopping=stopping)


async def tokens(stub: ExecutorStub, engine_id: str) -> list[int]:
    found: list[int] = []
    async with asyncio.timeout(60):
        async for output in stub.Generate(submit(engine_id)):
            found += output.token_ids
    return found


async def loaded(stub: ExecutorStub, engine_id: str) -> None:
    async with asyncio.timeout(60):
        async for _ in stub.LoadEngine(pb.LoadEngineRequest(engine_id=engine_id)):
            pass


async def ready(stub: ExecutorStub) -> None:
    """Waits for its engine."""
    async with asyncio.timeout(60):
        while True:
            engines = (await stub.GetStatus(pb.GetStatusRequest())).engines
            if engines and engines[0].state == pb.ENGINE_STATE_READY:
                return
            await asyncio.sleep(0.05)


async def begun(stub: ExecutorStub, engine_id: str) -> AsyncIterator[pb.StepOutput]:
    """The last of streams of which the first has begun: more than a batch has, so that it does not end for long."""
    first, *_, last = (aiter(stub.Generate(submit(engine_id))) for _ in range(5 * LIMITS["max_batch_size"]))
    await anext(first)
    return last


async def lost(call: AsyncIterator[pb.StepOutput]) -> EnginehouseError:
    """How a stream has ended whose engine is lost."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (14, "ENGINE_LOST") and "has ended" in error.message
    return error


def where_to_join(leader: Service) -> str:
    found = re.search(r"the others join it on (\S+)", leader.log.read_text())
    assert found
    return found[1]


def says(log: Path, what: str, seconds: float = 60) -> bool:
    """Whether a log has a text, or comes to have it."""
    until = time.monotonic() + seconds
    while what not in log.read_text():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def kill(machine: Service) -> None:
    """SIGKILL for its executor; the ranks hear of it from nobody but the system."""
    machine.process.kill()
    machine.process.wait()
