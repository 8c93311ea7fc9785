"""An Executor that records what it is told and says what the test has it say."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from engine.errors import EnginehouseError
from enginehouse.cluster import hold_ports
from protos.access import Access
from protos.rpc import ErrorInterceptor, to_failure
from protos.v1.common_pb2 import FINISH_REASON_STOP, FinishInfo, Hypothesis, Logprobs
from protos.v1.executor_pb2 import (
    ENGINE_STATE_READY,
    BeamResult,
    Command,
    EngineLoad,
    EngineStatus,
    ExecutorStatus,
    Failed,
    Finished,
    GetStatusRequest,
    RowLogprobs,
    Started,
    StepOutput,
    Submit,
)
from protos.v1.executor_pb2_grpc import ExecutorServicer, add_ExecutorServicer_to_server

EOS = FinishInfo(reason=FINISH_REASON_STOP, eos_token_id=1)


class MockExecutor(ExecutorServicer):
    def __init__(self, *ready: str) -> None:
        self.ready = list(ready)
        self.submits: asyncio.Queue[Submit] = asyncio.Queue()
        self.cancels: asyncio.Queue[int] = asyncio.Queue()
        self.streams = 0
        self.status_fails: grpc.StatusCode | None = None
        self.answers = asyncio.Event()  # until it is cleared
        self.answers.set()
        self._steps: asyncio.Queue[StepOutput | grpc.StatusCode] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None
        (held,) = hold_ports(1)  # for as long as it may start again
        weakref.finalize(self, held.close)
        self.port = held.getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, access: Access | None = None) -> None:
        """With `access`, for those whom it lets in."""
        guards = [ErrorInterceptor(access=access)] if access else []
        self._server = grpc.aio.server(interceptors=guards, options=[("grpc.so_reuseport", 0)])
        add_ExecutorServicer_to_server(self, self._server)
        if access and access.server:
            self._server.add_secure_port(self.address, access.server.credentials())
        else:
            self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(None)

    async def GetStatus(self, request: GetStatusRequest, context: Any) -> ExecutorStatus:
        await self.answers.wait()
        if self.status_fails:
            await context.abort(self.status_fails, "the test says so")
        engines = [
            EngineStatus(engine_id=i, state=ENGINE_STATE_READY, load=EngineLoad(engine_id=i)) for i in self.ready
        ]
        return ExecutorStatus(engines=engines, device="cpu")

    async def Run(self, commands: AsyncIterator[Command], context: Any) -> AsyncIterator[StepOutput]:
        self.streams += 1
        self._steps = steps = asyncio.Queue()
        reader = asyncio.create_task(self._read(commands))
        try:
            while not isinstance(step := await steps.get(), grpc.StatusCode):
                yield step
            if step is not grpc.StatusCode.OK:
                await context.abort(step, "the test says so")
        finally:
            reader.cancel()

    async def _read(self, commands: AsyncIterator[Command]) -> None:
        async for command in commands:
            if command.HasField("submit"):
                self.submits.put_nowait(command.submit)
            for handle in command.cancel.handles:
                self.cancels.put_nowait(handle)

    def send(self, step: StepOutput) -> None:
        self._steps.put_nowait(step)

    def begin(self, handle: int, cached_tokens: int = 0) -> None:
        """Says that the request has been started."""
        self.send(StepOutput(started=[Started(handle=handle, cached_tokens=cached_tokens)]))

    def tokens(
        self,
        handle: int,
        token_ids: Sequence[int],
        finish: FinishInfo | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """One row, and the request's end if there is one."""
        self.send(
            StepOutput(
                handles=[handle],
                counts=[len(token_ids)],
                token_ids=token_ids,
                finished=[Finished(handle=handle, finish=finish)] if finish else [],
                logprobs=[RowLogprobs(handle=handle, logprobs=logprobs)] if logprobs else [],
            )
        )

    def prompt_logprobs(self, handle: int, logprobs: Logprobs) -> None:
        """Those of a chunk of the prompt."""
        self.send(StepOutput(prompt_logprobs=[RowLogprobs(handle=handle, logprobs=logprobs)]))

    def beams(self, handle: int, hypotheses: Sequence[Hypothesis], finish: FinishInfo) -> None:
        """A beam search's end."""
        self.send(
            StepOutput(
                finished=[Finished(handle=handle, finish=finish)],
                beams=[BeamResult(handle=handle, hypotheses=hypotheses)],
            )
        )

    def fail(self, handle: int, error: EnginehouseError) -> None:
        """The request's end by an error."""
        self.send(StepOutput(failed=[Failed(handle=handle, failure=to_failure(error))]))

    def hang_up(self, code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        """Ends the Run stream."""
        self._steps.put_nowait(code)

    async def submitted(self) -> Submit:
        return await asyncio.wait_for(self.submits.get(), 60)

    async def cancelled(self) -> int:
        return await asyncio.wait_for(self.cancels.get(), 60)
