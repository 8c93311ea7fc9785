"""One builder's attempt at a job: claims it, builds, keeps the log growing, and gives the job back or ends it."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from builder_svc import joblog
from builder_svc.job import Job
from builder_svc.joblog import Action, JobLog
from builder_svc.process import BuildProcess, BuildRequest, Result
from engine import registry
from engine.errors import EnginehouseError
from engine.store import Store
from protos.rpc import from_failure, to_failure
from protos.v1.builder_pb2 import Build, BuildState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How often builders write and look; seconds.

    Attributes:
        poll: between two looks at the queue.
        save: between two segments of a job's log while there is news, at first; longer for a long build.
        beat: between two segments at most.
        lease: a log that has not grown for so long has lost its builder.
        watch: between two looks at a log that another builder writes, for somebody who watches it.
    """

    poll: float = 2.0
    save: float = 0.2
    beat: float = 5.0
    lease: float = 20.0
    watch: float = 0.5


@dataclass(frozen=True)
class Builder:
    """What all attempts of a builder share.

    Attributes:
        name: of this builder, unlike every other's.
        process: runs one build.
        store: waits long when it is away.
        prepare: makes of a job's request what this builder's process is to do; raises what forbids it.
        finish: called in a thread with what a build has made, before the engine gets its name.
    """

    name: str
    store: Store
    process: BuildProcess
    prepare: Callable[[BuildRequest], BuildRequest]
    finish: Callable[[Result], None]
    pace: Pace


