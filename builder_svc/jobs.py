"""The queue of builds: in the order in which they come, as many at a time as the service allows.

Jobs live on the event loop, and their records end with the service.
"""

import asyncio
import logging
import secrets
import time

from builder_svc.job import Job
from builder_svc.process import BuildProcess, BuildRequest
from engine import registry
from engine.errors import EnginehouseError, NotFound, ResourceExhausted, Unavailable
from engine.store import Store
from protos.rpc import to_failure
from protos.v1.builder_pb2 import Build, BuildSpec

MAX_OPEN_JOBS = 1000
MAX_ENDED_JOBS = 1000

log = logging.getLogger(__name__)


class Jobs:
    """Runs jobs in the order in which they come, at most `limit` at a time.

    Args:
        store: holds the names that builds give to their engines.
        process: runs one build.
        limit: builds at a time.
    """

    def __init__(self, store: Store, process: BuildProcess, limit: int = 1) -> None:
        self._store = store
        self._process = process
        self._slots = asyncio.Semaphore(limit)
        self._jobs: dict[str, Job] = {}  # by id, oldest first
        self._joinable: dict[tuple[BuildRequest, str], str] = {}  # what is being built -> id
        self._cancellable: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def submit(self, request: BuildRequest, spec: BuildSpec, model: str) -> Build:
        """Queues a build, or joins the same one that is queued or running.

        Args:
            request: what the build process is asked for.
            spec: what the client asked for, for the record.
            model: the name to give to the engine; empty for none.

        Raises:
            Unavailable: the service is stopping.
            ResourceExhausted: too many jobs wait.
        """
        if self._closing:
            raise Unavailable("the builder is stopping: submit the build again", reason="BUILDER_STOPPING")
        key = (request, model)
        same = self._jobs.get(self._joinable.get(key, ""))
        if same and not same.ended:
            return same.build
        if len(self._tasks) >= MAX_OPEN_JOBS:
            raise ResourceExhausted(f"{len(self._tasks)} builds are waiting: try again later", reason="QUEUE_FULL")
        build_id = f"{time.time_ns():016x}{secrets.token_hex(4)}"
        job = self._jobs[build_id] = Job(build_id, spec, model)
        self._joinable[key] = build_id
        task = self._cancellable[build_id] = asyncio.create_task(self._run(job, request), name=f"build {build_id}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(job, key, task))
        return job.build

    def find(self, build_id: str) -> Job:
        """A job. Raises NotFound."""
        if build_id not in self._jobs:
            raise NotFound(f"no build {build_id!r}", reason="BUILD_NOT_FOUND", metadata={"build_id": build_id})
        return self._jobs[build_id]

    def builds(self) -> list[Build]:
        """All jobs, newest first."""
        return [job.build for job in reversed(self._jobs.values())]

    async def cancel(self, build_id: str) -> Build:
        """Ends a job and returns it as it ended; one that ended before, or that has its engine already, is left alone."""
        job = self.find(build_id)
        self._cancel(build_id)
        return await job.end()

    async def close(self) -> None:
        """Fails what is queued and running, and returns when every build process has ended."""
        self._closing = True
        for build_id in list(self._cancellable):
            self._cancel(build_id)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _cancel(self, build_id: str) -> None:
        """Once at most: a second cancellation would interrupt the orderly end of the process."""
        if task := self._cancellable.pop(build_id, None):
            task.cancel()
            for key in [key for key, joinable in self._joinable.items() if joinable == build_id]:
                del self._joinable[key]

    async def _run(self, job: Job, request: BuildRequest) -> None:
        try:
            async with self._slots:
                job.start()
                result = await self._process.run(request, job.progress)
                self._cancellable.pop(job.build.build_id, None)  # from here on a cancel comes too late
                job.built(result.engine_id, result.reused)
                if job.build.model:
                    await asyncio.to_thread(registry.set_name, self._store, job.build.model, result.engine_id)
                job.succeed()
        except Exception as error:
            if not isinstance(error, EnginehouseError):
                log.exception("build %s", job.build.build_id)
            job.fail(to_failure(error))

    def _ended(self, job: Job, key: tuple[BuildRequest, str], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        build_id = job.build.build_id
        self._cancellable.pop(build_id, None)
        if self._joinable.get(key) == build_id:
            del self._joinable[key]
        if not job.ended:  # its task was cancelled, perhaps before its first step
            if self._closing:
                job.fail(
                    to_failure(Unavailable("the builder was stopped: submit the build again", reason="BUILDER_STOPPED"))
                )
            else:
                job.cancel()
        for old in [found for found, job in self._jobs.items() if job.ended][:-MAX_ENDED_JOBS]:
            del self._jobs[old]
