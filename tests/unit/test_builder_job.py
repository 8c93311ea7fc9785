"""The record of a build: its transitions, its events, and how much progress is worth one."""

import asyncio
from collections.abc import Callable

import pytest
from builder_harness import seen, short, state

from builder_svc.job import MAX_EVENTS, PROGRESS_INTERVAL, PROGRESS_STEPS, Job
from engine.errors import Internal
from protos.v1.builder_pb2 import BuildSpec
from protos.v1.common_pb2 import Failure

FAILURE = Failure(code=5, reason="CHECKPOINT_NOT_FOUND", message="no such thing")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def job(clock: Clock) -> Job:
    return Job("b1", BuildSpec(checkpoint="demo"), "demo", clock=clock)


# The record

TRANSITIONS: dict[str, Callable[[Job], None]] = {
    "start": Job.start,
    "progress": lambda job: job.progress("weights", 1, 2, "bytes"),
    "built": lambda job: job.built("0" * 64, True),
    "succeed": Job.succeed,
    "fail": lambda job: job.fail(FAILURE),
    "cancel": Job.cancel,
}
PATHS = {
    "QUEUED": [],
    "RUNNING": ["start"],
    "SUCCEEDED": ["start", "succeed"],
    "FAILED": ["start", "fail"],
    "CANCELLED": ["start", "cancel"],
}
ALLOWED = {
    "QUEUED": {"start": "RUNNING", "fail": "FAILED", "cancel": "CANCELLED"},
    "RUNNING": {
        "progress": "RUNNING",
        "built": "RUNNING",
        "succeed": "SUCCEEDED",
        "fail": "FAILED",
        "cancel": "CANCELLED",
    },
}


@pytest.mark.parametrize("before", PATHS)
@pytest.mark.parametrize("action", TRANSITIONS)
def test_transitions(job: Job, before: str, action: str):
    for step in PATHS[before]:
        TRANSITIONS[step](job)
    was = job.build
    after = ALLOWED.get(before, {}).get(action)
    if after:
        TRANSITIONS[action](job)
        assert state(job.build) == after
        assert job.ended == (after not in ("QUEUED", "RUNNING")) == job.build.HasField("ended")
    else:
        with pytest.raises(Internal, match=f"build b1 is {before}: it cannot"):
            TRANSITIONS[action](job)
        assert job.build == was


async def test_events_are_numbered_and_the_last_has_the_final_state(job: Job):
    job.start()
    job.progress("weights", 1, 2, "bytes")
    job.built("0" * 64, True)
    job.succeed()
    events = await seen(job)
    assert [event.sequence for event in events] == list(range(5))
    assert [short(event) for event in events] == ["QUEUED", "RUNNING", "weights 1/2", "RUNNING", "SUCCEEDED"]
    assert events[0].state.engine_id == ""
    assert (events[-1].state.engine_id, events[-1].state.reused) == ("0" * 64, True)
    assert events[-1].state == job.build
    assert all(event.HasField("time") for event in events)


async def test_a_failure_is_in_the_job(job: Job):
    job.fail(FAILURE)
    assert job.build.failure == FAILURE
    assert (await seen(job))[-1].state.failure == FAILURE


async def test_what_is_handed_out_does_not_change(job: Job):
    queued = job.build
    queued.model = "changed"
    job.start()
    assert job.build.model == "demo"
    assert state(queued) == "QUEUED"


async def test_all_watchers_see_the_same_list(job: Job):
    early = [asyncio.create_task(seen(job)) for _ in range(3)]
    await asyncio.sleep(0)
    job.start()
    middle = asyncio.create_task(seen(job))
    await asyncio.sleep(0)
    for done in range(5):
        job.progress(f"phase {done}", done, 5, "")
        await asyncio.sleep(0)
    job.cancel()
    late = await seen(job)
    assert len(late) == 8
    for watcher in (*early, middle):
        assert await watcher == late


async def test_a_watcher_that_leaves_harms_nobody(job: Job):
    leaving, staying = asyncio.create_task(seen(job)), asyncio.create_task(seen(job))
    await asyncio.sleep(0)
    leaving.cancel()
    job.cancel()
    assert [short(event) for event in await staying] == ["QUEUED", "CANCELLED"]


# Progress


async def test_progress_comes_at_most_10_times_a_second_and_the_last_of_a_phase_always(job: Job, clock: Clock):
    job.start()
    for done in range(1000):
        job.progress("weights", done, 1000, "bytes")
        clock.now += 0.001
    job.progress("upload", 0, 10, "bytes")
    job.progress("upload", 9, 10, "bytes")
    job.succeed()
    progress = [event.progress for event in await seen(job) if event.HasField("progress")]
    weights = [step.done for step in progress if step.phase == "weights"]
    assert len(weights) == 11
    assert weights[0] == 0
    assert weights[-1] == 999
    assert weights == sorted(weights)
    assert [step.done for step in progress if step.phase == "upload"] == [0, 9]


async def test_slow_progress_is_seen_whole(job: Job, clock: Clock):
    job.start()
    for done in range(21):
        job.progress("weights", done, 20, "tensors")
        clock.now += 1.5 * PROGRESS_INTERVAL
    job.succeed()
    assert len(await seen(job)) == 3 + 21


async def test_a_long_phase_has_a_bounded_number_of_events(job: Job, clock: Clock):
    job.start()
    for done in range(20_000):
        job.progress("weights", done, 20_000, "bytes")
        clock.now += 1
    job.succeed()
    assert len(await seen(job)) <= PROGRESS_STEPS + 5


async def test_events_are_bounded_whatever_the_build_reports(job: Job, clock: Clock):
    job.start()
    for done in range(3 * MAX_EVENTS):
        job.progress(f"phase {done}", done, 0, "")
        clock.now += 1
    job.built("0" * 64, False)
    job.succeed()
    events = await seen(job)
    assert len(events) == MAX_EVENTS
    assert [event.sequence for event in events] == list(range(MAX_EVENTS))
    assert [short(event) for event in events[-2:]] == ["RUNNING", "SUCCEEDED"]