class Attempt:
    """Runs one job, whose log it writes alone until `run` returns. Must not be cancelled: `cancel` and `release` end it.

    Attributes:
        claimed: the job was this builder's.
        unrecorded: why what came of the job cannot be written, while it cannot; with what it failed with, if it did.

    Args:
        lock: held by whoever uses the log.
        news: called when the log has grown.
    """

    def __init__(self, builder: Builder, job_log: JobLog, lock: asyncio.Lock, news: Callable[[], None]) -> None:
        self._builder = builder
        self._log = job_log
        self._lock = lock
        self._news = news
        self.claimed = False
        self.unrecorded: EnginehouseError | None = None
        self._work: asyncio.Task[None] | None = None
        self._done = asyncio.Event()  # the work is
        self._stop: Literal["", "cancel", "release", "lost"] = ""
        self._too_late = False  # for a cancel: the engine is there
        self._closing = False
        self._trouble: EnginehouseError | None = None  # with the last write

    def cancel(self) -> None:
        """The job is to end, unless its engine is there already."""
        self._interrupt("cancel")

    def release(self) -> None:
        """The builder stops: the job is to be left to another one, unless its engine is there already."""
        self._closing = True
        self._interrupt("release")

    async def run(self) -> None:
        """Returns when the job has ended, was given back, or turns out to be somebody else's."""
        async with self._lock:
            if self._log.owner or self._log.ended:  # somebody was faster
                return
            job = Job(self._log.events)
            job.start()
            if not await self._write("claim", job):
                return
        self.claimed = True
        self._news()
        if self._log.cancel_requested:
            self._interrupt("cancel")
        if not self._stop:
            self._work = asyncio.create_task(self._build(job))
            saving = asyncio.create_task(self._keep_saving(job))
            await asyncio.wait((self._work,))
            self._done.set()
            await saving
        if not job.ended and self._stop == "cancel":
            job.cancel()
        elif not job.ended and (self._stop == "release" or self._closing):
            job.release()
        if self._stop != "lost":
            await self._end(job)

    async def _build(self, job: Job) -> None:
        try:
            request = await asyncio.to_thread(self._builder.prepare, self._log.request)
            result = await self._builder.process.run(request, job.progress, job.log)
            self._too_late = True
            job.built(result.engine_id, result.reused)
            # a builder that was taken for dead must not name what others have built since
            if not await self._record("write", job):
                return
            await asyncio.to_thread(self._builder.finish, result)
            if model := job.build.model:
                await asyncio.to_thread(registry.set_name, self._builder.store, model, result.engine_id)
            job.succeed()
        except Exception as error:
            if not isinstance(error, EnginehouseError):
                log.exception("build %s", self._log.build_id)
            job.fail(to_failure(error))

    async def _record(self, action: Action, job: Job) -> bool:
        """Writes what is new, as often as it takes; false if the job is another's, or the builder stops meanwhile."""
        while not await self._save(action, job):
            if self._closing or self._stop == "lost":
                return False
            if self._trouble:
                self.unrecorded = _unrecorded(job.build, self._trouble)
                self._news()
            await asyncio.sleep(self._builder.pace.poll)
        self.unrecorded = None
        return True

    def _interrupt(self, why: Literal["cancel", "release"]) -> None:
        """Once at most: a second cancellation would interrupt the orderly end of the process."""
        if not self._stop and not self._too_late:
            self._stop = why
            if self._work:
                self._work.cancel()

    def _lose(self) -> None:
        """Another builder has the job: it thought that this one had died."""
        log.warning("build %s is another builder's now", self._log.build_id)
        interrupted, self._stop = self._stop, "lost"
        if self._work and not interrupted:
            self._work.cancel()

    async def _keep_saving(self, job: Job) -> None:
        """Writes what is new, and at least every few seconds, until the work is done."""
        loop, pace = asyncio.get_running_loop(), self._builder.pace
        began = saved = loop.time()
        while not self._done.is_set() and self._stop != "lost":
            pause = min(pace.beat, max(pace.save, (loop.time() - began) / 50))
            await happened(self._done, pause)
            if (job.has_news or loop.time() - saved >= 0.9 * pace.beat) and await self._save("write", job):
                saved = loop.time()

    async def _end(self, job: Job) -> None:
        """Writes how it ended; a builder that stops meanwhile leaves it to the lease."""
        if await self._record("write" if job.ended else "release", job) and job.ended:
            try:
                await asyncio.to_thread(joblog.retire, self._builder.store, self._log)
            except EnginehouseError as error:  # whoever looks at the queue next does it
                log.warning("build %s stays in the queue for now: %s", self._log.build_id, error.message)

    async def _save(self, action: Action, job: Job) -> bool:
        """Whether it is written; what is not stays for the next time. Learns from the log what others have written."""
        try:
            while not await self._append(action, job):
                async with self._lock:
                    known = len(self._log.events)
                    await asyncio.to_thread(self._log.refresh)
                if self._log.ended and job.ended:
                    return True
                if self._log.owner != self._builder.name:
                    self._lose()
                    return False
                job.kept(len(self._log.events) - known)  # a write of ours whose answer was lost
                if self._log.cancel_requested:
                    self._interrupt("cancel")
        except EnginehouseError as error:
            log.warning("build %s cannot be recorded now: %s", self._log.build_id, error.message)
            self._trouble = error
            return False
        return True

    async def _append(self, action: Action, job: Job) -> bool:
        async with self._lock:
            written = await self._write(action, job)
        if written:
            self._news()
        return written

    async def _write(self, action: Action, job: Job) -> bool:
        events = job.pending()
        written = await asyncio.to_thread(self._log.append, action, self._builder.name, events)
        if written:
            job.kept(len(events))
        return written


async def happened(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event has happened, or after some time.

    Not with `wait_for`, which before Python 3.12 may lose a cancellation that comes together with the event.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _unrecorded(build: Build, trouble: EnginehouseError) -> EnginehouseError:
    state = BuildState.Name(build.state).removeprefix("BUILD_STATE_")
    failure = to_failure(trouble)
    if build.HasField("failure"):
        failure.CopyFrom(build.failure)
    failure.message = f"{failure.message}. (Build {build.build_id} is {state}; not recorded yet: {trouble.message})"
    return from_failure(failure)
