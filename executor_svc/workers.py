"""The front's side: worker processes, and the clients whose streams they feed."""

import asyncio
import contextvars
import itertools
import logging
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable

from engine.errors import EnginehouseError, ResourceExhausted, Unavailable
from executor_svc.frames import frame, read_frames
from executor_svc.launch import Spares
from protos.rpc import from_failure, to_failure
from protos.v1.executor_pb2 import (
    EngineLost,
    EngineState,
    EngineStatus,
    LoadEngineProgress,
    LoadEngineRequest,
    StepOutput,
)
from protos.v1.worker_pb2 import EngineMetrics, FromWorker, ToWorker

MAX_BUFFERED = 16 << 20  # bytes of step outputs that wait for a client to read; a minute or so of a full batch

log = logging.getLogger(__name__)


class Client:
    """One Run or Generate stream: serialized StepOutputs for it, in order.

    Args:
        on_failure: called when the stream has failed, before its reader knows; it may be a reader that never comes.
    """

    _numbers = itertools.count(1)

    def __init__(self, on_failure: Callable[["Client"], None]) -> None:
        self.number = next(self._numbers)
        self._outputs: deque[bytes] = deque()
        self._buffered = 0
        self._news = asyncio.Event()
        self._done = False
        self._draining: set[str] | None = None
        self._error: EnginehouseError | None = None
        self._on_failure = on_failure

    def put(self, output: bytes) -> None:
        """Adds an output. A client that leaves more than MAX_BUFFERED bytes unread fails."""
        if self._error:
            return
        self._outputs.append(output)
        self._buffered += len(output)
        if self._buffered > MAX_BUFFERED:
            message = f"the client has left more than {MAX_BUFFERED >> 20} MiB of step outputs unread"
            self.fail(ResourceExhausted(message, reason="CLIENT_TOO_SLOW"))
        self._news.set()

    def fail(self, error: EnginehouseError) -> None:
        """Ends the whole stream with an error, whatever is still buffered."""
        if self._error is None:
            self._error = error
            self._outputs.clear()
            self._news.set()
            self._on_failure(self)

    def drain(self, engine_ids: set[str]) -> None:
        """The client will send no more: the stream ends when these engines have told all."""
        self._draining = engine_ids
        self._check_done()

    def drained(self, engine_id: str) -> None:
        """An engine has nothing more for this client."""
        if self._draining is not None:
            self._draining.discard(engine_id)
            self._check_done()

    def _check_done(self) -> None:
        self._done = not self._draining
        self._news.set()

    async def outputs(self) -> AsyncIterator[bytes]:
        """The outputs as they come. Raises what the stream has failed with."""
        while True:
            if self._error:
                raise self._error
            if self._outputs:
                output = self._outputs.popleft()
                self._buffered -= len(output)
                yield output
            elif self._done:
                return
            else:
                self._news.clear()
                await self._news.wait()


