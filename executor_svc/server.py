"""The executor's front process: gRPC in, worker processes behind. Holds no tensor and no torch."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

import grpc

from engine import blobs, registry
from engine.backends import open_store
from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, ResourceExhausted
from engine.store import Store
from executor_svc.budget import UNKNOWN, Budget, available, weights
from executor_svc.clients import Client
from executor_svc.drain import Drain, take_no_more
from executor_svc.launch import Spares
from executor_svc.machines import Machines
from executor_svc.residents import beside, least_used, memory_left
from executor_svc.single import single_outputs
from executor_svc.telemetry import Telemetry, name_request
from executor_svc.workers import WorkerProcess
from protos import logs, tracing
from protos.metrics import Metrics
from protos.rpc import from_failure, to_failure
from protos.v1 import executor_pb2 as pb
from protos.v1.worker_pb2 import ClientGone, ToWorker

_RELOAD_DELAY, _LONGEST_RELOAD_DELAY = 1.0, 30.0  # seconds before a worker that died is started again
_AHEAD = 8  # ranks a machine whose processes are started before it is known whether the manifest can be trusted

log = logging.getLogger(__name__)


class ExecutorServicer:
    """The Executor service over any number of engines, a worker process each.

    Args:
        spares: where the workers' processes come from; they are for this store and device.
        machines: among which the ranks of an engine are divided; none: this one has them all.
        memory: bytes that weights and KV caches of all engines may take together, of each device; None is what is free.
    """

    def __init__(
        self,
        store_url: str,
        device: str,
        spares: Spares,
        metrics: Metrics | None = None,
        machines: Machines | None = None,
        memory: int | None = None,
    ) -> None:
        self._memory = memory
        self._store: Store = open_store(store_url)
        self._device = device
        self._spares, self._machines = spares, machines or Machines()
        self._workers: dict[str, WorkerProcess] = {}
        self._clients: dict[int, Client] = {}
        self._drain = Drain(self._clients)
        self._telemetry = Telemetry(
            metrics or Metrics(), lambda: list(self._workers.values()), lambda: self._drain.begun
        )
        self._wanted: dict[
            str, int
        ] = {}  # engines that have been loaded and not unloaded, and the KV cache that was given
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service. Run's outputs are serialized in the worker already."""
        identity = bytes
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "LoadEngine": grpc.unary_stream_rpc_method_handler(
                self.LoadEngine, pb.LoadEngineRequest.FromString, pb.LoadEngineProgress.SerializeToString
            ),
            "UnloadEngine": grpc.unary_unary_rpc_method_handler(
                self.UnloadEngine, pb.UnloadEngineRequest.FromString, pb.UnloadEngineResponse.SerializeToString
            ),
            "GetStatus": grpc.unary_unary_rpc_method_handler(
                self.GetStatus, pb.GetStatusRequest.FromString, pb.ExecutorStatus.SerializeToString
            ),
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.Generate, pb.Submit.FromString, pb.GenerateOutput.SerializeToString
            ),
            "Run": grpc.stream_stream_rpc_method_handler(self.Run, pb.Command.FromString, identity),
        }
        name = pb.DESCRIPTOR.services_by_name["Executor"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    async def resolve(self, engine: str) -> str:
        """The engine id behind a model name or an id. Raises NotFound."""
        return await asyncio.to_thread(registry.find_engine, self._store, engine)

    async def open(self, engine: str) -> None:
        """Loads an engine by name or id, to the end."""
        await asyncio.shield((await self.load(await self.resolve(engine))).ready)

    async def load(self, engine_id: str, kv_memory: int = 0) -> WorkerProcess:
        """The engine's worker, started if there is none; it may still be loading.

        Engines are loaded one after another: each takes of what the ones before have left.

        Args:
            kv_memory: bytes of KV cache; 0 leaves it to the worker.
        """
        while True:
            worker = self._workers.get(engine_id)
            if worker and worker.leaving:
                await asyncio.shield(worker.ended)
            elif worker:
                return worker
            elif loading := [other.ready for other in self._workers.values() if not other.ready.done()]:
                await asyncio.wait(loading)
            else:
                break
        left = memory_left(self._memory, self._workers.values())
        worker = self._workers[engine_id] = WorkerProcess(
            engine_id, self._clients, self._ended, lambda news: self._telemetry.add(engine_id, news)
        )
        self._telemetry.watch(worker)
        worker.ready.add_done_callback(lambda ready: ready.exception() or self._wanted.update({engine_id: kv_memory}))
        await worker.start(self._spares, self._machines, kv_memory, left)
        self._run(self._prepare_load(worker))
        return worker

    async def _check_room(self, engine_id: str, kv_memory: int) -> None:
        """Raises ResourceExhausted for an engine that does not fit, before a process is started.

        Its worker knows of GPUs, and of weights that are in no file: it may read the program, which tells of them.
        """
        if engine_id in self._workers:
            return
        manifest = await asyncio.to_thread(registry.manifest, self._store, engine_id)
        if manifest.dummy_weights:
            return
        left = memory_left(self._memory, self._workers.values())
        free = available() if self._device == "cpu" else UNKNOWN
        sizes = weights(self._store, manifest, self._device, machines=self._machines.count)
        Budget(self._device, free, left).check(manifest, sizes, kv_memory or None)

    async def _prepare_load(self, worker: WorkerProcess) -> None:
        """Starts an engine's other ranks, and reads weights ahead, before rank 0, which still imports torch, asks for them."""
        with contextlib.suppress(EnginehouseError, OSError):  # of which rank 0 tells
            manifest = await asyncio.to_thread(registry.manifest, self._store, worker.engine_id)
            await worker.prepare(len(manifest.ranks), _AHEAD * self._machines.count)
            here = manifest.ranks[: len(manifest.ranks) // self._machines.count]
            await asyncio.to_thread(
                blobs.read_ahead, self._store, [file for rank in here for file in rank.weights], lambda: worker.arriving
            )

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, lets requests end within so many seconds, then ends their streams; loads are called off at once.

        What has not ended ends with UNAVAILABLE, and can be resumed elsewhere.
        """
        self._wanted.clear()
        loading = [worker.stop() for worker in self._workers.values() if not worker.ready.done()]
        await asyncio.gather(self._drain.run(seconds), *loading)

    async def close(self) -> None:
        """Ends all workers."""
        self._wanted.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*(worker.stop() for worker in list(self._workers.values())))
        await self._machines.close()
        self._spares.close()

    async def LoadEngine(self, request: pb.LoadEngineRequest, _context: Any) -> AsyncIterator[pb.LoadEngineProgress]:
        self._drain.check()
        engine = request.engine_id or request.model
        if not engine:
            raise InvalidArgument("give an engine_id or a model name", reason="ENGINE_MISSING")
        engine_id = await self.resolve(engine)
        while True:
            try:
                await self._check_room(engine_id, request.kv_memory_bytes)
                worker = await self.load(engine_id, request.kv_memory_bytes)
                while not worker.ready.done():
                    yield worker.progress
                    await asyncio.wait([worker.ready], timeout=0.1)
                worker.ready.result()
                break
            except ResourceExhausted as error:
                if not (victim := least_used(self._workers.values()) if request.evict else None):
                    raise beside(error, self._workers.values(), request.evict) from None
                self._telemetry.evictions.add()
                log.info("engine %s makes room for %s", victim.engine_id[:12], engine_id[:12])
                await self._unload(victim)
        yield worker.progress

    async def UnloadEngine(self, request: pb.UnloadEngineRequest, _context: Any) -> pb.UnloadEngineResponse:
        worker = self._workers.get(request.engine_id)
        if worker is None and request.engine_id not in self._wanted:
            raise self._not_loaded(request.engine_id)
        self._wanted.pop(request.engine_id, None)
        if worker:  # to the end, whether or not somebody waits for it: it takes nothing new any more
            await asyncio.shield(self._run(self._unload(worker, request.drain.ToNanoseconds() / 1e9)))
        return pb.UnloadEngineResponse()

    async def _unload(self, worker: WorkerProcess, seconds: float = 0) -> None:
        """Lets its requests end for so many seconds."""
        self._wanted.pop(worker.engine_id, None)
        await worker.finish(seconds)
        await worker.stop()

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: Any) -> pb.ExecutorStatus:
        engines = [worker.status for worker in self._workers.values()]
        return pb.ExecutorStatus(
            engines=engines,
            device=self._device,
            version=version("enginehouse"),
            draining=self._drain.begun,
            memory_limit_bytes=self._memory,
        )

    async def Generate(self, request: pb.Submit, _context: Any) -> AsyncIterator[pb.GenerateOutput]:
        name_request(request)
        logs.note(engine=request.engine_id[:12])
        worker = self._admit(request)
        with self._client() as client:
            client.used.add(worker)
            worker.send(ToWorker(client=client.number, submit=request, arrived=time.monotonic()))
            async with aclosing(single_outputs(request, client)) as outputs:
                async for output in outputs:
                    yield output

    async def Run(self, requests: AsyncIterator[pb.Command], _context: Any) -> AsyncIterator[bytes]:
        with self._client() as client:
            commands = asyncio.create_task(self._take(requests, client))
            try:
                async for output in client.outputs():
                    yield output
            finally:
                commands.cancel()

    async def _take(self, commands: AsyncIterator[pb.Command], client: Client) -> None:
        """What goes wrong with a stream's commands ends the stream: nobody would wait for this task."""
        try:
            await self._forward(commands, client)
        except Exception as error:
            if not isinstance(error, EnginehouseError):
                log.exception("the commands of client %d", client.number)
            client.fail(from_failure(to_failure(error)))

    async def _forward(self, commands: AsyncIterator[pb.Command], client: Client) -> None:
        """Hands a stream's commands to the workers until the client has no more."""
        async for command in commands:
            kind = command.WhichOneof("command")
            if kind == "submit":
                command.submit.request_id = command.submit.request_id or logs.new_request_id()
                try:
                    worker = self._admit(command.submit)
                except EnginehouseError as error:
                    about = logs.fields(request_id=command.submit.request_id, reason=error.reason)
                    log.info("request refused", extra=about)
                    failed = pb.Failed(handle=command.submit.handle, failure=to_failure(error))
                    client.put(pb.StepOutput(failed=[failed]).SerializeToString())
                    continue
                client.used.add(worker)
                worker.send(ToWorker(client=client.number, submit=command.submit, arrived=time.monotonic()))
            elif kind == "cancel":
                for worker in client.used:
                    worker.send(ToWorker(client=client.number, cancel=command.cancel))
        take_no_more(client)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        """A client that the workers know until its stream ends, however it ends."""
        client = Client(on_failure=self._gone)
        self._clients[client.number] = client
        self._drain.joined(client)
        try:
            yield client
        finally:
            del self._clients[client.number]
            self._gone(client)

    def _gone(self, client: Client) -> None:
        for worker in self._workers.values():
            worker.send(ToWorker(client=client.number, client_gone=ClientGone()))

    def _admit(self, submit: pb.Submit) -> WorkerProcess:
        """The worker that a request goes to, and the span of that as the parent of the worker's own. Raises as `_worker`."""
        span = tracing.begin("submit", submit.trace_context)
        if span is None:
            return self._worker(submit.engine_id)
        reason = ""
        try:
            return self._worker(submit.engine_id)
        except EnginehouseError as error:
            reason = error.reason
            raise
        finally:
            span.inject(submit.trace_context)
            span.end(reason, enginehouse__engine=submit.engine_id[:12], enginehouse__request_id=submit.request_id)

    def _worker(self, engine_id: str) -> WorkerProcess:
        """The worker of an engine that serves. Raises FailedPrecondition, and Unavailable while the executor is being stopped."""
        self._drain.check()
        worker = self._workers.get(engine_id)
        if worker is None or not worker.serving:
            self._telemetry.refused(engine_id, "ENGINE_NOT_LOADED")
            raise self._not_loaded(engine_id)
        worker.last_used = time.monotonic()
        return worker

    def _not_loaded(self, engine_id: str) -> FailedPrecondition:
        worker = self._workers.get(engine_id)
        state = "not loaded" if worker is None else "being unloaded" if worker.leaving else "still loading"
        have = ", ".join(known[:12] for known in self._workers) or "none"
        return FailedPrecondition(
            f"engine {engine_id[:12] or '(none given)'} is {state} on this executor, which has: {have}; call LoadEngine",
            reason="ENGINE_NOT_LOADED",
        )

    def _ended(self, worker: WorkerProcess) -> None:
        """Forgets a worker that has ended; an engine that is still wanted is loaded again."""
        del self._workers[worker.engine_id]
        for client in self._clients.values():
            client.used.discard(worker)
        if worker.engine_id in self._wanted:
            with contextlib.suppress(OSError):  # then it is tried again, and told, when the engine is loaded
                self._spares.prepare(len(worker.pids))
            self._run(self._reload(worker.engine_id))

    def _run(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reload(self, engine_id: str) -> None:
        """Loads an engine whose worker has died, as often as it takes, until somebody else has or it is unloaded."""
        delay = _RELOAD_DELAY
        while True:
            await asyncio.sleep(delay)
            if engine_id not in self._wanted or engine_id in self._workers:
                return
            log.info("starting the worker of engine %s again", engine_id[:12])
            try:
                await asyncio.shield((await self.load(engine_id, self._wanted[engine_id])).ready)
                return
            except EnginehouseError as error:
                log.warning("engine %s cannot be loaded again: %s", engine_id[:12], error.message)
                delay = min(2 * delay, _LONGEST_RELOAD_DELAY)
