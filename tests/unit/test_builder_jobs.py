"""The queue of builds, of one builder and of several. Builds are stand-ins in this process, but for the last ones."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builder_harness import child, failure, publish, short, state

from builder_svc import joblog
from builder_svc import jobs as jobs_module
from builder_svc.attempt import Pace
from builder_svc.build_config import BuildConfig, Progress
from builder_svc.jobs import Jobs
from builder_svc.process import BuildProcess, BuildRequest, Result
from engine import registry
from engine.backends import open_store
from engine.errors import EnginehouseError, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from engine.store import Store
from protos.v1.builder_pb2 import Build, BuildSpec

ENGINE = "0" * 64
RESULT = Result(ENGINE, reused=False)
PACE = Pace(poll=0.02, save=0.01, beat=0.1, lease=60, watch=0.02)  # nobody is taken for dead on a busy machine
LEASE = 0.5  # of builders that take others for dead


class Builds:
    """Stands in for BuildProcess: each run waits until the test says how it ends."""

    def __init__(self) -> None:
        self.runs: dict[str, asyncio.Future[Result]] = {}  # by checkpoint
        self.progress: dict[str, Progress] = {}
        self.at_once = self.most_at_once = 0
        self.ended: list[str] = []
        self.on_cancel: Callable[[], object] = lambda: None
        self.started = asyncio.Event()

    async def run(self, request: BuildRequest, progress: Progress, log: Callable[[str], None]) -> Result:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.runs[request.checkpoint] = asyncio.get_running_loop().create_future()
        self.progress[request.checkpoint] = progress
        log(f"building {request.checkpoint}")
        try:
            return await self.runs[request.checkpoint]
        except asyncio.CancelledError:
            self.on_cancel()
            raise
        finally:
            self.at_once -= 1
            self.ended.append(request.checkpoint)

    async def has(self, *checkpoints: str) -> None:
        """Returns when these are running."""
        await until(lambda: set(checkpoints) <= set(self.runs))

    def finish(self, checkpoint: str, outcome: Result | Exception = RESULT) -> None:
        if isinstance(outcome, Result):
            self.runs[checkpoint].set_result(outcome)
        else:
            self.runs[checkpoint].set_exception(outcome)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
def builds() -> Builds:
    return Builds()


@pytest.fixture
async def jobs(store: Store, builds: Builds) -> AsyncIterator[Jobs]:
    jobs = Jobs(store, builds, 2, pace=PACE)  # type: ignore[arg-type]
    jobs.start()
    yield jobs
    await jobs.close()


async def submit(jobs: Jobs, checkpoint: str, model: str = "", **options: object) -> str:
    request = BuildRequest(checkpoint, options=BuildConfig(**options))  # type: ignore[arg-type]
    return (await jobs.submit(request, BuildSpec(checkpoint=checkpoint), model)).build_id


async def end(jobs: Jobs, build_id: str) -> Build:
    """The job when it has ended."""
    async with asyncio.timeout(60):
        async for event in jobs.events(build_id):
            last = event
    return last.state


async def seen(jobs: Jobs, build_id: str, first: int = 0) -> list[str]:
    """All events but the log's, in short."""
    async with asyncio.timeout(60):
        return [short(event) async for event in jobs.events(build_id, first) if not event.log]


async def states(jobs: Jobs) -> list[str]:
    """Oldest first."""
    return [state(build) for build in reversed(await jobs.builds())]


async def reach(jobs: Jobs, *wanted: str) -> None:
    """Returns when the jobs have these states, oldest first."""
    async with asyncio.timeout(60):
        while await states(jobs) != list(wanted):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_build_that_succeeds_names_its_engine_first(jobs: Jobs, builds: Builds, store: Store):
    engine = publish(store)
    build_id = await submit(jobs, "a", "demo")
    await builds.has("a")
    builds.finish("a", Result(engine, reused=True))
    build = await end(jobs, build_id)
    assert (state(build), build.engine_id, build.reused, build.model, build.attempt) == (
        "SUCCEEDED",
        engine,
        True,
        "demo",
        1,
    )
    assert registry.resolve(store, "demo").engine_id == engine
    assert await jobs.find(build_id) == build
    await until(lambda: not joblog.open_ids(store))


