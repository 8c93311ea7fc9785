"""The front's side of worker processes."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from engine.errors import EnginehouseError, Unavailable
from executor_svc.clients import Client
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
from protos.v1.worker_pb2 import ClientDone, EngineMetrics, FromWorker, Join, ToWorker

_LOOK = 0.02  # seconds between two looks at whether requests have ended
_LAST_MOMENTS = 3.0  # seconds for the end of all ranks, whose memory the next ones will want

log = logging.getLogger(__name__)


class WorkerProcess:
    """One engine's worker: started, watched, spoken to. Of several ranks each is a process, and all of them end with the first.

    Attributes:
        ready: done when the engine is; its exception says why it never was.
        ended: done when the process has, with the reason.
        status: as GetStatus reports it.
        progress: the newest of loading.
        last_used: time.monotonic() seconds when a request was last sent.

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
        self.last_used = 0.0
        self._undrained: set[int] = set()
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
    def arriving(self) -> bool:
        """Whether weights have begun to arrive, or will not."""
        return self.progress.bytes_done > 0 or self.ready.done() or self.stopping

    @property
    def leaving(self) -> bool:
        """Whether it is being unloaded: its last requests may still run."""
        return self.status.state == EngineState.ENGINE_STATE_UNLOADING

    @property
    def busy(self) -> bool:
        """Whether it has requests, as far as it has told."""
        return self.status.load.running + self.status.load.waiting > 0

    @property
    def pid(self) -> int:
        """Of the process, of rank 0 among several; 0 while there is none."""
        return self.pids[0] if self._ranks else 0

    @property
    def pids(self) -> list[int]:
        """Of all ranks that are on this machine."""
        return [rank.pid for rank in self._ranks if rank.pid is not None]

    async def start(
        self, spares: Spares, machines: Machines | None = None, kv_memory: int = 0, memory: int | None = None
    ) -> None:
        """Takes a process and tells it the engine; more of them if the engine has more ranks.

        Args:
            machines: among which the ranks are divided; none: this one has them all.
            kv_memory: bytes of KV cache that each rank gets; 0 for what it finds right.
            memory: bytes that weights and KV cache may take; None is no limit.

        Raises:
            Unavailable: the system gives no process or socket; the worker counts as ended.
        """
        self._spares, self._machines = spares, machines or Machines()
        self._kv_memory, self._memory = kv_memory, memory
        try:
            await self._launch(self._machines.count, 0)
        except OSError as error:
            failure = _not_started(error)
            self._end("", failure)
            raise failure from None
        first = LoadEngineRequest(engine_id=self.engine_id, kv_memory_bytes=kv_memory)
        to = self._machines
        self.send(ToWorker(load_engine=first, machines=to.count, host=to.host, memory_bytes=memory))

    def send(self, message: ToWorker) -> None:
        """Sends a message; into the void if the worker is gone, which its clients learn from EngineLost."""
        if self._ranks:
            self._ranks[0].send(message)

    async def finish(self, seconds: float) -> None:
        """Takes no more requests; returns when those that there are have ended, at the latest after so many seconds."""
        self.status.state = EngineState.ENGINE_STATE_UNLOADING
        self._undrained = {number for number, client in self._clients.items() if self in client.used}
        for number in self._undrained:
            self.send(ToWorker(client=number, client_done=ClientDone()))
        deadline = time.monotonic() + seconds
        while self._undrained & self._clients.keys() and time.monotonic() < deadline and not self.ended.done():  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)

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
        place = Join(
            engine_id=self.engine_id,
            world_size=count,
            local_world_size=count // self._machines.count,
            address=self._machines.address,
            port=port,
            kv_memory_bytes=self._kv_memory,
        )
        for number, rank in enumerate(self._ranks):
            place.rank, place.local_rank = number, number % place.local_world_size
            rank.send(ToWorker(join=place, memory_bytes=self._memory))

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
            self._undrained.discard(message.client)
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
