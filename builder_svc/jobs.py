"""This builder's part of the queue: takes jobs in the order in which they came, as many at a time as it may, from the store.

All builders of a store look at the same queue (`joblog.py`). A job whose builder has died is given free by any other one.
"""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable

import msgspec

from builder_svc import joblog
from builder_svc.attempt import Attempt, Builder, Pace, happened
from builder_svc.job import Job
from builder_svc.joblog import JobLog
from builder_svc.process import BuildProcess, BuildRequest, Result
from engine.errors import DataLoss, EnginehouseError, Unavailable
from engine.store import Store
from protos.rpc import to_failure
from protos.v1.builder_pb2 import Build, BuildEvent, BuildSpec

MAX_DEATHS = 3  # of builders with one job, before it is given up
_KEPT_LOGS = 200  # of ended jobs, for those who ask again

log = logging.getLogger(__name__)


class _Known:
    """A log, and what this builder knows of it."""

    def __init__(self, store: Store, build_id: str) -> None:
        self.log = JobLog(store, build_id)
        self.lock = asyncio.Lock()
        self.attempt: Attempt | None = None  # while this builder has the job
        self.quiet_since: float | None = None  # loop time of the first look at the log as it is
        self._news = asyncio.Event()  # set, and replaced, when the log has grown

    def told(self) -> None:
        """The log has grown."""
        news, self._news = self._news, asyncio.Event()
        self.quiet_since = None
        news.set()

    async def wait(self, seconds: float) -> None:
        """Returns when the log has grown, or after some time."""
        await happened(self._news, seconds)

    async def use(self, function: Callable[[], object]) -> None:
        """Runs in a thread what reads or writes the log, alone, and to its end even if the caller is cancelled."""

        async def run() -> None:
            async with self.lock:
                number = self.log.number
                await asyncio.to_thread(function)
            if self.log.number != number:
                self.told()

        running = asyncio.create_task(run())
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may have left
        await asyncio.shield(running)

    async def refresh(self) -> None:
        """Reads what others have written."""
        await self.use(self.log.refresh)