async def test_a_build_without_a_name(jobs: Jobs, builds: Builds, store: Store):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    builds.finish("a")
    assert state(await end(jobs, build_id)) == "SUCCEEDED"
    assert registry.names(store) == []


async def test_a_name_that_cannot_be_set_fails_the_job_and_keeps_the_engine(jobs: Jobs, builds: Builds):
    build_id = await submit(jobs, "a", "demo")
    await builds.has("a")
    builds.finish("a")
    build = await end(jobs, build_id)
    assert (state(build), build.engine_id, build.failure.reason) == ("FAILED", ENGINE, "ENGINE_NOT_FOUND")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(NotFound("no model.safetensors", reason="FILE_NOT_FOUND"), "FILE_NOT_FOUND"), (KeyError("x"), "INTERNAL")],
)
async def test_a_build_that_fails_fails_alone(jobs: Jobs, builds: Builds, error: Exception, reason: str):
    bad, good = await submit(jobs, "bad"), await submit(jobs, "good")
    await builds.has("bad", "good")
    builds.finish("bad", error)
    build = await end(jobs, bad)
    assert (state(build), build.failure.reason) == ("FAILED", reason)
    builds.finish("good")
    assert state(await end(jobs, good)) == "SUCCEEDED"


async def test_as_many_at_a_time_as_allowed_in_their_order(jobs: Jobs, builds: Builds):
    for name in "abcd":
        await submit(jobs, name)
    await reach(jobs, "RUNNING", "RUNNING", "QUEUED", "QUEUED")
    builds.finish("b")
    await reach(jobs, "RUNNING", "SUCCEEDED", "RUNNING", "QUEUED")
    builds.finish("a", Unavailable("gone"))
    await reach(jobs, "FAILED", "SUCCEEDED", "RUNNING", "RUNNING")
    assert builds.most_at_once == 2


async def test_ids_are_sortable_and_builds_come_newest_first(jobs: Jobs):
    ids = [await submit(jobs, name) for name in "abc"]
    assert ids == sorted(ids)
    assert len(set(ids)) == 3
    assert all(len(build_id) == 24 and int(build_id, 16) for build_id in ids)
    assert [build.build_id for build in await jobs.builds()] == ids[::-1]


async def test_an_unknown_build(jobs: Jobs):
    for call in (jobs.find("x"), jobs.cancel("x"), end(jobs, "0" * 24)):
        assert isinstance(await failure(call), NotFound)


async def test_what_the_build_prints_is_kept(jobs: Jobs, builds: Builds, store: Store):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    builds.finish("a")
    await end(jobs, build_id)
    other = Jobs(store, builds)  # type: ignore[arg-type]
    assert [event.log async for event in other.events(build_id) if event.log] == ["building a"]


async def test_a_watcher_may_begin_anywhere(jobs: Jobs, builds: Builds):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    builds.progress["a"]("weights", 1, 2, "")
    watching = asyncio.create_task(seen(jobs, build_id, 1))
    builds.finish("a")
    assert await watching == ["RUNNING", "weights 1/2", "RUNNING", "SUCCEEDED"]
    assert await seen(jobs, build_id, 99) == []


async def test_what_this_builder_may_not_build_it_fails(store: Store, builds: Builds):
    def refuse(_: BuildRequest) -> BuildRequest:
        raise PermissionDenied("outside of the root", reason="CHECKPOINT_OUTSIDE_ROOT")

    jobs = Jobs(store, builds, prepare=refuse, pace=PACE)  # type: ignore[arg-type]
    jobs.start()
    build = await end(jobs, await submit(jobs, "a"))
    assert (state(build), build.failure.code, build.failure.reason) == ("FAILED", 7, "CHECKPOINT_OUTSIDE_ROOT")
    assert not builds.runs
    await jobs.close()


