"""The job of a build: its transitions, its events, and how much progress is worth one."""

from collections.abc import Callable

import pytest
from builder_harness import short, state

from builder_svc.job import MAX_LOG_CHARS, MAX_PROGRESS, PROGRESS_INTERVAL, PROGRESS_STALL, PROGRESS_STEPS, Job
from engine.errors import Internal
from protos.v1.builder_pb2 import BuildEvent, BuildSpec
from protos.v1.common_pb2 import Failure

SUBMITTED = Job.submitted("b1", BuildSpec(checkpoint="demo"), "demo")
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
    return Job(SUBMITTED, clock=clock)


def seen(job: Job) -> list[BuildEvent]:
    """All events of the job."""
    return SUBMITTED + job.pending()


# The record

TRANSITIONS: dict[str, Callable[[Job], None]] = {
    "start": Job.start,
    "progress": lambda job: job.progress("weights", 1, 2, "bytes"),
    "built": lambda job: job.built("0" * 64, True),
    "log": lambda job: job.log("a line"),
    "release": Job.release,
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
        "log": "RUNNING",
        "release": "QUEUED",
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


def test_events_are_numbered_and_the_last_has_the_final_state(job: Job):
    job.start()
    job.progress("weights", 1, 2, "bytes")
    job.built("0" * 64, True)
    job.succeed()
    events = seen(job)
    assert [event.sequence for event in events] == list(range(5))
    assert [short(event) for event in events] == ["QUEUED", "RUNNING", "weights 1/2", "RUNNING", "SUCCEEDED"]
    assert events[0].state.engine_id == ""
    assert (events[-1].state.engine_id, events[-1].state.reused) == ("0" * 64, True)
    assert events[-1].state == job.build
    assert all(event.HasField("time") for event in events)


def test_a_failure_is_in_the_job(job: Job):
    job.fail(FAILURE)
    assert job.build.failure == FAILURE
    assert seen(job)[-1].state.failure == FAILURE


def test_what_is_handed_out_does_not_change(job: Job):
    queued = job.build
    queued.model = "changed"
    job.start()
    assert job.build.model == "demo"
    assert state(queued) == "QUEUED"


def test_what_is_kept_is_not_pending_any_more(job: Job):
    job.start()
    job.progress("weights", 1, 2, "bytes")
    assert [short(event) for event in job.pending()] == ["RUNNING", "weights 1/2"] and job.has_news
    job.kept(1)
    job.succeed()
    assert [short(event) for event in job.pending()] == ["weights 1/2", "SUCCEEDED"]
    job.kept(2)
    assert not job.pending() and not job.has_news


def test_another_builder_goes_on_with_the_numbers_and_begins_anew(job: Job):
    job.start()
    job.progress("weights", 1, 2, "bytes")
    job.built("0" * 64, True)
    job.release()
    assert (state(job.build), job.build.engine_id, job.build.reused, job.build.attempt) == ("QUEUED", "", False, 1)
    events = seen(job)
    other = Job(events)
    assert other.build == job.build
    other.start()
    other.succeed()
    assert [event.sequence for event in (*events, *other.pending())] == list(range(7))
    assert other.build.attempt == 2


def test_lines_of_the_log_stand_together_and_in_their_place(job: Job):
    job.start()
    for line in ("one", "two"):
        job.log(line)
    job.built("0" * 64, False)
    job.log("three")
    assert [short(event) for event in seen(job)] == ["QUEUED", "RUNNING", "log one\ntwo", "RUNNING", "log three"]


def test_the_log_is_bounded_over_all_attempts(job: Job):
    job.start()
    for _ in range(MAX_LOG_CHARS // 100):
        job.log("x" * 150)
    job.release()
    text = "\n".join(event.log for event in seen(job))
    assert MAX_LOG_CHARS - 200 < len(text) < MAX_LOG_CHARS + 200
    assert text.rstrip().endswith("the log ends here: it is too long")
    other = Job(seen(job))
    other.start()
    other.log("more")
    assert [short(event) for event in other.pending()] == ["RUNNING"]


# Progress


def test_progress_comes_at_most_10_times_a_second_and_the_last_of_a_phase_always(job: Job, clock: Clock):
    job.start()
    for done in range(1000):
        job.progress("weights", done, 1000, "bytes")
        clock.now += 0.001
    job.progress("upload", 0, 10, "bytes")
    job.progress("upload", 9, 10, "bytes")
    job.succeed()
    progress = [event.progress for event in seen(job) if event.HasField("progress")]
    weights = [step.done for step in progress if step.phase == "weights"]
    assert len(weights) == 11
    assert weights[0] == 0
    assert weights[-1] == 999
    assert weights == sorted(weights)
    assert [step.done for step in progress if step.phase == "upload"] == [0, 9]


def test_slow_progress_is_seen_whole(job: Job, clock: Clock):
    job.start()
    for done in range(21):
        job.progress("weights", done, 20, "tensors")
        clock.now += 1.5 * PROGRESS_INTERVAL
    job.succeed()
    assert len(seen(job)) == 3 + 21


def test_a_phase_that_stands_still_shows_where(job: Job, clock: Clock):
    job.start()
    for done in (0, 1):
        job.progress("weights", done, 1000, "bytes")
    assert [short(event) for event in job.pending()] == ["RUNNING", "weights 0/1000"]
    job.kept(2)
    assert not job.has_news
    clock.now += PROGRESS_STALL
    assert job.has_news and [short(event) for event in job.pending()] == ["weights 1/1000"]


def test_a_long_phase_has_a_bounded_number_of_events(job: Job, clock: Clock):
    job.start()
    for done in range(20_000):
        job.progress("weights", done, 20_000, "bytes")
        clock.now += 1
    job.succeed()
    assert len(seen(job)) <= PROGRESS_STEPS + 5


def test_progress_is_bounded_whatever_the_build_reports(job: Job, clock: Clock):
    job.start()
    for done in range(3 * MAX_PROGRESS):
        job.progress(f"phase {done}", done, 0, "")
        clock.now += 1
    job.built("0" * 64, False)
    job.succeed()
    events = seen(job)
    assert len(events) == MAX_PROGRESS + 4
    assert [event.sequence for event in events] == list(range(len(events)))
    assert [short(event) for event in events[-2:]] == ["RUNNING", "SUCCEEDED"]
