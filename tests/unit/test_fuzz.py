"""Ten thousand random and mutated messages to every service, spread over its methods; in `make drills` to each of its methods;
`make fuzz` sends a million.

Whatever comes, a call ends with a status that blames the message or the state of things, never with INTERNAL or UNKNOWN; no task
stays behind, and memory does not grow with the number of messages.
"""

import asyncio
import gc
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzz import Messages, Servicer
from gateway_harness import cluster
from google.protobuf.message import DecodeError, Message
from mock_executor import EOS, MockExecutor
from test_executor_intake import MANIFEST

from builder_svc.jobs import Jobs
from builder_svc.process import BuildProcess
from builder_svc.server import BuilderServicer
from engine import registry
from engine.directory import DirectoryStore
from engine.errors import EnginehouseError
from executor_svc.intake import to_beam_search, to_sequence
from executor_svc.launch import Spares
from executor_svc.server import ExecutorServicer
from gateway.admission import Limits
from protos.v1 import builder_pb2, executor_pb2, gateway_pb2
from protos.v1.builder_pb2_grpc import add_BuilderServicer_to_server
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria, TokenIds
from protos.v1.gateway_pb2_grpc import add_GatewayServicer_to_server

COUNT = int(os.environ.get("FUZZ_MESSAGES", "10000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
CRASHES = {"INTERNAL", "UNKNOWN"}
WARM_UP = 0.3  # of the messages, after which caches are full
MOST_GROWTH = 24.0  # MB from then on
MOST_SECONDS = 90  # of the processor, for ten thousand to each method of a service

GATEWAY = [
    gateway_pb2.GenerateRequest(model="demo", text="hello", stopping=StoppingCriteria(max_tokens=4)),
    gateway_pb2.GenerateRequest(model="demo", token_ids=TokenIds(ids=[5, 6]), n=2, stop=["x"], bad_words=["no"]),
    gateway_pb2.GenerateRequest(
        model="demo", chat=gateway_pb2.Chat(messages=[gateway_pb2.ChatMessage(role="user", content="hello")]), echo=True
    ),
]
SUBMITS = [
    executor_pb2.Submit(handle=1, engine_id="0" * 64, token_ids=[5, 6]),
    executor_pb2.Submit(
        handle=2, token_ids=[5], sampling=SamplingParams(temperature=0.5, top_p=0.9), resume_token_ids=[7], tenant="a"
    ),
    executor_pb2.Submit(handle=3, token_ids=[5], beam_search={"width": 2}, stopping={"max_tokens": 3}),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A line for each call would be most of the work; a traceback is told all the same."""
    logger = logging.getLogger("protos")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.fixture(params=["a service", pytest.param("a method", marks=pytest.mark.drill)])
def each(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether each method of a service gets COUNT messages, or all of them together."""
    began = time.process_time()
    yield request.param == "a method"
    if COUNT == 10_000:
        assert time.process_time() - began < MOST_SECONDS


async def fuzz(service: Servicer, words: Sequence[str], each: bool, good: Sequence[Message] = ()) -> Counter[str]:
    """Sends COUNT messages, to `each` method or to each its share; how many ended with which status."""
    ends: Counter[str] = Counter()
    kinds = {method: service.kind(method) for method in service.methods}
    known = {method: [each for each in good if isinstance(each, kind)] for method, kind in kinds.items()}
    for method, messages in known.items():  # after which connections stand
        for message in messages:
            await service.call(method, message.SerializeToString())
    tasks, memory = asyncio.all_tasks(), 0.0
    rounds = -(-COUNT // (1 if each else len(kinds)))
    for number in range(rounds):
        if number == int(rounds * WARM_UP):
            memory = resident()
        made = Messages(SEED * 1_000_003 + number, words)
        for method, kind in kinds.items():
            data = [made.data(kind, known[method]) for _ in range(1 + number % 3)]
            status = await asyncio.wait_for(service.call(method, *data), 60)
            assert status not in CRASHES, f"{method} ended with {status}: FUZZ_SEED={SEED}, message {number}: {data!r}"
            ends[status] += 1
    await settled(tasks)
    gc.collect()
    assert resident() - memory < MOST_GROWTH
    return ends


async def settled(before: set[asyncio.Task[Any]]) -> None:
    """Returns when as many tasks run as before; fails with those that are too many."""
    deadline = time.monotonic() + 60
    while len(tasks := asyncio.all_tasks()) > len(before):
        assert time.monotonic() < deadline, tasks - before
        await asyncio.sleep(0.01)


def resident() -> float:
    """MB of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def answer(executor: MockExecutor) -> None:
    """Gives each request that reaches the executor a token and its end."""
    while True:
        submit = await executor.submits.get()
        executor.begin(submit.handle)
        executor.tokens(submit.handle, [5], EOS)


async def test_gateway(tmp_path: Path, each: bool) -> None:
    async with cluster(tmp_path, limits=Limits(max_streams=4, max_waiting=4, max_prompt_bytes=10_000)) as made:
        answers = asyncio.create_task(answer(made.executor))
        service = Servicer(lambda server: add_GatewayServicer_to_server(made.gateway, server), gateway_pb2)
        ends = await fuzz(service, ["demo", made.engine_id], each, GATEWAY)
        answers.cancel()
        assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= ends.keys()
        assert made.gateway._admission._running == made.gateway._admission._num_waiting == 0


async def test_builder(tmp_path: Path, each: bool) -> None:
    (tmp_path / "models").mkdir()
    store = DirectoryStore(tmp_path / "store")
    jobs = Jobs(store, BuildProcess(), 1)
    servicer = BuilderServicer(jobs, store, tmp_path / "models", tmp_path / "spool")
    service = Servicer(lambda server: add_BuilderServicer_to_server(servicer, server), builder_pb2)
    ends = await fuzz(service, ["demo", "other"], each)
    await jobs.close()
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= ends.keys()
    assert registry.names(store) == []


async def test_executor(tmp_path: Path, each: bool) -> None:
    """Its front; no engine is loaded."""
    servicer = ExecutorServicer(str(tmp_path), "cpu", Spares([]))
    service = Servicer(servicer.register, executor_pb2)
    good = [*SUBMITS, *(executor_pb2.Command(submit=submit) for submit in SUBMITS)]
    ends = await fuzz(service, ["demo"], each, good)
    await servicer.close()
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"} <= ends.keys()
    assert servicer._clients == {}


def test_what_a_worker_makes_of_a_submit() -> None:
    """Behind the front: what an engine's worker checks of each message."""
    taken = 0
    for number in range(COUNT):
        data = Messages(SEED * 1_000_003 + number, ["a"]).data(executor_pb2.Submit, SUBMITS)
        try:
            submit = executor_pb2.Submit.FromString(data)
            sequence: Any = to_sequence(1, submit, MANIFEST)
            to_beam_search(submit)
        except (DecodeError, EnginehouseError):
            continue
        assert sequence.max_tokens <= MANIFEST.limits.max_seq_len and all(0 <= i < 100 for i in sequence.token_ids)
        taken += 1
    assert taken > COUNT / 100