async def test_what_is_done_with_an_engine_is_done_before_it_gets_its_name(store: Store, builds: Builds):
    engine, finished = publish(store), list[tuple[Result, list[str]]]()
    jobs = Jobs(
        store,
        builds,  # type: ignore[arg-type]
        finish=lambda result: finished.append((result, registry.names(store))),
        pace=PACE,
    )
    jobs.start()
    build_id = await submit(jobs, "a", "demo")
    await builds.has("a")
    builds.finish("a", Result(engine, reused=False))
    await end(jobs, build_id)
    assert finished == [(Result(engine, reused=False), [])]
    await jobs.close()


# Cancelling


async def test_cancel_before_anybody_has_it(store: Store, builds: Builds):
    jobs = Jobs(store, builds, pace=PACE)  # type: ignore[arg-type]
    build_id = await submit(jobs, "a")
    assert state(await jobs.cancel(build_id)) == "CANCELLED"
    jobs.start()
    await asyncio.sleep(0.1)
    assert builds.runs == {} and joblog.open_ids(store) == []
    await jobs.close()


async def test_cancel_while_queued(jobs: Jobs, builds: Builds):
    ids = [await submit(jobs, name) for name in "abc"]
    await builds.has("a", "b")
    assert state(await jobs.cancel(ids[2])) == "CANCELLED"
    await reach(jobs, "RUNNING", "RUNNING", "CANCELLED")
    builds.finish("a", Unavailable("gone"))
    await reach(jobs, "FAILED", "RUNNING", "CANCELLED")
    assert set(builds.runs) == {"a", "b"}


async def test_cancel_while_running_frees_the_place(jobs: Jobs, builds: Builds):
    ids = [await submit(jobs, name) for name in "abc"]
    await builds.has("a", "b")
    assert state(await jobs.cancel(ids[0])) == "CANCELLED"
    await reach(jobs, "CANCELLED", "RUNNING", "RUNNING")


async def test_cancel_at_any_moment_of_the_beginning(jobs: Jobs, builds: Builds):
    for delay in range(40):
        build_id = await submit(jobs, f"a{delay}")
        await asyncio.sleep(delay / 4000)
        async with asyncio.timeout(60):
            assert state(await jobs.cancel(build_id)) == "CANCELLED"
    assert builds.at_once == 0


async def test_cancel_several_times_at_once_cancels_once(jobs: Jobs, builds: Builds):
    cancels: list[None] = []
    builds.on_cancel = lambda: cancels.append(None)
    build_id = await submit(jobs, "a")
    await builds.has("a")
    answers = await asyncio.gather(*(jobs.cancel(build_id) for _ in range(3)))
    assert [state(build) for build in answers] == ["CANCELLED"] * 3
    assert len(cancels) == 1
    assert await seen(jobs, build_id) == ["QUEUED", "RUNNING", "CANCELLED"]


@pytest.mark.parametrize("result", [Result(ENGINE, reused=False), Unavailable("gone")])
async def test_cancel_of_an_ended_job_changes_nothing(jobs: Jobs, builds: Builds, result: Result | EnginehouseError):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    builds.finish("a", result)
    ended = await end(jobs, build_id)
    events = await seen(jobs, build_id)
    assert await jobs.cancel(build_id) == ended
    assert await seen(jobs, build_id) == events