class Jobs:
    """Runs jobs in the order in which they come, at most `limit` at a time.

    Args:
        store: holds the jobs, and the names that builds give to their engines.
        process: runs one build.
        limit: builds at a time.
        patient: the same store, opened to wait longer when it is away: what a finished build needs must not fail soon.
        prepare: makes of a job's request what this builder's process is to do, in a thread; raises what forbids it.
        finish: called in a thread with what a build has made, before the engine gets its name.
        ended: called when this builder has no longer a job that it had, with the job and the seconds for which it had it.

    Attributes:
        num_queued: jobs that nobody has, as far as this builder knew when it last looked at the queue.
    """

    def __init__(
        self,
        store: Store,
        process: BuildProcess,
        limit: int = 1,
        *,
        patient: Store | None = None,
        prepare: Callable[[BuildRequest], BuildRequest] | None = None,
        finish: Callable[[Result], None] = lambda _: None,
        ended: Callable[[Build, float], None] = lambda *_: None,
        pace: Pace = Pace(),  # noqa: B008  (frozen)
    ) -> None:
        self._store = store
        self._limit = limit
        self._tell_end = ended
        self.num_queued = 0
        self._pace = pace
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        here = prepare or (lambda request: msgspec.structs.replace(request, store=store.url))
        self._builder = Builder(name, patient or store, process, here, finish, pace)
        self._known: dict[str, _Known] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._damaged: set[str] = set()  # jobs whose records cannot be read
        self._look_now = asyncio.Event()
        self._closing = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        """Jobs that this builder has."""
        return len(self._running)

    def start(self) -> None:
        """Begins to take jobs."""
        self._looking = asyncio.create_task(self._keep_looking(), name="queue")

    async def submit(self, request: BuildRequest, spec: BuildSpec, model: str) -> Build:
        """Queues a build, or joins the same one that is queued or running at any builder.

        Args:
            request: what the build process is asked for, as far as it does not depend on the builder.
            spec: what the client asked for, for the record.
            model: the name to give to the engine; empty for none.

        Raises:
            Unavailable: the service is stopping.
            ResourceExhausted: too many jobs wait.
        """
        if self._closing.is_set():
            raise Unavailable("the builder is stopping: submit the build again", reason="BUILDER_STOPPING")
        submitted = await asyncio.to_thread(joblog.submit, self._store, self._builder.name, request, spec, model)
        self._look_now.set()
        return submitted.build

    async def find(self, build_id: str) -> Build:
        """A job as it is now. Raises NotFound."""
        return await asyncio.to_thread(joblog.find, self._store, build_id)

    async def builds(self) -> list[Build]:
        """Jobs that are open and the last that have ended, newest first."""
        return await asyncio.to_thread(joblog.builds, self._store)

    async def events(self, build_id: str, first: int = 0) -> AsyncIterator[BuildEvent]:
        """The job's events from the number `first` on, as they are recorded, until its end.

        Raises:
            NotFound: there is no such job.
            Unavailable: the service is stopping; the job may go on elsewhere.
            EnginehouseError: the job has ended, and the store does not take it.
        """
        known = await self._know(build_id)
        while True:
            ended = known.log.ended  # before the events are looked at: none comes after
            while first < len(known.log.events):
                yield known.log.events[first]
                first += 1
            if ended:
                return
            await self._wait(known)

    async def cancel(self, build_id: str) -> Build:
        """Ends a job and returns it as it ended; one that ended before, or that has its engine already, is left alone.

        Raises as `events` does.
        """
        known = await self._know(build_id)
        if not known.log.ended:
            await asyncio.to_thread(joblog.leave, self._store, known.log)
        while not known.log.ended:
            if known.attempt:
                known.attempt.cancel()
            else:
                await known.use(lambda: self._ask_to_cancel(known.log))
            if not known.log.ended:
                await self._wait(known)
        if not known.attempt:
            await asyncio.to_thread(joblog.retire, self._store, known.log)
        return known.log.build

    def _ask_to_cancel(self, job_log: JobLog) -> None:
        """Of a job that this builder does not have: cancels it, or asks its builder to, unless somebody is faster."""
        if job_log.owner:
            if not job_log.cancel_requested:
                job_log.append("cancel", self._builder.name)
        elif not job_log.ended:
            job = Job(job_log.events)
            job.cancel()
            job_log.append("claim", self._builder.name, job.pending())

    async def _wait(self, known: _Known) -> None:
        """Returns when a job's log may have grown. Raises why nobody can tell."""
        if known.attempt and known.attempt.unrecorded:
            raise known.attempt.unrecorded
        if self._closing.is_set() and not known.attempt:
            raise Unavailable(
                f"this builder stops; build {known.log.build_id} goes on at the next one: watch it again",
                reason="BUILDER_STOPPING",
            )
        await known.wait(self._pace.watch)
        if not known.attempt:
            await known.refresh()

    async def close(self) -> None:
        """Gives back what is running, and returns when every build process has ended."""
        self._closing.set()
        if self._looking:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        for known in self._known.values():
            if known.attempt:
                known.attempt.release()
        if self._running:
            await asyncio.wait(self._running.values())
        for known in self._known.values():
            known.told()

    async def _know(self, build_id: str) -> _Known:
        """A job's log, as it is now. Raises NotFound."""
        known = self._known.setdefault(joblog.check_id(build_id), _Known(self._store, build_id))
        if not known.attempt and not known.log.ended:
            await known.refresh()
        if known.log.number == 0:
            self._known.pop(build_id, None)
            raise joblog.not_found(build_id)
        return known

    async def _keep_looking(self) -> None:
        told = False
        while True:
            self._look_now.clear()
            try:
                await self._look()
                told = False
            except EnginehouseError as error:
                for known in self._known.values():
                    known.quiet_since = None  # nobody could write either
                if not told:
                    log.warning("the queue of builds cannot be read: %s", error.message)
                told = True
            except Exception:
                log.exception("the queue of builds")
            await happened(self._look_now, self._pace.poll)

    async def _look(self) -> None:
        """Goes through the queue once: takes what is free, gives free what nobody works on."""
        queue = await asyncio.to_thread(joblog.open_ids, self._store)
        for build_id in queue:
            known = self._known.setdefault(build_id, _Known(self._store, build_id))
            full = len(self._running) >= self._limit
            if known.attempt or (full and known.log.number and not known.log.owner):
                continue
            try:
                await self._attend(known)
            except DataLoss as error:  # this one job's record is at fault
                if build_id not in self._damaged:
                    log.error("build %s: %s", build_id, error.message)
                self._damaged.add(build_id)
        logs = [self._known[build_id].log for build_id in queue if build_id in self._known]  # one may be gone meanwhile
        self.num_queued = sum(not job_log.owner and not job_log.ended for job_log in logs)
        self._forget(set(queue))

    async def _attend(self, known: _Known) -> None:
        await known.refresh()
        job_log, loop = known.log, asyncio.get_running_loop()
        if job_log.ended:
            await asyncio.to_thread(joblog.retire, self._store, job_log)
        elif job_log.owner:
            known.quiet_since = known.quiet_since or loop.time()
            if job_log.owner == self._builder.name:
                await known.use(lambda: self._release(job_log))
                self._look_now.set()
            elif loop.time() - known.quiet_since >= self._pace.lease:
                await known.use(lambda: self._expire(job_log))
                self._look_now.set()
        elif job_log.number and len(self._running) < self._limit:
            known.attempt = Attempt(self._builder, job_log, known.lock, known.told)
            attempt, began = known.attempt, loop.time()
            task = asyncio.create_task(attempt.run(), name=f"build {job_log.build_id}")
            self._running[job_log.build_id] = task
            task.add_done_callback(lambda _: self._ended(known, attempt, loop.time() - began))

    def _expire(self, job_log: JobLog) -> None:
        """Gives free a job whose builder has died, or gives it up."""
        log.warning("build %s: its builder %s does not write any more", job_log.build_id, job_log.owner)
        job = Job(job_log.events)
        if job_log.cancel_requested:
            job.cancel()
        elif job_log.deaths + 1 >= MAX_DEATHS:
            message = f"{MAX_DEATHS} builders have died while they built it; look at the last lines of its log"
            job.fail(to_failure(Unavailable(message, reason="BUILDER_DIED")))
        else:
            job.release()
        job_log.append("expire", self._builder.name, job.pending())

    def _release(self, job_log: JobLog) -> None:
        """Gives free a job that this builder has claimed with a write whose answer was lost."""
        job = Job(job_log.events)
        job.release()
        job_log.append("release", self._builder.name, job.pending())

    def _ended(self, known: _Known, attempt: Attempt, seconds: float) -> None:
        task = self._running.pop(known.log.build_id)
        known.attempt = None
        if attempt.claimed:
            self._tell_end(known.log.build, seconds)
        if error := task.exception():
            log.error("build %s", known.log.build_id, exc_info=error)
        known.told()
        self._look_now.set()

    def _forget(self, queue: set[str]) -> None:
        """Keeps the logs of a bounded number of jobs that have ended."""
        ended = [build_id for build_id in self._known if build_id not in queue and build_id not in self._running]
        for build_id in ended[:-_KEPT_LOGS]:
            del self._known[build_id]
