"""Small services with the real command lines, for tests of the local cluster: no torch, no tokens that mean anything.

`install(folder)` makes packages `builder_svc`, `executor_svc` and `gateway` there, which win over the real ones through
PYTHONPATH. What they do wrong is chosen with $STANDIN: words such as "crash:executor", "deaf:builder" (ignores SIGTERM),
"silent:gateway" (never listens). Starts, stops and cancels go to $STANDIN_EVENTS, a line each.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from engine import blobs, registry
from engine.backends import open_store
from engine.errors import NotFound
from engine.fingerprint import Fingerprint
from engine.manifest import Limits, Manifest, ModelFacts, Parallelism, Rank, engine_id
from engine.store import Store
from protos.rpc import main, serve
from protos.v1 import builder_pb2, executor_pb2, gateway_pb2
from protos.v1.builder_pb2_grpc import BuilderServicer, add_BuilderServicer_to_server
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, Failure, FinishInfo, Usage
from protos.v1.executor_pb2_grpc import ExecutorServicer, ExecutorStub, add_ExecutorServicer_to_server
from protos.v1.gateway_pb2_grpc import GatewayServicer, add_GatewayServicer_to_server

_PACKAGES = {"builder": "builder_svc", "executor": "executor_svc", "gateway": "gateway"}


def install(folder: Path) -> str:
    """Writes the packages; returns the PYTHONPATH with which they are found."""
    for service, package in _PACKAGES.items():
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
        (folder / package / "__main__.py").write_text(f"import standin\nstandin.run({service!r})\n")
    return os.pathsep.join((str(folder), str(Path(__file__).parent)))


def publish(store: Store, name: str) -> str:
    """An engine without weights, under a name; its id."""
    identity = {"name": name}
    manifest = Manifest(
        engine_id=engine_id(identity),
        identity=identity,
        source=name,
        created="2026-01-01T00:00:00+00:00",
        model=ModelFacts("LlamaForCausalLM", 256, 1, 8, 1, 1, "float32", 64, (0,), 1000),
        limits=Limits(4, 128, 64),
        mapping=Parallelism(),
        fingerprint=Fingerprint("torch", "cpu"),
        ranks=(Rank(blobs.put_bytes(store, "program.json", b"{}"), ()),),
        tokenizer=(),
    )
    registry.publish(store, manifest)
    registry.set_name(store, name, manifest.engine_id)
    return manifest.engine_id


def note(text: str) -> None:
    with open(os.environ["STANDIN_EVENTS"], "a") as events:
        events.write(text + "\n")


def told(what: str, service: str) -> bool:
    return f"{what}:{service}" in os.environ.get("STANDIN", "").split()


class Builder(BuilderServicer):
    """Builds at once, except a checkpoint called "slow", which never ends, and one called "broken"."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._builds: dict[str, builder_pb2.Build] = {}

    async def SubmitBuild(self, request: builder_pb2.SubmitBuildRequest, context: Any) -> builder_pb2.Build:
        job = builder_pb2.Build(build_id=f"build-{len(self._builds) + 1}", spec=request.spec, model=request.model)
        self._builds[job.build_id] = job
        return job

    async def WatchBuild(
        self, request: builder_pb2.WatchBuildRequest, context: Any
    ) -> AsyncIterator[builder_pb2.BuildEvent]:
        job = self._builds[request.build_id]
        for done in (0, 50, 100):
            yield builder_pb2.BuildEvent(
                progress=builder_pb2.BuildProgress(phase="weights", done=done * 1000, total=100_000, unit="bytes")
            )
        kind = Path(job.spec.checkpoint).name
        if kind == "slow":
            note("the build goes on")
            await asyncio.Event().wait()
        elif kind == "broken":
            job.state = builder_pb2.BUILD_STATE_FAILED
            job.failure.CopyFrom(Failure(code=3, reason="CONFIG_INVALID", message="config.json has no layers"))
        else:
            job.reused = registry.latest(self._store, job.model) is not None
            job.engine_id = publish(self._store, job.model)
            job.state = builder_pb2.BUILD_STATE_SUCCEEDED
        yield builder_pb2.BuildEvent(state=job)

    async def CancelBuild(self, request: builder_pb2.CancelBuildRequest, context: Any) -> builder_pb2.Build:
        note(f"cancel {request.build_id}")
        return self._builds[request.build_id]