async def test_cancel_of_a_build_whose_engine_is_there_comes_too_late(
    jobs: Jobs, builds: Builds, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """A name cannot be half set: who cancels gets the job as it ends."""
    engine, loop, naming, go_on = publish(store), asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    set_name = registry.set_name

    def slow(*arguments: str) -> registry.NameRecord:
        loop.call_soon_threadsafe(naming.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(60)
        return set_name(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "set_name", slow)
    build_id = await submit(jobs, "a", "demo")
    await builds.has("a")
    builds.finish("a", Result(engine, reused=False))
    await naming.wait()
    cancelling = asyncio.create_task(jobs.cancel(build_id))
    await asyncio.sleep(0.1)
    go_on.set()
    assert state(await cancelling) == "SUCCEEDED"
    assert registry.resolve(store, "demo").engine_id == engine


async def test_a_client_that_leaves_while_it_cancels(jobs: Jobs, builds: Builds):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    cancelling = asyncio.create_task(jobs.cancel(build_id))
    await until(lambda: builds.ended)
    cancelling.cancel()
    assert state(await end(jobs, build_id)) == "CANCELLED"


async def test_a_build_that_is_being_cancelled_is_not_joined(jobs: Jobs, builds: Builds):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    joined: list[str] = []
    builds.on_cancel = lambda: joined.append(
        joblog.submit(jobs._store, "b", BuildRequest("a"), BuildSpec(), "").build_id
    )
    assert state(await jobs.cancel(build_id)) == "CANCELLED"
    assert joined and joined[0] != build_id


# Several builders


@pytest.fixture
async def other_builds() -> Builds:
    return Builds()


@pytest.fixture
async def other(store: Store, other_builds: Builds) -> AsyncIterator[Jobs]:
    """A second builder on the same store, which begins to take jobs when the test says so."""
    jobs = Jobs(store, other_builds, 2, pace=PACE)  # type: ignore[arg-type]
    yield jobs
    await jobs.close()


@pytest.fixture
async def heir(store: Store, other_builds: Builds) -> AsyncIterator[Jobs]:
    """As `other`, and soon takes those for dead that write nothing."""
    jobs = Jobs(store, other_builds, 2, pace=replace(PACE, lease=LEASE))  # type: ignore[arg-type]
    yield jobs
    await jobs.close()


def die(jobs: Jobs) -> None:
    """The builder writes and looks no more, as if it had been killed."""
    assert jobs._looking
    jobs._looking.cancel()
    for known in jobs._known.values():
        known.log.append = lambda *_: (_ for _ in ()).throw(Unavailable("dead"))  # type: ignore[method-assign]


async def test_every_builder_knows_every_job(jobs: Jobs, builds: Builds, other: Jobs):
    build_id = await submit(jobs, "a")
    watching = [asyncio.create_task(seen(one, build_id)) for one in (jobs, other)]
    await builds.has("a")
    builds.progress["a"]("weights", 1, 2, "")
    assert await submit(other, "a") == build_id
    builds.finish("a")
    assert await watching[0] == await watching[1] == ["QUEUED", "RUNNING", "weights 1/2", "RUNNING", "SUCCEEDED"]
    assert await other.builds() == await jobs.builds()
    assert await other.find(build_id) == await jobs.find(build_id)


async def test_jobs_are_shared_and_each_is_run_once(jobs: Jobs, builds: Builds, other: Jobs, other_builds: Builds):
    other.start()
    names = [f"job-{number}" for number in range(12)]
    ids = [await submit(jobs, name) for name in names]
    await until(lambda: builds.runs and other_builds.runs)
    async with asyncio.timeout(60):
        while await states(jobs) != ["SUCCEEDED"] * 12:
            for each in (builds, other_builds):
                for run in each.runs.values():
                    if not run.done():
                        run.set_result(Result(ENGINE, reused=False))
            await asyncio.sleep(0.005)
    assert sorted([*builds.ended, *other_builds.ended]) == sorted(names)
    assert [(await jobs.find(build_id)).attempt for build_id in ids] == [1] * 12


async def test_a_job_is_cancelled_through_another_builder(jobs: Jobs, builds: Builds, other: Jobs):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    assert state(await other.cancel(build_id)) == "CANCELLED"
    assert builds.ended == ["a"]
    assert await seen(jobs, build_id) == await seen(other, build_id) == ["QUEUED", "RUNNING", "CANCELLED"]


async def test_a_job_whose_builder_died_goes_on_at_another(
    jobs: Jobs, builds: Builds, heir: Jobs, other_builds: Builds
):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    builds.progress["a"]("weights", 1, 2, "")
    async with asyncio.timeout(60):
        async for event in heir.events(build_id):  # which reads what is written
            if short(event) == "weights 1/2":
                break
    die(jobs)
    watching = asyncio.create_task(seen(heir, build_id))
    heir.start()
    await other_builds.has("a")
    other_builds.finish("a")
    assert await watching == ["QUEUED", "RUNNING", "weights 1/2", "QUEUED", "RUNNING", "RUNNING", "SUCCEEDED"]
    assert (await heir.find(build_id)).attempt == 2


async def test_a_builder_that_was_taken_for_dead_stops_its_build(
    jobs: Jobs, builds: Builds, heir: Jobs, other_builds: Builds
):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    known = jobs._known[build_id]
    await known.lock.acquire()  # it hangs: nothing is written
    heir.start()
    await other_builds.has("a")
    known.lock.release()
    await until(lambda: builds.ended == ["a"])
    other_builds.finish("a")
    assert state(await end(jobs, build_id)) == "SUCCEEDED"
    assert (await jobs.find(build_id)).attempt == 2
    assert other_builds.ended == ["a"]


async def test_a_builder_that_was_taken_for_dead_names_nothing(
    jobs: Jobs, builds: Builds, heir: Jobs, other_builds: Builds, store: Store
):
    """It stood still between the end of its build and the name; the job has ended elsewhere, and the name went on."""
    engine, later = publish(store), publish(store, 1)
    build_id = await submit(jobs, "a", "demo")
    await builds.has("a")
    await asyncio.sleep(0.05)
    known = jobs._known[build_id]
    await known.lock.acquire()
    builds.finish("a", Result(engine, reused=False))
    heir.start()
    await other_builds.has("a")
    other_builds.finish("a", Result(engine, reused=False))
    assert state(await end(heir, build_id)) == "SUCCEEDED"
    registry.set_name(store, "demo", later)
    known.lock.release()
    await until(lambda: not known.attempt)
    assert registry.resolve(store, "demo").engine_id == later


async def test_a_claim_whose_answer_was_lost_costs_no_life(jobs: Jobs, builds: Builds, store: Store):
    append, lost = joblog.JobLog.append, list[str]()

    def lossy(self: joblog.JobLog, action: str, *arguments: object) -> bool:
        if action == "claim" and not lost:
            lost.append(action)
            view = joblog.JobLog(store, self.build_id)
            view.refresh()
            assert append(view, action, *arguments)  # type: ignore[arg-type]
            raise Unavailable("no answer")
        return append(self, action, *arguments)  # type: ignore[arg-type]

    joblog.JobLog.append = lossy  # type: ignore[method-assign, assignment]
    try:
        build_id = await submit(jobs, "a")
        await builds.has("a")
    finally:
        joblog.JobLog.append = append  # type: ignore[method-assign]
    builds.finish("a")
    assert state(await end(jobs, build_id)) == "SUCCEEDED"
    assert jobs._known[build_id].log.deaths == 0


async def test_who_leaves_while_a_log_is_read_does_not_let_two_read_it(store: Store):
    known, at_once, most = jobs_module._Known(store, "0" * 24), 0, 0

    def slow() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.3)
        at_once -= 1

    known.log.refresh = slow  # type: ignore[method-assign]
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await known.refresh()
    await known.refresh()
    assert (most, at_once) == (1, 0)


async def test_a_damaged_record_stops_nobody_else(jobs: Jobs, builds: Builds, store: Store):
    broken = joblog.submit(store, "b", BuildRequest("broken"), BuildSpec(), "")
    store.delete(f"builds/{broken.build_id}/00000000.json")
    store.create(f"builds/{broken.build_id}/00000001.json", b"{}")
    build_id = await submit(jobs, "a")
    await builds.has("a")
    builds.finish("a")
    assert state(await end(jobs, build_id)) == "SUCCEEDED"
    error = await failure(jobs.find(broken.build_id))
    assert error.reason == "BUILD_RECORD_INVALID" and f"delete queue/{broken.build_id}" in error.message


async def test_what_a_finished_build_needs_waits_longer(store: Store, builds: Builds):
    """A store that is away for a while after hours of work must not fail it."""
    engine, patient = publish(store), open_store(store.url, 60)
    jobs = Jobs(store, builds, patient=patient, pace=PACE)  # type: ignore[arg-type]
    used: list[Store] = []
    set_name = registry.set_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "set_name", lambda store, *given: (used.append(store), set_name(store, *given)))
        jobs.start()
        build_id = await submit(jobs, "a", "demo")
        await builds.has("a")
        builds.finish("a", Result(engine, reused=False))
        await end(jobs, build_id)
    assert used == [patient]
    await jobs.close()


