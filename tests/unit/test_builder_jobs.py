"""The queue of builds. Most builds are stand-ins in this process; those that are processes are in test_builder_process.py."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from builder_harness import child, failure, publish, seen, short, state

from builder_svc import jobs as jobs_module
from builder_svc.jobs import Jobs
from builder_svc.options import BuildOptions, Progress
from builder_svc.process import BuildProcess, BuildRequest, Result
from engine import registry
from engine.errors import EnginehouseError, NotFound, ResourceExhausted, Unavailable
from engine.store import Store
from protos.v1.builder_pb2 import BuildSpec


class Builds:
    """Stands in for BuildProcess: each run waits until the test says how it ends."""

    def __init__(self) -> None:
        self.runs: dict[str, asyncio.Future[Result]] = {}  # by checkpoint
        self.at_once = self.most_at_once = 0
        self.ended: list[str] = []
        self.on_cancel: Callable[[], object] = lambda: None

    async def run(self, request: BuildRequest, progress: Progress) -> Result:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.runs[request.checkpoint] = asyncio.get_running_loop().create_future()
        try:
            return await self.runs[request.checkpoint]
        except asyncio.CancelledError:
            self.on_cancel()
            raise
        finally:
            self.at_once -= 1
            self.ended.append(request.checkpoint)


@pytest.fixture
def builds() -> Builds:
    return Builds()


@pytest.fixture
async def jobs(store: Store, builds: Builds) -> AsyncIterator[Jobs]:
    jobs = Jobs(store, builds, 2)  # type: ignore[arg-type]
    yield jobs
    await jobs.close()


def submit(jobs: Jobs, checkpoint: str, model: str = "", **options: object) -> str:
    request = BuildRequest(checkpoint, "store", BuildOptions(**options))  # type: ignore[arg-type]
    return jobs.submit(request, BuildSpec(checkpoint=checkpoint), model).build_id


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def states(jobs: Jobs) -> list[str]:
    """Oldest first."""
    return [state(build) for build in reversed(jobs.builds())]


async def test_a_build_that_succeeds_names_its_engine_first(jobs: Jobs, builds: Builds, store: Store):
    engine = publish(store)
    submitted = jobs.find(submit(jobs, "a", "demo"))
    assert state(submitted.build) == "QUEUED"

    async def name_at_the_end() -> str:
        await submitted.end()
        return registry.resolve(store, "demo").engine_id

    watching = asyncio.create_task(name_at_the_end())
    await settle()
    builds.runs["a"].set_result(Result(engine, reused=True))
    build = await submitted.end()
    assert (state(build), build.engine_id, build.reused, build.model) == ("SUCCEEDED", engine, True, "demo")
    assert await watching == engine


async def test_a_build_without_a_name(jobs: Jobs, builds: Builds, store: Store):
    job = jobs.find(submit(jobs, "a"))
    await settle()
    builds.runs["a"].set_result(Result("0" * 64, reused=False))
    assert state(await job.end()) == "SUCCEEDED"
    assert registry.names(store) == []


async def test_a_name_that_cannot_be_set_fails_the_job_and_keeps_the_engine(jobs: Jobs, builds: Builds):
    job = jobs.find(submit(jobs, "a", "demo"))
    await settle()
    builds.runs["a"].set_result(Result("0" * 64, reused=False))
    build = await job.end()
    assert (state(build), build.engine_id, build.failure.reason) == ("FAILED", "0" * 64, "ENGINE_NOT_FOUND")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(NotFound("no model.safetensors", reason="FILE_NOT_FOUND"), "FILE_NOT_FOUND"), (KeyError("x"), "INTERNAL")],
)
async def test_a_build_that_fails_fails_alone(jobs: Jobs, builds: Builds, error: Exception, reason: str):
    bad, good = jobs.find(submit(jobs, "bad")), jobs.find(submit(jobs, "good"))
    await settle()
    builds.runs["bad"].set_exception(error)
    build = await bad.end()
    assert (state(build), build.failure.reason) == ("FAILED", reason)
    builds.runs["good"].set_result(Result("0" * 64, reused=False))
    assert state(await good.end()) == "SUCCEEDED"


async def test_as_many_at_a_time_as_allowed_in_their_order(jobs: Jobs, builds: Builds):
    for name in "abcd":
        submit(jobs, name)
    await settle()
    assert states(jobs) == ["RUNNING", "RUNNING", "QUEUED", "QUEUED"]
    builds.runs["b"].set_result(Result("0" * 64, reused=False))
    await settle()
    assert states(jobs) == ["RUNNING", "SUCCEEDED", "RUNNING", "QUEUED"]
    builds.runs["a"].set_exception(Unavailable("gone"))
    await settle()
    assert states(jobs) == ["FAILED", "SUCCEEDED", "RUNNING", "RUNNING"]
    assert builds.most_at_once == 2


async def test_ids_are_sortable_and_builds_come_newest_first(jobs: Jobs):
    ids = [submit(jobs, name) for name in "abc"]
    assert ids == sorted(ids)
    assert len(set(ids)) == 3
    assert all(len(build_id) == 24 and int(build_id, 16) for build_id in ids)
    assert [build.build_id for build in jobs.builds()] == ids[::-1]


async def test_the_same_request_joins_while_it_is_queued_or_running(jobs: Jobs, builds: Builds):
    first = submit(jobs, "a", "demo")
    assert submit(jobs, "a", "demo") == first
    await settle()
    assert submit(jobs, "a", "demo") == first
    others = [submit(jobs, "a"), submit(jobs, "a", "other"), submit(jobs, "b", "demo")]
    assert len({first, *others, submit(jobs, "a", "demo", dtype="float16")}) == 5
    builds.runs["a"].set_exception(Unavailable("gone"))
    await jobs.find(first).end()
    assert submit(jobs, "a", "demo") != first


async def test_an_unknown_build(jobs: Jobs):
    with pytest.raises(NotFound, match="no build 'x'"):
        jobs.find("x")
    assert isinstance(await failure(jobs.cancel("x")), NotFound)


# Cancelling


async def test_cancel_before_the_first_step(jobs: Jobs, builds: Builds):
    build = await jobs.cancel(submit(jobs, "a"))
    assert state(build) == "CANCELLED"
    assert builds.runs == {}


async def test_cancel_while_queued(jobs: Jobs, builds: Builds):
    ids = [submit(jobs, name) for name in "abc"]
    await settle()
    assert state(await jobs.cancel(ids[2])) == "CANCELLED"
    assert states(jobs) == ["RUNNING", "RUNNING", "CANCELLED"]
    builds.runs["a"].set_exception(Unavailable("gone"))
    await settle()
    assert set(builds.runs) == {"a", "b"}


async def test_cancel_while_running_frees_the_place(jobs: Jobs, builds: Builds):
    ids = [submit(jobs, name) for name in "abc"]
    await settle()
    assert state(await jobs.cancel(ids[0])) == "CANCELLED"
    await settle()
    assert states(jobs) == ["CANCELLED", "RUNNING", "RUNNING"]


async def test_cancel_twice_at_once_cancels_once(jobs: Jobs, builds: Builds):
    cancels: list[None] = []
    builds.on_cancel = lambda: cancels.append(None)
    build_id = submit(jobs, "a")
    await settle()
    answers = await asyncio.gather(*(jobs.cancel(build_id) for _ in range(3)))
    assert [state(build) for build in answers] == ["CANCELLED"] * 3
    assert len(cancels) == 1
    assert [short(event) for event in await seen(jobs.find(build_id))] == ["QUEUED", "RUNNING", "CANCELLED"]


@pytest.mark.parametrize("result", [Result("0" * 64, reused=False), Unavailable("gone")])
async def test_cancel_of_an_ended_job_changes_nothing(jobs: Jobs, builds: Builds, result: Result | EnginehouseError):
    job = jobs.find(submit(jobs, "a"))
    await settle()
    if isinstance(result, Result):
        builds.runs["a"].set_result(result)
    else:
        builds.runs["a"].set_exception(result)
    ended = await job.end()
    assert await jobs.cancel(ended.build_id) == ended
    assert len(await seen(job)) == (4 if isinstance(result, Result) else 3)


async def test_cancel_of_a_build_whose_engine_is_there_comes_too_late(
    jobs: Jobs, builds: Builds, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """A name cannot be half set: who cancels gets the job as it ends."""
    engine, loop, naming, go_on = publish(store), asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    set_name = registry.set_name

    def slow(*arguments: str) -> registry.NameRecord:
        loop.call_soon_threadsafe(naming.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
        return set_name(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "set_name", slow)
    build_id = submit(jobs, "a", "demo")
    await settle()
    builds.runs["a"].set_result(Result(engine, reused=False))
    await naming.wait()
    cancelling = asyncio.create_task(jobs.cancel(build_id))
    await settle()
    go_on.set()
    assert state(await cancelling) == "SUCCEEDED"
    assert registry.resolve(store, "demo").engine_id == engine


async def test_a_client_that_leaves_while_it_cancels(jobs: Jobs):
    build_id = submit(jobs, "a")
    await settle()
    cancelling = asyncio.create_task(jobs.cancel(build_id))
    await asyncio.sleep(0)
    cancelling.cancel()
    assert state(await jobs.find(build_id).end()) == "CANCELLED"


async def test_a_build_that_is_being_cancelled_is_not_joined(jobs: Jobs):
    build_id = submit(jobs, "a")
    await settle()
    cancelling = asyncio.create_task(jobs.cancel(build_id))
    await asyncio.sleep(0)
    assert submit(jobs, "a") != build_id
    assert state(await cancelling) == "CANCELLED"


# Bounds and the end


async def test_close_fails_what_is_open_and_takes_no_more(jobs: Jobs, builds: Builds):
    for name in "abc":
        submit(jobs, name)
    await settle()
    await jobs.close()
    assert states(jobs) == ["FAILED"] * 3
    assert {(build.failure.code, build.failure.reason) for build in jobs.builds()} == {(14, "BUILDER_STOPPED")}
    assert sorted(builds.ended) == ["a", "b"]
    with pytest.raises(Unavailable, match="stopping"):
        submit(jobs, "d")
    await jobs.close()


async def test_ended_jobs_are_forgotten_after_some_time(jobs: Jobs, builds: Builds, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "MAX_ENDED_JOBS", 2)
    running = submit(jobs, "running")
    ended = []
    for name in "abcd":
        ended.append(submit(jobs, name))
        await settle()
        builds.runs[name].set_exception(Unavailable("gone"))
        await settle()
    assert [build.build_id for build in jobs.builds()] == [ended[3], ended[2], running]
    with pytest.raises(NotFound):
        jobs.find(ended[0])


async def test_the_queue_is_bounded(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "MAX_OPEN_JOBS", 3)
    first = [submit(jobs, name) for name in "abc"]
    with pytest.raises(ResourceExhausted, match="3 builds"):
        submit(jobs, "d")
    assert submit(jobs, "a") == first[0]
    await jobs.cancel(first[0])
    submit(jobs, "d")


# With processes


async def test_a_job_with_a_process(store: Store, tmp_path: Path):
    engine = publish(store)
    build = f"for done in range(5):\n    progress('weights', done, 4)\nresult({engine!r}, reused=True)"
    jobs = Jobs(store, BuildProcess(child(build), work_dir=tmp_path))
    job = jobs.find(submit(jobs, "a", "demo"))
    build = await asyncio.wait_for(job.end(), 20)
    assert (state(build), build.engine_id) == ("SUCCEEDED", engine)
    assert [short(event) for event in await seen(job)] == [
        "QUEUED",
        "RUNNING",
        "weights 0/4",
        "weights 4/4",
        "RUNNING",
        "SUCCEEDED",
    ]


async def test_a_process_that_is_killed_fails_its_job_alone(store: Store, tmp_path: Path):
    build = "if request['checkpoint'] == 'bad': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.2); result()"
    jobs = Jobs(store, BuildProcess(child(build), work_dir=tmp_path), 2)
    bad, good = jobs.find(submit(jobs, "bad")), jobs.find(submit(jobs, "good"))
    assert "killed by SIGKILL, probably out of memory" in (await bad.end()).failure.message
    assert state(await good.end()) == "SUCCEEDED"
