"""The log of a job in the store: who has written what, and what others make of it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from builder_harness import short, state
from store_harness import keys

from builder_svc import joblog
from builder_svc.build_config import BuildConfig
from builder_svc.job import Job
from builder_svc.joblog import JobLog
from builder_svc.process import BuildRequest
from engine.errors import DataLoss, NotFound, ResourceExhausted
from engine.store import Store
from protos.v1.builder_pb2 import BuildSpec


def request(checkpoint: str = "a", **options: object) -> BuildRequest:
    return BuildRequest(checkpoint, options=BuildConfig(**options))  # type: ignore[arg-type]


def submit(store: Store, checkpoint: str = "a", model: str = "", **options: object) -> JobLog:
    return joblog.submit(store, "b1", request(checkpoint, **options), BuildSpec(checkpoint=checkpoint), model)


def again(store: Store, log: JobLog) -> JobLog:
    """The log as another builder reads it."""
    read = JobLog(store, log.build_id)
    read.refresh()
    return read


def finish(store: Store, log: JobLog, how: str = "cancel") -> None:
    job = Job(log.events)
    getattr(job, how)()
    assert log.append("claim", "b1", job.pending())
    joblog.retire(store, log)


def test_what_one_writes_the_others_read(store: Store):
    log = submit(store, "a", "demo", dtype="float16")
    job = Job(log.events)
    job.start()
    job.progress("weights", 1 << 40, 1 << 41, "bytes")
    job.log("a line\nof é")
    assert log.append("claim", "b1", job.pending())
    other = again(store, log)
    assert other.events == log.events and other.build == log.build
    assert (other.owner, other.number, other.deaths, other.ended) == ("b1", 2, 0, False)
    assert other.request == request("a", dtype="float16")
    assert [short(event) for event in other.events[1:]] == [
        "RUNNING",
        "weights 1099511627776/2199023255552",
        "log a line\nof é",
    ]
    job.kept(3)
    job.succeed()
    assert log.append("write", "b1", job.pending())
    other.refresh()
    assert other.ended and other.owner == "" and state(other.build) == "SUCCEEDED"


def test_of_those_who_write_at_once_one_has_written(store: Store):
    logs = [submit(store)]
    logs += [again(store, logs[0]) for _ in range(7)]
    gate = threading.Barrier(8)

    def claim(place: int) -> bool:
        job = Job(logs[place].events)
        job.start()
        gate.wait()
        return logs[place].append("claim", f"b{place}", job.pending())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert won.count(True) == 1
    for log in logs:
        log.refresh()
        assert (log.owner, len(log.events)) == (f"b{won.index(True)}", 2)


def test_a_builder_that_was_taken_for_dead_is_fenced_off(store: Store):
    first = submit(store)
    job = Job(first.events)
    job.start()
    first.append("claim", "b1", job.pending())
    second = again(store, first)
    freed = Job(second.events)
    freed.release()
    assert second.append("expire", "b2", freed.pending())
    assert (second.owner, second.deaths, state(second.build)) == ("", 1, "QUEUED")
    job.kept(1)
    job.succeed()
    assert not first.append("write", "b1", job.pending())
    first.refresh()
    assert (first.owner, state(first.build)) == ("", "QUEUED")


def test_a_cancel_reaches_the_owner_with_its_next_write(store: Store):
    owner = submit(store)
    job = Job(owner.events)
    job.start()
    owner.append("claim", "b1", job.pending())
    assert again(store, owner).append("cancel", "b2")
    assert not owner.append("write", "b1")
    owner.refresh()
    assert owner.cancel_requested and owner.owner == "b1"
    assert owner.append("write", "b1")


# Submitting


def test_the_same_request_joins_whoever_submits(store: Store):
    first = submit(store, "a", "demo")
    assert submit(store, "a", "demo").build_id == first.build_id
    others = [
        submit(store, "a"),
        submit(store, "a", "other"),
        submit(store, "b", "demo"),
        submit(store, "a", "demo", dtype="float16"),
    ]
    assert len({first.build_id, *(log.build_id for log in others)}) == 5
    assert joblog.open_ids(store) == sorted(log.build_id for log in (first, *others))
    finish(store, first)
    assert submit(store, "a", "demo").build_id != first.build_id


def test_of_many_who_submit_the_same_at_once_all_get_one_job(store: Store):
    gate = threading.Barrier(8)

    def go(_: int) -> str:
        gate.wait()
        return submit(store).build_id

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(go, range(8)))
    assert len(ids) == 1
    assert joblog.open_ids(store) == list(ids)


class Killed(Exception):
    pass


class DiesAt:
    """A store whose user is killed before the n-th write."""

    def __init__(self, store: Store, writes: int) -> None:
        self._store, self._left = store, writes

    def __getattr__(self, name: str) -> object:
        if name in ("create", "replace", "delete"):
            self._left -= 1
            if self._left < 0:
                raise Killed
        return getattr(self._store, name)


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_a_submitter_that_is_killed_leaves_nothing_that_the_next_does_not_mend(store: Store, writes: int):
    try:
        submit(DiesAt(store, writes))  # type: ignore[arg-type]
    except Killed:
        assert writes < 3
    log = submit(store)
    assert joblog.open_ids(store) == [log.build_id]
    assert [short(event) for event in again(store, log).events] == ["QUEUED"]
    assert submit(store).build_id == log.build_id


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_an_end_that_is_interrupted_can_be_repeated(store: Store, writes: int):
    log = submit(store)
    job = Job(log.events)
    job.cancel()
    log.append("claim", "b1", job.pending())
    try:
        joblog.retire(DiesAt(store, writes), log)  # type: ignore[arg-type]
    except Killed:
        assert writes < 3
    other = submit(store)
    assert other.build_id != log.build_id
    joblog.retire(store, again(store, log))
    assert joblog.open_ids(store) == [other.build_id]
    assert submit(store).build_id == other.build_id
    assert state(joblog.find(store, log.build_id)) == "CANCELLED"


def test_the_queue_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joblog, "MAX_OPEN_JOBS", 3)
    logs = [submit(store, name) for name in "abc"]
    with pytest.raises(ResourceExhausted, match="3 builds") as caught:
        submit(store, "d")
    assert caught.value.retry_after == 60
    assert submit(store, "a").build_id == logs[0].build_id
    finish(store, logs[0])
    submit(store, "d")


# Looking


def test_builds_come_newest_first_and_ended_ones_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joblog, "MAX_LISTED", 2)
    logs = [submit(store, name) for name in "abcde"]
    for log in logs[:3]:
        finish(store, log)
    assert [build.build_id for build in joblog.builds(store)] == [log.build_id for log in reversed(logs[1:])]
    assert [state(build) for build in joblog.builds(store)] == ["QUEUED", "QUEUED", "CANCELLED", "CANCELLED"]
    assert joblog.find(store, logs[0].build_id) == logs[0].build  # not listed, and there


@pytest.mark.parametrize("build_id", ["x", "../../etc", "0" * 24, "", "A" * 24])
def test_unknown_builds(store: Store, build_id: str):
    with pytest.raises(NotFound, match=f"no build '{build_id}'"):
        joblog.find(store, build_id)


def test_a_damaged_record_is_told_by_its_key(store: Store):
    log = submit(store)
    store.replace(f"builds/{log.build_id}/00000001.json", b"{}")
    with pytest.raises(DataLoss, match=f"builds/{log.build_id}/00000001.json"):
        again(store, log)
    assert joblog.builds(store) == []


def test_what_does_not_belong_to_a_record_is_passed_over(store: Store):
    log = submit(store)
    store.create(f"builds/{log.build_id}/note.txt", b"mine")
    assert again(store, log).events == log.events


def test_an_ended_job_stays_where_its_log_is_gone(store: Store):
    log = submit(store)
    finish(store, log)
    for key in keys(store, f"builds/{log.build_id}/"):
        store.delete(key)
    assert joblog.find(store, log.build_id) == log.build
