"""A cluster's three services on one port of this process, for tests of the command line: no torch, tokens without meaning."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import standin

from engine import registry
from engine.errors import EnginehouseError
from engine.store import Store
from protos.rpc import ErrorInterceptor
from protos.v1 import builder_pb2, gateway_pb2
from protos.v1.builder_pb2_grpc import add_BuilderServicer_to_server
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, FinishInfo, Usage
from protos.v1.executor_pb2_grpc import add_ExecutorServicer_to_server
from protos.v1.gateway_pb2_grpc import GatewayServicer, add_GatewayServicer_to_server


class Builder(standin.Builder):
    async def ListBuilds(self, request: Any, context: Any) -> builder_pb2.ListBuildsResponse:
        return builder_pb2.ListBuildsResponse(builds=list(self._builds.values()))

    async def CancelBuild(self, request: Any, context: Any) -> builder_pb2.Build:
        return self._builds[request.build_id]


class TimedGateway(GatewayServicer):
    """A gateway whose timing is known: the first token after `first` seconds, then `step` tokens every `gap` seconds.

    Attributes:
        requests: as they came.
        ttft, gaps: seconds that really passed before it sent, for each request and for each later message.
        most: requests that were there at the same time.
        fails: the numbers of requests, from 0, that end with an error after their first token.
        hangs: those that never end.
        cancelled: how many ended before their finish.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.first, self.gap, self.step = 0.0, 0.0, 1
        self.fails: set[int] = set()
        self.hangs: set[int] = set()
        self.reset()

    def reset(self) -> None:
        self.requests: list[Any] = []
        self.ttft: list[float] = []
        self.gaps: list[float] = []
        self.now = self.most = self.cancelled = 0

    async def ListModels(self, request: Any, context: Any) -> gateway_pb2.ListModelsResponse:
        named = registry.named(self._store)
        models = [
            gateway_pb2.Model(name=one.name, engine_id=one.engine_id, ready_executors=1, max_seq_len=128)
            for one in named
        ]
        return gateway_pb2.ListModelsResponse(models=models)

    async def Tokenize(self, request: gateway_pb2.TokenizeRequest, context: Any) -> gateway_pb2.TokenizeResponse:
        assert not request.add_special_tokens
        return gateway_pb2.TokenizeResponse(token_ids=request.text.encode())

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        number, began, finished = len(self.requests), time.perf_counter(), False
        self.requests.append(request)
        self.now += 1
        self.most = max(self.most, self.now)
        wanted = request.stopping.max_tokens or 8
        try:
            done = 0
            while done < wanted:
                await asyncio.sleep(self.gap if done else self.first)
                count = min(self.step, wanted - done) if done else 1
                now = time.perf_counter()
                (self.gaps if done else self.ttft).append(now - began)
                began, done = now, done + count
                finished = done == wanted and number not in self.hangs
                yield gateway_pb2.GenerateResponse(
                    text="word " * count,
                    token_ids=range(count),
                    usage=Usage(prompt_tokens=len(request.token_ids.ids), completion_tokens=done),
                    finish=FinishInfo(reason=FINISH_REASON_LENGTH) if finished else None,
                )
                if number in self.fails:
                    raise EnginehouseError("the executor is gone", reason="EXECUTOR_LOST", code=14)
            while number in self.hangs:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        finally:
            self.now -= 1
            self.cancelled += not finished


@contextmanager
def serving(store: Store) -> Iterator[tuple[str, TimedGateway]]:
    """The address of all three services, and the gateway."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, str, TimedGateway]:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        gateway = TimedGateway(store)
        add_BuilderServicer_to_server(Builder(store), server)
        add_ExecutorServicer_to_server(standin.Executor(store), server)
        add_GatewayServicer_to_server(gateway, server)
        await server.start()
        return server, address, gateway

    server, address, gateway = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield address, gateway
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