class Executor(ExecutorServicer):
    """Loads what it is told."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._engines: list[executor_pb2.EngineStatus] = []

    async def LoadEngine(
        self, request: executor_pb2.LoadEngineRequest, context: Any
    ) -> AsyncIterator[executor_pb2.LoadEngineProgress]:
        registry.manifest(self._store, request.engine_id)
        if told("crash", "executor"):
            print("out of memory: 7 GB wanted", file=sys.stderr, flush=True)
            os._exit(3)
        yield executor_pb2.LoadEngineProgress(bytes_done=500, bytes_total=1000)
        status = executor_pb2.EngineStatus(engine_id=request.engine_id, state=executor_pb2.ENGINE_STATE_READY)
        self._engines.append(status)
        yield executor_pb2.LoadEngineProgress(bytes_done=1000, bytes_total=1000, engine=status)

    async def UnloadEngine(
        self, request: executor_pb2.UnloadEngineRequest, context: Any
    ) -> executor_pb2.UnloadEngineResponse:
        self._engines = [status for status in self._engines if status.engine_id != request.engine_id]
        return executor_pb2.UnloadEngineResponse()

    async def GetStatus(self, request: executor_pb2.GetStatusRequest, context: Any) -> executor_pb2.ExecutorStatus:
        return executor_pb2.ExecutorStatus(engines=self._engines, device="cpu")


class Gateway(GatewayServicer):
    """Says "word " once for each token, one every 20 ms, to whatever it is asked."""

    def __init__(self, store: Store, executors: list[str]) -> None:
        self._store = store
        self._executors = [ExecutorStub(grpc.aio.insecure_channel(address)) for address in executors]

    async def ListModels(self, request: gateway_pb2.ListModelsRequest, context: Any) -> gateway_pb2.ListModelsResponse:
        answers = [await stub.GetStatus(executor_pb2.GetStatusRequest()) for stub in self._executors]
        models = []
        for name in registry.names(self._store):
            engine = registry.resolve(self._store, name).engine_id
            ready = sum(engine in {one.engine_id for one in answer.engines} for answer in answers)
            models.append(gateway_pb2.Model(name=name, engine_id=engine, ready_executors=ready, max_seq_len=128))
        return gateway_pb2.ListModelsResponse(models=models)

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        if request.model not in registry.names(self._store):
            raise NotFound(f"no model {request.model!r}")
        count = request.stopping.max_tokens
        for number in range(1, count + 1):
            await asyncio.sleep(0.02)
            yield gateway_pb2.GenerateResponse(
                text="word ",
                token_ids=[number],
                usage=Usage(prompt_tokens=3, completion_tokens=number),
                finish=FinishInfo(reason=FINISH_REASON_LENGTH) if number == count else None,
            )


def run(service: str) -> None:
    """One of the services, as a process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--executor", action="append", default=[])
    parser.add_argument("--checkpoint-root")
    parser.add_argument("--work-dir")
    parser.add_argument("--drain-seconds")
    parser.add_argument("--http-port")
    parser.add_argument("--builder")
    arguments = parser.parse_args()
    if told("silent", service):
        print("a line that says nothing", flush=True)
        signal.pause()
    if told("fail", service):
        sys.exit("no such device: cpu")
    store = open_store(arguments.store)
    child = subprocess.Popen(["sleep", "600"])  # as an executor has its worker; must not be left behind

    async def body() -> None:
        def register(server: grpc.aio.Server) -> None:
            if service == "builder":
                add_BuilderServicer_to_server(Builder(store), server)
            elif service == "executor":
                add_ExecutorServicer_to_server(Executor(store), server)
            else:
                add_GatewayServicer_to_server(Gateway(store, arguments.executor), server)
            note(f"start {service} {os.getpid()} {child.pid}")
            if told("deaf", service):
                asyncio.get_running_loop().call_later(0.2, signal.signal, signal.SIGTERM, signal.SIG_IGN)

        async def stopped() -> None:
            note(f"stop {service}")

        await serve(service, register, arguments.host, arguments.port, on_stop=stopped, grace=0.2)

    sys.exit(main(service, body()))
