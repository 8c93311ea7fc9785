"""The front's side: worker processes, and the clients whose streams they feed."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator

from engine.errors import EnginehouseError, ResourceExhausted, Unavailable
from executor_svc.frames import frame, read_frame
from protos.rpc import from_failure, to_failure
from protos.v1.executor_pb2 import EngineLost, EngineState, EngineStatus, LoadEngineProgress, StepOutput
from protos.v1.worker_pb2 import FromWorker, ToWorker

MAX_BUFFERED = 4096  # step outputs that wait for a client to read; a second or more of steps

log = logging.getLogger(__name__)


class Client:
    """One Run or Generate stream: serialized StepOutputs for it, in order."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self._outputs: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._overflow = self._done = False
        self._draining: set[str] | None = None

    def put(self, output: bytes) -> None:
        """Adds an output; one too many ends the stream with RESOURCE_EXHAUSTED."""
        if len(self._outputs) >= MAX_BUFFERED:
            self._overflow = True
        else:
            self._outputs.append(output)
        self._news.set()

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
        """The outputs as they come. Raises ResourceExhausted when the reader has fallen too far behind."""
        while True:
            if self._overflow:
                raise ResourceExhausted(
                    f"the client has not read {MAX_BUFFERED} step outputs", reason="CLIENT_TOO_SLOW"
                )
            if self._outputs:
                yield self._outputs.popleft()
            elif self._done:
                return
            else:
                self._news.clear()
                await self._news.wait()


class WorkerProcess:
    """One engine's worker: started, watched, spoken to.

    Attributes:
        ready: done when the engine is; its exception says why it never was.
        lost: done when the process has ended, with the reason; `crashed` if the engine had been ready and nobody ended it.
        status: as GetStatus reports it.
        progress: the newest of loading.
    """

    def __init__(self, engine_id: str, clients: dict[int, Client]) -> None:
        self.engine_id = engine_id
        self.status = EngineStatus(engine_id=engine_id, state=EngineState.ENGINE_STATE_LOADING)
        self.progress = LoadEngineProgress()
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[EnginehouseError] = loop.create_future()
        self._clients = clients
        self._failure: EnginehouseError | None = None
        self._stopping = False
        self.crashed = False

    async def start(self, arguments: list[str]) -> None:
        """Starts the process, with the worker's command line apart from --fd and --engine-id."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                sys.executable,
                "-m",
                "executor_svc.worker",
                "--fd",
                str(theirs.fileno()),
                "--engine-id",
                self.engine_id,
            ]
            self._process = await asyncio.create_subprocess_exec(
                *command,
                *arguments,
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                # Threads that wait for each other by spinning take the cores from whom they wait for, as soon as anything else
                # runs: measured on two busy cores, a model of 5 million parameters, 9 tokens/s spinning and 110 not.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._task = asyncio.create_task(self._read(reader))

    def send(self, message: ToWorker) -> None:
        """Sends a message; into the void if the worker is gone, which its clients learn from EngineLost."""
        if not self._writer.is_closing():
            self._writer.write(frame(message.SerializeToString()))

    async def stop(self) -> None:
        """Ends the process: by closing the socket, and by SIGKILL if it has not noticed after 5 seconds."""
        self._stopping = True
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5)
        except TimeoutError:
            self._process.kill()
        await self._task

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while data := await read_frame(reader):
            message = FromWorker.FromString(data)
            kind = message.WhichOneof("message")
            if kind == "step_output":
                if client := self._clients.get(message.client):
                    client.put(message.step_output)
            elif kind == "load":
                self.status.load.CopyFrom(message.load)
            elif kind == "progress":
                self.progress = message.progress
                if message.progress.HasField("engine"):
                    self.status.CopyFrom(message.progress.engine)
                    self.ready.set_result(None)
            elif kind == "drained":
                if client := self._clients.get(message.client):
                    client.drained(self.engine_id)
            elif kind == "failure":
                self._failure = from_failure(message.failure)
        self._end(await self._process.wait())

    def _end(self, status: int) -> None:
        self._writer.close()
        if self._stopping:
            error: EnginehouseError = Unavailable(
                f"engine {self.engine_id[:12]} was unloaded", reason="ENGINE_UNLOADED"
            )
        elif self._failure and not self.ready.done():
            error = self._failure
        else:
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            what = f": {self._failure.message}" if self._failure else f" by {how}"
            error = Unavailable(f"the worker of engine {self.engine_id[:12]} has ended{what}", reason="ENGINE_LOST")
        if not self.ready.done():
            self.ready.set_exception(error)
            with contextlib.suppress(EnginehouseError):
                self.ready.exception()  # seen, even if nobody waits for it
        elif not self._stopping:
            self.crashed = True
            log.error("%s", error.message)
        lost = StepOutput(
            engine_lost=EngineLost(engine_id=self.engine_id, failure=to_failure(error))
        ).SerializeToString()
        for client in self._clients.values():
            client.put(lost)
            client.drained(self.engine_id)
        self.lost.set_result(error)
