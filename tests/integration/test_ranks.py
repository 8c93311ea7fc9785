"""Engines of several ranks in an executor process and its workers: one rank's tokens, and the end of one is the end of all."""

import asyncio
import os
import random
import re
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from engine.blobs import blob_key
from engine.store import Store
from protos.rpc import from_rpc_error
from protos.v1 import executor_pb2 as pb
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2_grpc import ExecutorStub
from tests.integration.llm_harness import gone
from tests.integration.services import Service, service

SHAPES = {"tp 2": (2, 1), "pp 2": (1, 2), "tp 2 x pp 2": (2, 2)}
LIMITS = {"max_batch_size": 6, "max_seq_len": 112, "max_num_tokens": 24}  # so that prompts are computed in pieces
KV_MEMORY = 112_000  # bytes a rank: 7 blocks of the whole model, which one sequence may need, and up to 21 of a quarter
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=0.8, seed=8, top_k=40, top_p=0.9),
    SamplingParams(temperature=0.0, repetition_penalty=1.3),
)


@dataclass
class Running:
    service: Service
    store: Store
    engines: dict[str, str]

    def workers(self) -> list[int]:
        """The ranks' processes, in order."""
        pid = self.service.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def preemptions(self, engine_id: str) -> int:
        page = (
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.service.metrics, timeout=10).read()
        )
        found = re.search(rf'executor_preemptions_total{{engine="{engine_id[:12]}"}} (\d+)', page.decode())
        assert found
        return int(found[1])


@pytest.fixture(scope="module")
def running(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("ranks")
    store = open_store(str(directory / "store"))
    engines = {
        name: build(checkpoint, BuildConfig(tp_size=tp, pp_size=pp, **LIMITS), store=store).manifest.engine_id
        for name, (tp, pp) in {"alone": (1, 1), **SHAPES}.items()
    }
    options = ("--store", store.url, "--kv-memory", str(KV_MEMORY), "--metrics-port", "0")
    with service("executor_svc", directory / "log", *options) as started:
        yield Running(started, store, engines)


@pytest.fixture
async def stub(running: Running) -> AsyncIterator[ExecutorStub]:
    async with grpc.aio.insecure_channel(running.service.address) as channel:
        yield ExecutorStub(channel)


def submits(engine_id: str) -> list[pb.Submit]:
    """More sequences than there are blocks for, of every kind."""
    draw = random.Random(5)
    made = []
    for number in range(12):
        prompt = [draw.randrange(2, 300) for _ in range(draw.randrange(3, 60))]
        stopping = StoppingCriteria(max_tokens=50, ignore_eos=True)
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        made.append(pb.Submit(engine_id=engine_id, token_ids=prompt, sampling=sampling, stopping=stopping))
    made[1].output.logprobs = 2
    made[2].output.prompt_logprobs = 1
    beams = pb.Submit(engine_id=engine_id, token_ids=made[3].token_ids, stopping=StoppingCriteria(max_tokens=8))
    beams.beam_search.width = 2
    return [*made, beams]


@dataclass
class Told:
    tokens: list[int]
    logprobs: list[float]


async def told(stub: ExecutorStub, submit: pb.Submit) -> Told:
    found = Told([], [])
    async for output in stub.Generate(submit):
        found.tokens += [*output.token_ids, *(token for one in output.hypotheses for token in one.token_ids)]
        found.logprobs += [*output.logprobs.logprobs, *output.prompt_logprobs.logprobs]
        found.logprobs += [one.score for one in output.hypotheses]
    return found


async def loaded(stub: ExecutorStub, engine_id: str) -> None:
    async with asyncio.timeout(60):
        async for _ in stub.LoadEngine(pb.LoadEngineRequest(engine_id=engine_id)):
            pass


async def answers(running: Running, stub: ExecutorStub, name: str) -> list[Told]:
    """Of all requests at once."""
    engine_id = running.engines[name]
    await loaded(stub, engine_id)
    async with asyncio.timeout(60):
        found = await asyncio.gather(*(told(stub, submit) for submit in submits(engine_id)))
    for _ in range(1200):  # the worker tells what it has counted when it is idle
        if running.preemptions(engine_id):
            break
        await asyncio.sleep(0.05)
    assert running.preemptions(engine_id), "there were blocks for all of them"
    return found


async def test_several_ranks_give_the_tokens_of_one(running: Running, stub: ExecutorStub) -> None:
    alone = await answers(running, stub, "alone")
    assert all(len(one.tokens) == 50 for one in alone[:-1]) and len(alone[-1].tokens) == 16
    await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=running.engines["alone"]))
    for name, (tp, pp) in SHAPES.items():
        found = await answers(running, stub, name)
        assert len(running.workers()) == tp * pp
        assert [one.tokens for one in found] == [one.tokens for one in alone], name
        assert sum(len(one.logprobs) for one in found) > 50
        for one, other in zip(found, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4), name
        await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=running.engines[name]))
        assert not running.workers(), "all ranks end"


@pytest.mark.parametrize(("name", "rank"), [("tp 2", 1), pytest.param("pp 2", 0, marks=pytest.mark.drill)])
async def test_a_rank_that_dies_ends_the_streams_and_all_come_back(
    running: Running, stub: ExecutorStub, name: str, rank: int
) -> None:
    engine_id = running.engines[name]
    await loaded(stub, engine_id)
    before = running.workers()
    submit = submits(engine_id)[0]
    first, *_, last = (aiter(stub.Generate(submit)) for _ in range(20))  # the last waits for blocks
    await anext(first)
    killed = time.monotonic()
    os.kill(before[rank], signal.SIGKILL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in last:
            pass
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (14, "ENGINE_LOST") and "has ended" in error.message
    assert not set(before) & set(running.workers()), "the others have ended with it"
    assert time.monotonic() - killed < 5
    async with asyncio.timeout(60):
        while True:
            engines = (await stub.GetStatus(pb.GetStatusRequest())).engines
            if engines and engines[0].state == pb.ENGINE_STATE_READY:
                break
            await asyncio.sleep(0.1)
    assert len((await told(stub, submit)).tokens) == 50
    await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=engine_id))


async def test_a_load_of_several_ranks_can_be_called_off(running: Running, stub: ExecutorStub) -> None:
    engine_id = running.engines["tp 2"]
    loading = stub.LoadEngine(pb.LoadEngineRequest(engine_id=engine_id))
    while len(running.workers()) < 2:
        await loading.read()
    await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=engine_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await loading.read() is not grpc.aio.EOF:
            pass
    assert from_rpc_error(caught.value).reason == "ENGINE_UNLOADED"
    assert not running.workers()


async def test_what_one_rank_cannot_load_is_told_and_ends_all(running: Running, stub: ExecutorStub) -> None:
    manifest = registry.manifest(running.store, running.engines["pp 2"])
    (file,) = set(manifest.ranks[1].weights) - set(manifest.ranks[0].weights)
    running.store.replace(blob_key(file.digest), b"short")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loaded(stub, running.engines["pp 2"])
    assert from_rpc_error(caught.value).reason == "OBJECT_TRUNCATED"
    assert not running.workers()


async def test_a_killed_front_leaves_no_rank(running: Running, stub: ExecutorStub) -> None:
    """The last test of this module: it ends the service."""
    await loaded(stub, running.engines["tp 2"])
    workers = running.workers()
    assert len(workers) == 2
    os.kill(running.service.process.pid, signal.SIGKILL)
    assert gone(workers)