async def test_a_job_that_kills_its_builders_is_given_up(store: Store, heir: Jobs):
    submitted = joblog.submit(store, "dead", BuildRequest("a"), BuildSpec(), "")
    for death in range(jobs_module.MAX_DEATHS):
        job = jobs_module.Job(submitted.events)
        job.start()
        assert submitted.append("claim", f"dead-{death}", job.pending())
        if death < jobs_module.MAX_DEATHS - 1:
            job.kept(1)
            job.release()
            assert submitted.append("expire", "observer", job.pending())
    heir.start()
    build = await end(heir, submitted.build_id)
    assert (state(build), build.failure.reason, build.attempt) == ("FAILED", "BUILDER_DIED", jobs_module.MAX_DEATHS)
    await until(lambda: not joblog.open_ids(store))


async def test_a_job_whose_builder_died_while_it_was_cancelled_is_cancelled(jobs: Jobs, builds: Builds, heir: Jobs):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    die(jobs)
    heir.start()
    assert state(await heir.cancel(build_id)) == "CANCELLED"


async def test_what_a_killed_end_has_left_in_the_queue_is_cleared(store: Store, other: Jobs):
    submitted = joblog.submit(store, "dead", BuildRequest("a"), BuildSpec(), "")
    job = jobs_module.Job(submitted.events)
    job.cancel()
    submitted.append("claim", "dead", job.pending())
    other.start()
    await until(lambda: joblog.open_ids(store) == [])
    assert state(await other.find(submitted.build_id)) == "CANCELLED"


