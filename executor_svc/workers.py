"""The front's side: worker processes, and the clients whose streams they feed."""

import asyncio
import contextvars
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from engine.errors import EnginehouseError, ResourceExhausted, Unavailable
from executor_svc.launch import Spares
from executor_svc.machines import Machines
from executor_svc.rank_process import LocalRank, RankProcess
from protos.rpc import from_failure, to_failure
from protos.v1.executor_pb2 import (
    EngineLost,
    EngineState,
    EngineStatus,
    LoadEngineProgress,
    LoadEngineRequest,
    StepOutput,
)
from protos.v1.worker_pb2 import EngineMetrics, FromWorker, Join, ToWorker

MAX_BUFFERED = 16 << 20  # bytes of step outputs that wait for a client to read; a minute or so of a full batch

_LAST_MOMENTS = 3.0  # seconds for the end of all ranks, whose memory the next ones will want

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
    """One engine's worker: started, watched, spoken to. Of several ranks each is a process, and all of them end with the first.

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
        self._ranks: list[RankProcess] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._launching = asyncio.Lock()
        self._ending = False

    @property
    def serving(self) -> bool:
        """Whether requests can be sent to it."""
        return self.status.state == EngineState.ENGINE_STATE_READY and not self.ended.done()

    @property
    def pid(self) -> int:
        """Of the process, of rank 0 among several; 0 while there is none."""
        return self.pids[0] if self._ranks else 0

    @property
    def pids(self) -> list[int]:
        """Of all ranks that are on this machine."""
        return [rank.pid for rank in self._ranks if rank.pid is not None]

    async def start(self, spares: Spares, machines: Machines | None = None) -> None:
        """Takes a process and tells it the engine; more of them if the engine has more ranks.

        Args:
            machines: among which the ranks are divided; none: this one has them all.

        Raises:
            Unavailable: the system gives no process or socket; the worker counts as ended.
        """
        self._spares, self._machines = spares, machines or Machines()
        try:
            await self._launch(self._machines.count, 0)
        except OSError as error:
            failure = _not_started(error)
            self._end("", failure)
            raise failure from None
        first = LoadEngineRequest(engine_id=self.engine_id)
        self.send(ToWorker(load_engine=first, machines=self._machines.count, host=self._machines.host))

    def send(self, message: ToWorker) -> None:
        """Sends a message; into the void if the worker is gone, which its clients learn from EngineLost."""
        if self._ranks:
            self._ranks[0].send(message)

    async def stop(self, grace: float = 5) -> None:
        """Ends the process, loading or not: by closing the socket, and by SIGKILL if it does not notice in so many seconds."""
        self.stopping = True
        self.status.state = EngineState.ENGINE_STATE_UNLOADING
        for rank in self._ranks:
            rank.close()
        done, _ = await asyncio.wait([self.ended], timeout=grace)
        if not done:
            self._kill()
        await asyncio.shield(self.ended)

    async def prepare(self, ranks: int, most: int | None = None, patience: float = 0) -> None:
        """Sees to it that an engine's ranks have their process, which waits.

        Args:
            most: processes in all that are wanted so far.
            patience: seconds to wait for a machine that has not come.

        Raises:
            Unavailable: it has not.
            OSError: the system gives no process.
        """
        async with self._launching:
            while len(self._ranks) < min(ranks, most or ranks) and not (self.stopping or self._ending):
                await self._launch(ranks, patience)

    async def _launch(self, ranks: int, patience: float) -> None:
        """Takes the process of the next of so many ranks, and listens to it. Raises as `prepare`."""
        number = len(self._ranks)
        machine = number * self._machines.count // ranks
        rank: RankProcess
        if machine:
            rank = await self._machines.launch(machine, patience)
        else:
            rank = await LocalRank.launch(self._spares)
        self._ranks.append(rank)
        if self.stopping or self._ending:
            rank.close()
            rank.kill()
        self._run(self._read(number, rank))

    async def _launch_others(self, count: int, port: int) -> None:
        """Starts the ranks behind 0, and tells all where they meet."""
        first = self._ranks[0]
        try:
            await self.prepare(count, patience=self._machines.patience)
        except (Unavailable, OSError) as error:
            first.failure = _not_started(error) if isinstance(error, OSError) else error
            first.kill()  # with which the others end
            return
        place = Join(engine_id=self.engine_id, world_size=count, address=self._machines.address, port=port)
        place.local_world_size = count // self._machines.count
        for number, rank in enumerate(self._ranks):
            place.rank, place.local_rank = number, number % place.local_world_size
            rank.send(ToWorker(join=place))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        alone = contextvars.Context()  # it outlives the call that has asked for it, whose id its lines must not have
        self._tasks.append(asyncio.create_task(work, context=alone))

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.kill()

    async def _read(self, number: int, rank: RankProcess) -> None:
        async for data in rank.messages():
            message = FromWorker.FromString(data)
            if message.HasField("failure"):
                if rank.where:
                    message.failure.message = f"{rank.where}: {message.failure.message}"
                rank.failure = from_failure(message.failure)
            elif number == 0:
                self._take(message)
        if self._ending:  # another rank has ended before
            return
        self._ending = True
        how = await rank.ended()  # soon: it has closed its end
        if not self.stopping:  # none of the others can go on; those that are stopped end by themselves
            self._kill()
        try:
            async with asyncio.timeout(_LAST_MOMENTS):
                for other in self._ranks:
                    await other.ended()
        except TimeoutError:
            self._kill()
        self._end(how, rank.failure, number)

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
        elif kind == "ranks":
            self._run(self._launch_others(message.ranks, message.port))

    def _end(self, how: str, failure: EnginehouseError | None, number: int = 0) -> None:
        for rank in self._ranks:
            rank.close()
        if self.stopping:
            error: EnginehouseError = Unavailable(
                f"engine {self.engine_id[:12]} was unloaded", reason="ENGINE_UNLOADED"
            )
        elif failure and not self.ready.done():
            error = failure
        else:
            what = f": {failure.message}" if failure else f" by {how}"
            which = f"rank {number} of the workers" if len(self._ranks) > 1 else "the worker"
            error = Unavailable(f"{which} of engine {self.engine_id[:12]} has ended{what}", reason="ENGINE_LOST")
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


def _not_started(error: OSError) -> Unavailable:
    return Unavailable(f"cannot start a worker process: {error}", reason="WORKER_NOT_STARTED")