class WorkerProcess:
    """One engine's worker: started, watched, spoken to.

    Attributes:
        ready: done when the engine is; its exception says why it never was.
        ended: done when the process has, with the reason.
        status: as GetStatus reports it.
        progress: the newest of loading.

    Args:
        clients: all streams of the front, by number.
        on_end: called once, when the process has ended, before any client hears of it.
        on_metrics: called with what the process has counted.
    """

    def __init__(
        self,
        engine_id: str,
        clients: dict[int, Client],
        on_end: Callable[["WorkerProcess"], None],
        on_metrics: Callable[[EngineMetrics], None] = lambda _: None,
    ) -> None:
        self.engine_id = engine_id
        self.status = EngineStatus(engine_id=engine_id, state=EngineState.ENGINE_STATE_LOADING)
        self.progress = LoadEngineProgress()
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[EnginehouseError] = loop.create_future()
        self.stopping = False
        self._clients = clients
        self._on_end, self._on_metrics = on_end, on_metrics
        self._failure: EnginehouseError | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def serving(self) -> bool:
        """Whether requests can be sent to it."""
        return self.status.state == EngineState.ENGINE_STATE_READY and not self.ended.done()

    @property
    def pid(self) -> int:
        """Of the process; 0 while there is none."""
        return self._process.pid if self._process else 0

    async def start(self, spares: Spares) -> None:
        """Takes a process and tells it the engine.

        Raises:
            Unavailable: the system gives no process or socket; the worker counts as ended.
        """
        try:
            self._process, connection = spares.take()
            reader, self._writer = await asyncio.open_connection(sock=connection)
        except OSError as error:
            self._failure = Unavailable(f"cannot start a worker process: {error}", reason="WORKER_NOT_STARTED")
            self._end("")
            raise self._failure from None
        self.send(ToWorker(load_engine=LoadEngineRequest(engine_id=self.engine_id)))
        if self.stopping:
            self._writer.close()
        alone = contextvars.Context()  # it outlives the call that has asked for it, whose id its lines must not have
        self._task = asyncio.create_task(self._read(reader, self._process), context=alone)

    def send(self, message: ToWorker) -> None:
        """Sends a message; into the void if the worker is gone, which its clients learn from EngineLost."""
        if self._writer and not self._writer.is_closing():
            self._writer.write(frame(message.SerializeToString()))

    async def stop(self, grace: float = 5) -> None:
        """Ends the process, loading or not: by closing the socket, and by SIGKILL if it does not notice in so many seconds."""
        self.stopping = True
        self.status.state = EngineState.ENGINE_STATE_UNLOADING
        if self._writer:
            self._writer.close()
        done, _ = await asyncio.wait([self.ended], timeout=grace)
        if not done and self._process:
            self._process.kill()
        await asyncio.shield(self.ended)

    async def _read(self, reader: asyncio.StreamReader, process: subprocess.Popen[bytes]) -> None:
        async for data in read_frames(reader):
            self._take(FromWorker.FromString(data))
        while (status := process.poll()) is None:  # noqa: ASYNC110  (soon over: it has closed its end)
            await asyncio.sleep(0.01)
        self._end(signal.Signals(-status).name if status < 0 else f"exit status {status}")

    def _take(self, message: FromWorker) -> None:
        kind = message.WhichOneof("message")
        client = self._clients.get(message.client)
        if kind == "step_output":
            if client:
                client.put(message.step_output)
        elif kind == "load":
            self.status.load.CopyFrom(message.load)
        elif kind == "progress":
            self.progress = message.progress
            if message.progress.HasField("engine") and not self.stopping:
                self.status.CopyFrom(message.progress.engine)
                self.ready.set_result(None)
        elif kind == "drained":
            if client:
                client.drained(self.engine_id)
        elif kind == "client_failure":
            if client:
                client.fail(from_failure(message.client_failure))
        elif kind == "metrics":
            self._on_metrics(message.metrics)
        elif kind == "failure":
            self._failure = from_failure(message.failure)

    def _end(self, how: str) -> None:
        if self._writer:
            self._writer.close()
        if self.stopping:
            error: EnginehouseError = Unavailable(
                f"engine {self.engine_id[:12]} was unloaded", reason="ENGINE_UNLOADED"
            )
        elif self._failure and not self.ready.done():
            error = self._failure
        else:
            what = f": {self._failure.message}" if self._failure else f" by {how}"
            error = Unavailable(f"the worker of engine {self.engine_id[:12]} has ended{what}", reason="ENGINE_LOST")
            log.error("%s", error.message)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # seen, even if nobody waits for it
        self.ended.set_result(error)
        self._on_end(self)
        lost = StepOutput(
            engine_lost=EngineLost(engine_id=self.engine_id, failure=to_failure(error))
        ).SerializeToString()
        for client in list(self._clients.values()):
            client.put(lost)
            client.drained(self.engine_id)