async def test_a_store_that_is_away_costs_no_job(
    jobs: Jobs, builds: Builds, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """The build goes on, is not taken for dead by others, and its end is recorded when the store is back."""
    lease = 1.5
    engine, other = publish(store), Jobs(store, Builds(), pace=replace(PACE, lease=lease))  # type: ignore[arg-type]
    build_id = await submit(jobs, "a", "demo")
    await builds.has("a")
    other.start()

    def away(*_: object) -> None:
        raise Unavailable("the store is away")

    with monkeypatch.context() as patch:
        for verb in ("create", "replace", "read", "list", "size"):
            patch.setattr(type(store), verb, away)
        builds.progress["a"]("weights", 1, 2, "")
        await asyncio.sleep(2 * lease)
    builds.finish("a", Result(engine, reused=False))
    assert state(await end(jobs, build_id)) == "SUCCEEDED"
    assert (await jobs.find(build_id)).attempt == 1
    assert "weights 1/2" in await seen(jobs, build_id)
    await other.close()


@pytest.mark.parametrize("outcome", [Result(ENGINE, reused=False), NotFound("no weights", reason="WEIGHTS_NOT_FOUND")])
async def test_who_watches_a_job_whose_end_cannot_be_recorded_is_told(
    jobs: Jobs, builds: Builds, store: Store, monkeypatch: pytest.MonkeyPatch, outcome: Result | Exception
):
    def full(*_: object) -> None:
        raise ResourceExhausted("the store is full", reason="STORE_FULL")

    build_id = await submit(jobs, "a")
    await builds.has("a")
    watching = asyncio.create_task(seen(jobs, build_id))
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "create", full)
        builds.finish("a", outcome)
        error = await failure(watching)
        assert error.reason == ("STORE_FULL" if isinstance(outcome, Result) else "WEIGHTS_NOT_FOUND")
        assert build_id in error.message and "the store is full" in error.message
    await until(lambda: not jobs._known[build_id].attempt)
    assert state(await end(jobs, build_id)) == ("SUCCEEDED" if isinstance(outcome, Result) else "FAILED")


