"""Streams that go on at another executor: nothing lost, nothing twice, and nobody notices."""

import asyncio
import random
from collections import deque
from pathlib import Path

import grpc
import pytest
from gateway_harness import Cluster, byte_level, cluster, collect, eventually, failure
from mock_executor import EOS, MockExecutor

from engine.errors import FailedPrecondition, Internal, ResourceExhausted, Unavailable
from gateway.circuit import CLOSED, HALF_OPEN, OPEN, Circuit
from gateway.failover import MOST_TRIES, Budget
from protos.v1.common_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    BeamSearch,
    FinishInfo,
    Hypothesis,
    Logprobs,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
)
from protos.v1.executor_pb2 import EngineLoad, EngineLost, StepOutput, Submit

LENGTH = FinishInfo(reason=FINISH_REASON_LENGTH)
LOST = Unavailable("the worker has ended by SIGKILL", reason="ENGINE_LOST")


def encode(text: str) -> list[int]:
    return byte_level().encode(text, add_special_tokens=False).ids


async def next_submit(c: Cluster) -> tuple[MockExecutor, Submit]:
    """The next request, and who got it."""
    await eventually(lambda: any(executor.submits.qsize() for executor in c.executors), 60)
    executor = next(executor for executor in c.executors if executor.submits.qsize())
    return executor, executor.submits.get_nowait()


def lose_engine(executor: MockExecutor, engine_id: str) -> None:
    """Its worker dies."""
    from protos.rpc import to_failure

    executor.ready = []
    executor.send(StepOutput(engine_lost=EngineLost(engine_id=engine_id, failure=to_failure(LOST))))


@pytest.mark.parametrize("how", ["stream ended", "stream broken", "worker died"])
async def test_a_stream_goes_on_elsewhere_as_if_nothing_had_happened(tmp_path: Path, how: str) -> None:
    """The seam cuts a character and a stop string in two."""
    tokens = encode("the quick 🦊 brown fox says hello")
    cut = next(n for n in range(len(tokens)) if byte_level().decode(tokens[:n]).endswith("\ufffd"))
    async with cluster(tmp_path, executors=2) as c:
        call = c.generate(
            stop=["hello"],
            output=OutputOptions(logprobs=0, prompt_logprobs=0),
            sampling=SamplingParams(seed=7),
            stopping=StoppingCriteria(max_tokens=60, min_tokens=3),
        )
        first, submit = await next_submit(c)
        first.begin(submit.handle, cached_tokens=1)
        first.prompt_logprobs(submit.handle, Logprobs(logprobs=[-7.0]))
        for number, token in enumerate(tokens[:cut]):
            first.tokens(submit.handle, [token], None, Logprobs(logprobs=[-float(number)]))
        await eventually(lambda: len(inbox_tokens(c)) == cut)
        if how == "worker died":
            lose_engine(first, c.engine_id)
        else:
            first.hang_up(grpc.StatusCode.OK if how == "stream ended" else grpc.StatusCode.UNAVAILABLE)
        second, again = await next_submit(c)
        assert second is not first
        assert list(again.resume_token_ids) == tokens[:cut]
        assert again.sampling == submit.sampling and again.stopping == submit.stopping
        assert again.token_ids == submit.token_ids and again.request_id == submit.request_id
        assert again.output == OutputOptions(logprobs=0)
        second.begin(again.handle, cached_tokens=0)
        for number, token in enumerate(tokens[cut:], cut):
            second.tokens(again.handle, [token], None, Logprobs(logprobs=[-float(number)]))
        text, ids, logprobs, last = "", [], [], None
        while (response := await asyncio.wait_for(call.read(), 60)) is not grpc.aio.EOF:
            assert len(response.logprobs.logprobs) == len(response.token_ids)
            text, last = text + response.text, response
            ids += response.token_ids
            logprobs += response.logprobs.logprobs
        assert text == "the quick 🦊 brown fox says "
        assert ids == tokens[: len(ids)] and logprobs == [-float(number) for number in range(len(ids))]
        assert last and last.finish == FinishInfo(reason=FINISH_REASON_STOP, stop_string="hello")
        assert last.usage.completion_tokens == len(ids) and last.usage.cached_tokens == 1
        await eventually(lambda: not any(link._inboxes or +link._inboxes.live for link in c.router.links))


def inbox_tokens(c: Cluster) -> list[int]:
    """Of the only request."""
    found = [inbox for link in c.router.links for inbox in link._inboxes._inboxes.values()]
    return found[0].token_ids if found else []


