"""An engine's worker process, as an executor has it, without a service around it."""

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence

from engine.errors import EnginehouseError, Internal, Unavailable
from executor_svc.clients import Client
from executor_svc.launch import Spares
from executor_svc.workers import WorkerProcess
from gateway.inbox import Inbox
from gateway.inboxes import Inboxes
from protos.v1.executor_pb2 import Cancel, EngineLoad, StepOutput, Submit
from protos.v1.worker_pb2 import EngineMetrics, ToWorker

_LAST_LINES = 12
_LAST_BYTES = 16_384


class LocalWorker:
    """Loads an engine in a process of its own and speaks with it; a `gateway.generation.Executor`. Lives on one event loop.

    Attributes:
        error: why nothing can be sent any more; None while it runs.
        counted: what the process has told of its work, added up.
    """

    def __init__(self, engine_id: str, ranks: int, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the processes, which import torch meanwhile.

        Args:
            ranks: that the engine has.
            arguments: of `executor_svc.worker`.

        Raises:
            Unavailable: the system gives no process.
        """
        self.error: EnginehouseError | None = None
        self.counted = EngineMetrics()
        self._engine_id = engine_id
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        self._spares = Spares(arguments, environment=environment, log=self._log)
        try:
            self._spares.prepare(ranks)
        except OSError as error:
            raise Unavailable(f"cannot start a worker process: {error}", reason="WORKER_NOT_STARTED") from None
        self._inboxes = Inboxes(self.cancel)
        self._client = Client(on_failure=lambda _: None)
        self._process: WorkerProcess | None = None

    async def start(self) -> None:
        """Loads the engine; raises why it can't be."""
        clients = {self._client.number: self._client}
        process = self._process = WorkerProcess(self._engine_id, clients, self._ended, self._add)
        await process.start(self._spares)
        self._reading = asyncio.create_task(self._read())
        try:
            await asyncio.shield(process.ready)
        except EnginehouseError as error:
            raise self.error if self.error and error.reason == "ENGINE_LOST" else error from None

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes loaded and in all; (0, 0) before that is known."""
        if self._process is None:
            return 0, 0
        return self._process.progress.bytes_done, self._process.progress.bytes_total

    @property
    def load(self) -> EngineLoad:
        """How busy it is, as it has told last: at most 0.1 s ago."""
        return self._started().status.load

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._started().pid

    def send(self, submit: Submit, news: asyncio.Event) -> Inbox:
        """Sends a request and gives its inbox, which sets `news`. Raises `error`."""
        if self.error:
            raise self.error
        inbox = Inbox(submit.engine_id, news)
        self._inboxes.open(submit, inbox)
        self._started().send(ToWorker(client=self._client.number, submit=submit, arrived=time.monotonic()))
        return inbox

    def cancel(self, inbox: Inbox) -> None:
        """Cancels a request that has not ended; does nothing for one that has."""
        if self._inboxes.forget(inbox.handle):
            self._started().send(ToWorker(client=self._client.number, cancel=Cancel(handles=[inbox.handle])))

    async def stop(self) -> None:
        """Ends the process at once: it holds nothing that could be lost."""
        self._spares.close()
        if self._process:
            await self._process.stop(grace=0)
        self._log.close()

    def _started(self) -> WorkerProcess:
        if self._process is None:
            raise Internal("the worker process has not been started")
        return self._process

    async def _read(self) -> None:
        async for data in self._client.outputs():
            self._inboxes.deliver(StepOutput.FromString(data))

    def _add(self, news: EngineMetrics) -> None:
        total = self.counted
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "preemptions"):
            setattr(total, name, getattr(total, name) + getattr(news, name))

    def _ended(self, process: WorkerProcess) -> None:
        if process.stopping:
            self.error = Unavailable("it was shut down: make another one", reason="EXECUTOR_SHUT_DOWN")
        else:
            how = process.ended.result().message
            said = "".join(f"\n  | {line}" for line in self._last_lines()) or " nothing"
            self.error = Unavailable(f"{how}: make another one. The end of its log:{said}", reason="ENGINE_LOST")
        self._inboxes.fail(self.error)

    def _last_lines(self) -> list[str]:
        self._log.seek(0, 2)
        self._log.seek(max(self._log.tell() - _LAST_BYTES, 0))
        return self._log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
