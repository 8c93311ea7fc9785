"""What a worker counts, and how the front adds it up."""

import json
import logging

import pytest

from engine.errors import ResourceExhausted
from executor_svc.core import Batch, Emitted, Finish, Reason, Scheduled, Sequence
from executor_svc.tally import INTERVAL, Tally
from executor_svc.telemetry import Telemetry
from protos.histogram import INTER_TOKEN
from protos.metrics import Metrics
from protos.v1.executor_pb2 import Submit
from protos.v1.worker_pb2 import EngineMetrics

ENGINE = "abcdef012345" + "0" * 52


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tally(clock: Clock) -> Tally:
    return Tally(ENGINE, prefix_cache=True, clock=clock)


def begun(tally: Tally, clock: Clock, handle: int = 1, arrived: float | None = None, cached: int = 0) -> Sequence:
    sequence = Sequence(1, handle, [1, 2, 3, 4, 5], 5, 100, num_cached=cached)
    tally.arrived(sequence, Submit(request_id=f"r{handle}"), clock.now if arrived is None else arrived)
    tally.scheduled(Batch(1, (Scheduled(sequence, 0, 5, True),)))
    return sequence


def step(tally: Tally, *sequences: Sequence) -> None:
    tally.emitted([Emitted(sequence, 7, None, first=False) for sequence in sequences])


def test_times_and_tokens_of_a_request(tally: Tally, clock: Clock) -> None:
    sequence = begun(tally, clock, arrived=99.0, cached=4)
    for later in (0.5, 0.02, 0.02):
        clock.now += later
        step(tally, sequence)
    sequence.finish = Finish(Reason.LENGTH)
    tally.ended(sequence)
    told = tally.take(0, idle=True)
    assert told is not None
    assert (sum(told.queue_time.counts), told.queue_time.sum) == (1, pytest.approx(1.0))
    assert (sum(told.time_to_first_token.counts), told.time_to_first_token.sum) == (1, pytest.approx(1.5))
    assert (sum(told.inter_token_latency.counts), told.inter_token_latency.sum) == (2, pytest.approx(0.04))
    assert (sum(told.request_duration.counts), told.request_duration.sum) == (1, pytest.approx(1.54))
    assert (told.prompt_tokens, told.cached_tokens, told.queried_tokens, told.completion_tokens) == (5, 4, 5, 3)
    assert dict(told.finished) == {"length": 1}


def test_sequences_that_were_in_different_steps_have_latencies_of_their_own(tally: Tally, clock: Clock) -> None:
    old, new = begun(tally, clock, 1), begun(tally, clock, 2)
    clock.now += 0.01
    step(tally, old)
    clock.now += 0.01
    step(tally, new)  # prefilled meanwhile
    clock.now += 0.002
    step(tally, old, new)
    told = tally.take(0, idle=True)
    assert told is not None
    counts = dict(zip((*INTER_TOKEN, float("inf")), told.inter_token_latency.counts, strict=True))
    assert (counts[0.0025], counts[0.025]) == (1, 1) and sum(counts.values()) == 2
    assert sum(told.time_to_first_token.counts) == 2


def test_a_request_that_is_preempted_is_begun_once(tally: Tally, clock: Clock) -> None:
    sequence = begun(tally, clock)
    clock.now += 1
    tally.scheduled(Batch(2, (Scheduled(sequence, 0, 5, True),)))
    told = tally.take(3, idle=True)
    assert told is not None and (told.prompt_tokens, sum(told.queue_time.counts), told.preemptions) == (5, 1, 3)
    step(tally, sequence)
    later = tally.take(4, idle=True)
    assert later is not None and (later.prompt_tokens, later.preemptions) == (0, 1)


def test_it_tells_once_a_second_or_when_idle_and_nothing_twice(tally: Tally, clock: Clock) -> None:
    assert tally.take(0, idle=True) is None
    sequence = begun(tally, clock)
    step(tally, sequence)
    assert tally.take(0, idle=False) is not None
    step(tally, sequence)
    clock.now += 0.9 * INTERVAL
    assert tally.take(0, idle=False) is None
    clock.now += 0.2 * INTERVAL
    told = tally.take(0, idle=False)
    assert told is not None and told.completion_tokens == 1
    assert tally.take(0, idle=True) is None


def test_failures_are_counted_by_reason_and_logged_without_their_words(
    tally: Tally, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tally.refused("r9", ResourceExhausted("the prompt 'sesame' waits", reason="QUEUE_FULL"))
    tally.refused("r8", ZeroDivisionError("sesame"))
    late = begun(tally, clock)
    late.finish = Finish(Reason.DEADLINE)
    tally.ended(late)
    told = tally.take(0, idle=True)
    assert told is not None and dict(told.failed) == {"QUEUE_FULL": 1, "INTERNAL": 1, "DEADLINE_EXCEEDED": 1}
    assert not told.finished
    assert [record.fields["request_id"] for record in caplog.records] == ["r9", "r8", "r1"]  # type: ignore[attr-defined]
    assert "sesame" not in json.dumps([str(vars(record)) for record in caplog.records])


def test_the_front_adds_up_over_workers() -> None:
    metrics = Metrics()
    telemetry = Telemetry(metrics, lambda: [])
    for _ in range(2):  # as if the first had died
        worker = Tally(ENGINE, prefix_cache=True)
        for _ in range(3):
            step(worker, Sequence(1, 1, [1], 1, 9))
        news = worker.take(1, idle=True)
        assert news is not None
        telemetry.add(ENGINE, EngineMetrics.FromString(news.SerializeToString()))
    found = {sample.name: sample.value for family in metrics.collect() for sample in family.samples}
    assert found["enginehouse_executor_completion_tokens_total"] == 6
    assert found["enginehouse_executor_preemptions_total"] == 2


def test_a_strange_engine_id_becomes_no_label() -> None:
    metrics = Metrics()
    Telemetry(metrics, lambda: []).refused("somebody's word", "ENGINE_NOT_LOADED")
    labels = [sample.labels for family in metrics.collect() for sample in family.samples]
    assert {"engine": "unknown", "reason": "ENGINE_NOT_LOADED"} in labels