async def test_every_completion_goes_on_by_itself(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        call = c.generate(n=3, sampling=SamplingParams(seed=1))
        first, submit = await next_submit(c)
        first.begin(submit.handle)
        sent = [(first, submit), await next_submit(c), await next_submit(c)]
        for executor, each in sent:
            executor.begin(each.handle)
            executor.tokens(each.handle, encode("abc")[: each.sampling.seed])
        found = {index: list(part.token_ids) for part in [await call.read() for _ in sent] for index in [part.index]}
        assert found == {number: encode("abc")[: number + 1] for number in range(3)}
        for executor in c.executors:
            if executor in [which for which, _ in sent]:
                executor.hang_up()
        again = [await next_submit(c) for _ in sent]
        for executor, each in again:
            seed = each.sampling.seed
            assert list(each.resume_token_ids) == found[seed - 1]
            executor.tokens(each.handle, [40 + seed], LENGTH)
        ends = [await call.read() for _ in sent]
        assert {part.index: list(part.token_ids) for part in ends} == {number: [41 + number] for number in range(3)}
        assert ends[-1].usage.completion_tokens == 9
        assert await call.read() is grpc.aio.EOF


async def test_a_beam_search_begins_again_whole(tmp_path: Path) -> None:
    """Of one that has not ended nothing has been told."""
    async with cluster(tmp_path, executors=2) as c:
        call = c.generate(beam_search=BeamSearch(width=2))
        first, submit = await next_submit(c)
        first.begin(submit.handle)
        first.hang_up()
        second, again = await next_submit(c)
        assert not again.resume_token_ids and again.beam_search == submit.beam_search and second is not first
        second.beams(again.handle, [Hypothesis(token_ids=encode("fox"), finish=EOS)], EOS)
        assert (await collect(call))[0] == "fox"


async def test_half_told_log_probabilities_of_a_prompt_are_refused_in_words(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        call = c.generate(output=OutputOptions(prompt_logprobs=0))
        first, submit = await next_submit(c)
        first.prompt_logprobs(submit.handle, Logprobs(logprobs=[-7.0]))
        assert list((await call.read()).prompt_logprobs.logprobs) == [-7.0]
        first.hang_up()
        error = await failure(call)
        assert (error.code, error.reason) == (14, "EXECUTOR_LOST")
        assert "because part of the prompt's log-probabilities has been told" in error.message


async def test_a_full_executor_is_passed_by_and_all_of_them_are_told(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=3) as c:
        full = ResourceExhausted("9 requests are waiting", reason="QUEUE_FULL", retry_after=2)
        call = c.generate()
        asked = []
        for _ in range(2):
            executor, submit = await next_submit(c)
            asked.append(executor)
            executor.fail(submit.handle, full)
        last, submit = await next_submit(c)
        assert len({*asked, last}) == 3
        last.tokens(submit.handle, [5], LENGTH)
        assert (await collect(call))[1] == [5]
        call = c.generate()
        for _ in range(3):
            executor, submit = await next_submit(c)
            executor.fail(submit.handle, full)
        error = await failure(call)
        assert (error.reason, error.retry_after) == ("QUEUE_FULL", 2)


@pytest.mark.parametrize("reason", ["QUEUE_FULL", "GUIDED_DECODING_BUSY"])
async def test_a_stream_that_has_begun_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr("gateway.failover._LONGEST_PAUSE", 0.02)
    full = ResourceExhausted("9 requests are waiting", reason=reason, retry_after=2)
    async with cluster(tmp_path, executors=2) as c:
        call = c.generate()
        executor, submit = await next_submit(c)
        executor.tokens(submit.handle, [5])
        assert list((await call.read()).token_ids) == [5]
        executor.fail(submit.handle, LOST)
        for _ in range(3 * MOST_TRIES):
            executor, submit = await next_submit(c)
            executor.fail(submit.handle, full)
        executor, submit = await next_submit(c)
        assert list(submit.resume_token_ids) == [5]
        c.gateway._failover.patience = 0
        executor.fail(submit.handle, full)
        error = await failure(call)
        assert error.reason == reason and "no executor has had room for it" in error.message


async def test_what_another_executor_would_refuse_too_is_not_sent_again(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        for refusal in (FailedPrecondition("no", reason="X"), Internal("a bug")):
            call = c.generate()
            executor, submit = await next_submit(c)
            executor.fail(submit.handle, refusal)
            assert (await failure(call)).message == refusal.message
        assert all(executor.submits.empty() for executor in c.executors)


async def test_what_kills_executors_kills_only_some(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=MOST_TRIES + 2) as c:
        call = c.generate()
        killed = []
        for _ in range(MOST_TRIES):
            executor, _ = await next_submit(c)
            killed.append(executor)
            lose_engine(executor, c.engine_id)
        error = await failure(call)
        assert error.reason == "ENGINE_LOST" and f"{MOST_TRIES} executors in a row have failed it" in error.message
        assert len({id(executor) for executor in killed}) == MOST_TRIES
        assert all(executor.submits.empty() for executor in c.executors)


async def test_new_tokens_make_a_new_beginning(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=4) as c:
        c.gateway._failover.budget._left = 0  # a stream that moves on with new tokens needs none
        call = c.generate(stopping=StoppingCriteria(max_tokens=50))
        told: list[int] = []
        for number in range(2 * MOST_TRIES):
            executor, submit = await next_submit(c)
            assert list(submit.resume_token_ids) == told
            executor.tokens(submit.handle, [30 + number])
            told += (await call.read()).token_ids
            executor.fail(submit.handle, LOST)
        executor, submit = await next_submit(c)
        executor.tokens(submit.handle, [], LENGTH)
        assert (await collect(call))[2].usage.completion_tokens == 2 * MOST_TRIES


async def test_without_a_budget_nothing_is_sent_again(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        budget = c.gateway._failover.budget
        budget._left, budget.RATE, budget.SHARE = 1.0, 0.0, 0.0
        calls = [c.generate() for _ in range(2)]
        sent = [await next_submit(c) for _ in calls]
        for executor, submit in sent:
            executor.fail(submit.handle, LOST)
        executor, submit = await next_submit(c)
        executor.tokens(submit.handle, [5], LENGTH)
        results = await asyncio.gather(*map(collect, calls), return_exceptions=True)
        failed = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert len(failed) == 1 and "so many requests have failed lately" in (failed[0].details() or "")


async def test_a_request_waits_for_its_only_executor_to_come_back(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate()
        submit = await c.executor.submitted()
        c.executor.tokens(submit.handle, [5])
        assert list((await call.read()).token_ids) == [5]
        await c.executor.stop()
        await c.ready(0)
        await c.executor.start()
        again = await c.executor.submitted()
        assert list(again.resume_token_ids) == [5]
        c.executor.tokens(again.handle, [6], LENGTH)
        assert (await collect(call))[1] == [6]


async def test_a_deadline_holds_while_nobody_can_go_on(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(timeout=2.0)
        await c.executor.submitted()
        lose_engine(c.executor, c.engine_id)
        assert (await failure(call)).code == 4


async def test_a_client_that_leaves_while_its_request_waits_leaves_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate()
        await c.executor.submitted()
        lose_engine(c.executor, c.engine_id)
        await c.ready(0)
        call.cancel()
        c.executor.ready = [c.engine_id]
        await c.ready(1)
        await asyncio.sleep(0.5)
        assert c.executor.submits.empty()


async def test_an_executor_that_fails_again_and_again_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.circuit._FIRST_PAUSE", 600.0)
    async with cluster(tmp_path, executors=2) as c:
        bad = c.executors[0]
        bad_link, good_link = c.router.links
        failures = 0
        for _ in range(40):
            call = c.generate()
            executor, submit = await next_submit(c)
            if executor is bad:
                failures += 1
                executor.fail(submit.handle, LOST)
                executor, submit = await next_submit(c)
            assert executor is not bad
            executor.tokens(submit.handle, [5], LENGTH)
            await collect(call)
        assert failures == 3 and bad_link.circuits[c.engine_id].state == OPEN
        bad_link.circuits[c.engine_id]._until = 0.0  # its pause is over
        good_link._loads[c.engine_id] = EngineLoad(engine_id=c.engine_id, waiting=9)
        call = c.generate()
        executor, submit = await next_submit(c)
        assert executor is bad and bad_link.circuits[c.engine_id].state == OPEN  # a second one waits for its end
        executor.tokens(submit.handle, [5], LENGTH)
        await collect(call)
        assert bad_link.circuits[c.engine_id].state == CLOSED


async def test_a_stream_that_its_stop_string_ends_closes_a_circuit(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        (link,) = c.router.links
        circuit = link.circuits[c.engine_id] = Circuit()
        for _ in range(3):
            circuit.failed()
        circuit._until = 0.0  # its pause is over
        call = c.generate(stop=["hello"])
        executor, submit = await next_submit(c)
        assert circuit.state == OPEN
        executor.tokens(submit.handle, encode("hello"))  # of whose end the executor is told, and does not tell
        await collect(call)
        assert circuit.state == CLOSED


async def test_a_connection_that_is_lost_under_many_streams_is_one_failure(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        calls = [c.generate() for _ in range(5)]
        sent = [await next_submit(c) for _ in calls]
        c.executor.hang_up()
        sent = [await next_submit(c) for _ in calls]
        (link,) = c.router.links
        assert link.circuits[c.engine_id]._failures == 1
        for executor, submit in sent:
            executor.tokens(submit.handle, [5], LENGTH)
        for call in calls:
            await collect(call)


async def test_an_executor_that_says_nothing_any_more_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.link._POLL_INTERVAL", 0.05)
    monkeypatch.setattr("gateway.link._STATUS_TIMEOUT", 2.0)
    async with cluster(tmp_path, executors=2) as c:
        call = c.generate()
        first, submit = await next_submit(c)
        first.answers.clear()
        for _ in range(60):  # as long as steps come, somebody is there
            first.tokens(submit.handle, [5])
            assert list((await call.read()).token_ids) == [5]
            await asyncio.sleep(0.05)
        await c.ready(1)
        assert first.streams == 1 and all(executor.submits.empty() for executor in c.executors)
        second, again = await next_submit(c)
        assert second is not first and list(again.resume_token_ids) == [5] * 60
        second.tokens(again.handle, [6], LENGTH)
        assert (await collect(call))[1] == [6]
        first.answers.set()
        await c.ready(2)


async def test_nothing_is_left_of_streams_that_moved(tmp_path: Path) -> None:
    async def answer() -> None:
        while True:  # some are sent to one that ends its stream meanwhile, and then again
            executor, submit = await next_submit(c)
            executor.tokens(submit.handle, [5], LENGTH)

    async with cluster(tmp_path, executors=2) as c:
        tasks = []
        for _ in range(4):
            calls = [c.generate(n=2) for _ in range(5)]
            for _ in range(10):  # the second of each follows when the first has begun
                executor, submit = await next_submit(c)
                executor.begin(submit.handle)
            for executor in c.executors:
                executor.hang_up()
            answering = asyncio.create_task(answer())
            for call in calls:
                for _ in range(2):
                    part = await asyncio.wait_for(call.read(), 60)
                    assert (part.finish, list(part.token_ids)) == (LENGTH, [5])
                assert await asyncio.wait_for(call.read(), 60) is grpc.aio.EOF
            answering.cancel()
            await c.ready(2)
            await eventually(lambda: not any(link._inboxes or +link._inboxes.live for link in c.router.links))
            assert not any(+link._inboxes.queued_tokens for link in c.router.links)
            await asyncio.sleep(0.3)
            tasks.append(len(asyncio.all_tasks()))
        await eventually(lambda: len(asyncio.all_tasks()) < tasks[0] + 4)  # six connections were lost meanwhile


def test_a_circuit() -> None:
    now = 0.0
    circuit = Circuit(lambda: now, lambda low, high: (low + high) / 2)
    circuit.failed()
    circuit.failed()
    circuit.succeeded()
    circuit.failed()
    circuit.failed()
    assert circuit.state == CLOSED
    circuit.failed()
    assert circuit.state == OPEN
    pauses = []
    for _ in range(7):
        begun = now
        while circuit.state == OPEN:
            now += 0.25
        pauses.append(now - begun)
        assert circuit.state == HALF_OPEN
        circuit.sent()
        assert circuit.state == OPEN
        circuit.failed()
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    now += 30
    circuit.sent()
    circuit.succeeded()
    assert circuit.state == CLOSED


def test_a_budget_grows_with_requests_and_time() -> None:
    now = 0.0
    budget = Budget(lambda: now)
    assert sum(budget.take() for _ in range(1000)) == Budget.MOST
    now += 1
    assert sum(budget.take() for _ in range(1000)) == Budget.RATE
    for _ in range(100):
        budget.request()
    assert sum(budget.take() for _ in range(1000)) == Budget.SHARE * 100


def test_a_storm_is_bounded() -> None:
    """Executors that fail everything are sent little more than what clients ask for."""
    now = 0.0
    budget, chance = Budget(lambda: now), random.Random(1)
    waiting: deque[float] = deque()
    sent = asked = 0
    for step in range(60_000):  # a minute of a hundred requests a second, all of which fail
        now = step / 1000
        if chance.random() < 0.1:
            asked += 1
            budget.request()
            waiting.append(now)
        while waiting:
            waiting.popleft()
            sent += 1
            if budget.take():
                waiting.append(now)
    assert sent < asked * (1 + Budget.SHARE) + Budget.MOST + 60 * Budget.RATE + 2