async def test_a_write_whose_answer_was_lost_is_not_repeated(jobs: Jobs, builds: Builds, store: Store):
    build_id = await submit(jobs, "a")
    await builds.has("a")
    log, lost = jobs._known[build_id].log, list[str]()
    append = log.append

    def lossy(*arguments: object) -> bool:
        if not lost:
            lost.append("answer")
            assert joblog.JobLog.append(other_view(), *arguments)  # type: ignore[arg-type]
            raise Unavailable("no answer")
        return append(*arguments)  # type: ignore[arg-type]

    def other_view() -> joblog.JobLog:
        view = joblog.JobLog(store, build_id)
        view.refresh()
        return view

    log.append = lossy  # type: ignore[method-assign, assignment]
    builds.progress["a"]("weights", 1, 2, "")
    await until(lambda: lost)
    builds.finish("a")
    await end(jobs, build_id)
    assert await seen(jobs, build_id) == ["QUEUED", "RUNNING", "weights 1/2", "RUNNING", "SUCCEEDED"]
    read = [event async for event in Jobs(store, builds).events(build_id)]  # type: ignore[arg-type]
    assert [event.sequence for event in read] == list(range(len(read)))


# The end


async def test_close_gives_back_what_is_open_and_takes_no_more(
    jobs: Jobs, builds: Builds, other: Jobs, other_builds: Builds
):
    ids = [await submit(jobs, name) for name in "abc"]
    await builds.has("a", "b")
    watching = asyncio.create_task(seen(jobs, ids[0]))
    await asyncio.sleep(0.05)
    await jobs.close()
    assert sorted(builds.ended) == ["a", "b"]
    error = await failure(watching)
    assert (type(error), error.reason) == (Unavailable, "BUILDER_STOPPING")
    with pytest.raises(Unavailable, match="stopping"):
        await submit(jobs, "d")
    assert await states(other) == ["QUEUED"] * 3
    other.start()
    await other_builds.has("a", "b")
    for name in "ab":
        other_builds.finish(name)
    await other_builds.has("c")
    other_builds.finish("c")
    assert [state(await end(other, build_id)) for build_id in ids] == ["SUCCEEDED"] * 3
    await jobs.close()


async def test_logs_of_ended_jobs_are_not_held_for_ever(jobs: Jobs, builds: Builds, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "_KEPT_LOGS", 2)
    for name in "abcde":
        build_id = await submit(jobs, name)
        await builds.has(name)
        builds.finish(name)
        await end(jobs, build_id)
    await until(lambda: len(jobs._known) <= 3)
    assert len(await jobs.builds()) == 5


# With processes


async def test_a_job_with_a_process(store: Store, tmp_path: Path):
    engine = publish(store)
    build = (
        "for done in range(5):\n    progress('weights', done, 4)\n"
        f"print('note', file=sys.stderr, flush=True)\nresult({engine!r}, reused=True)"
    )
    jobs = Jobs(store, BuildProcess(child(build), work_dir=tmp_path), pace=PACE)
    jobs.start()
    build_id = await submit(jobs, "a", "demo")
    ended = await end(jobs, build_id)
    assert (state(ended), ended.engine_id) == ("SUCCEEDED", engine)
    events = [short(event) async for event in jobs.events(build_id)]
    assert "log note" in events
    events.remove("log note")
    assert events == ["QUEUED", "RUNNING", "weights 0/4", "weights 4/4", "RUNNING", "SUCCEEDED"]
    await jobs.close()


async def test_a_process_that_is_killed_fails_its_job_alone(store: Store, tmp_path: Path):
    build = "if request['checkpoint'] == 'bad': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.2); result()"
    jobs = Jobs(store, BuildProcess(child(build), work_dir=tmp_path), 2, pace=PACE)
    jobs.start()
    bad, good = await submit(jobs, "bad"), await submit(jobs, "good")
    assert "killed by SIGKILL, probably out of memory" in (await end(jobs, bad)).failure.message
    assert state(await end(jobs, good)) == "SUCCEEDED"
    await jobs.close()
