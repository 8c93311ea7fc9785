"""The gateway's connection to one executor: one Run stream that carries all requests."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from engine.errors import Unavailable
from gateway.inbox import Inbox
from gateway.inboxes import Inboxes
from protos.dial import NONE, Credentials, why_not
from protos.rpc import CHANNEL_OPTIONS
from protos.v1.executor_pb2 import (
    ENGINE_STATE_READY,
    Cancel,
    Command,
    EngineLoad,
    ExecutorStatus,
    GetStatusRequest,
    StepOutput,
    Submit,
)
from protos.v1.executor_pb2_grpc import ExecutorStub

if TYPE_CHECKING:
    from protos.v1.executor_pb2_grpc import ExecutorAsyncStub

_POLL_INTERVAL = 1.0  # seconds between two GetStatus
_STATUS_TIMEOUT, _LOOK_TIMEOUT = 5.0, 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0  # seconds between attempts to connect
_RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 3000)]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """An executor as a request for one engine sees it.

    Attributes:
        address: HOST:PORT.
        connected: it answers, and the Run stream stands.
        ready: it has the engine loaded.
        requests: that it works on for this engine or that wait there, of all gateways.
        queued_tokens: known to it and not computed yet.
    """

    address: str
    connected: bool
    ready: bool
    requests: int
    queued_tokens: int


class Link:
    """Connects, stays connected, sends requests and hands their tokens out; knows how busy the executor is.

    Attributes:
        on_loss: called when a connection that stood is lost.
    """

    def __init__(self, address: str, credentials: Credentials = NONE) -> None:
        self.address = address
        self._credentials = credentials
        self.on_loss: Callable[[], None] = lambda: None
        self._dial()
        self._connected = False
        self._answers = False
        self._loads: dict[str, EngineLoad] = {}  # of the engines that are ready
        self._inboxes = Inboxes(self.cancel)  # of this gateway's requests
        self._commands: asyncio.Queue[Command] = asyncio.Queue()

    @property
    def connected(self) -> bool:
        """Whether the executor answers, and the Run stream stands."""
        return self._connected and self._answers

    @property
    def num_requests(self) -> int:
        """Requests of this gateway that it works on."""
        return len(self._inboxes)

    @property
    def loads(self) -> Mapping[str, EngineLoad]:
        """Of the engines that are ready there, by id."""
        return self._loads

    def view(self, engine_id: str) -> View:
        """The executor as it is now. Own requests count from the moment they are sent, others' with its next report."""
        load = self._loads.get(engine_id)
        reported = load.running + load.waiting if load else 0
        return View(
            address=self.address,
            connected=self.connected,
            ready=load is not None,
            requests=max(reported, self._inboxes.live[engine_id]),
            queued_tokens=load.queued_tokens if load else 0,
        )

    def send(self, submit: Submit, news: asyncio.Event) -> Inbox:
        """Sends a request and gives its inbox, which sets `news`. Raises Unavailable if the executor has just been lost."""
        if not self._connected:
            raise self._lost("its connection broke")
        inbox = self._inboxes.open(submit, news)
        self._commands.put_nowait(Command(submit=submit))
        return inbox

    def cancel(self, inbox: Inbox) -> None:
        """Cancels a request that has not ended; does nothing for one that has."""
        if self._inboxes.forget(inbox.handle):
            self._commands.put_nowait(Command(cancel=Cancel(handles=[inbox.handle])))

    async def run(self) -> None:
        """Connects, again and again, until it is cancelled."""
        pause, told = _FIRST_PAUSE, ""
        try:
            while True:
                begun = time.monotonic()
                reason = await self._session()
                stood = time.monotonic() - begun > _STATUS_TIMEOUT
                pause = _FIRST_PAUSE if stood and self._connected else min(2 * pause, _LONGEST_PAUSE)
                if self._connected or reason != told:
                    log.warning("executor %s: %s", self.address, reason)
                    told = reason
                if self._connected:
                    self.on_loss()
                self._disconnect(reason)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        finally:
            self._disconnect("the gateway stops")
            await self._channel.close()

    async def _session(self) -> str:
        """One Run stream from its beginning to its end; says what ended it."""
        if self._credentials.version != self._version:
            await self._channel.close()
            self._dial()
        try:
            self._note(await self._stub.GetStatus(GetStatusRequest(), timeout=_STATUS_TIMEOUT))
            self._commands = asyncio.Queue()
            call = self._stub.Run(_drain(self._commands))
            self._connected = self._answers = True
            log.info("executor %s: connected", self.address)
            poll = asyncio.create_task(self._poll())
            try:
                async for step in call:
                    self._deliver(step)
            finally:
                poll.cancel()
                call.cancel()
        except grpc.aio.AioRpcError as error:
            known = why_not(error.details() or "", self.address, self._credentials)
            return known or f"{error.code().name}: {error.details()}"
        except Exception as error:  # whatever it sent: a link must not die of it
            log.exception("executor %s", self.address)
            return f"{type(error).__name__}: {error}"
        return "it ended the Run stream"

    def _dial(self) -> None:
        """A channel with the newest certificates: one that has been made keeps its own."""
        self._version = self._credentials.version
        self._channel = self._credentials.channel(self.address, [*CHANNEL_OPTIONS, *_RECONNECT])
        self._stub: ExecutorAsyncStub = ExecutorStub(self._channel)

    async def look(self) -> None:
        """Asks at once what the executor has. One that is not connected, or does not answer soon, stays as it was."""
        if self._connected:
            with contextlib.suppress(grpc.aio.AioRpcError):
                self._note(await self._stub.GetStatus(GetStatusRequest(), timeout=_LOOK_TIMEOUT))

    async def _poll(self) -> None:
        """Keeps the status fresh. An executor that does not answer gets no new requests; its Run stream may still live."""
        while True:
            await asyncio.sleep(_POLL_INTERVAL)
            try:
                self._note(await self._stub.GetStatus(GetStatusRequest(), timeout=_STATUS_TIMEOUT))
                self._answers = True
            except grpc.aio.AioRpcError as error:
                if self._answers:
                    log.warning(
                        "executor %s: does not answer: %s: %s", self.address, error.code().name, error.details()
                    )
                self._answers = False

    def _note(self, status: ExecutorStatus) -> None:
        ready = [] if status.draining else [found for found in status.engines if found.state == ENGINE_STATE_READY]
        self._loads = {engine.engine_id: engine.load for engine in ready}

    def _deliver(self, step: StepOutput) -> None:
        self._inboxes.deliver(step)
        if step.HasField("engine_lost"):
            self._loads.pop(step.engine_lost.engine_id, None)
        elif step.draining:
            self._loads = {}
        elif step.HasField("load") and step.load.engine_id in self._loads:
            self._loads[step.load.engine_id] = step.load

    def _disconnect(self, reason: str) -> None:
        self._connected = self._answers = False
        self._loads = {}
        self._inboxes.fail(self._lost(reason))

    def _lost(self, reason: str) -> Unavailable:
        return Unavailable(
            f"executor {self.address} was lost ({reason}): send the request again",
            reason="EXECUTOR_LOST",
            metadata={"executor": self.address},
        )


async def _drain(commands: asyncio.Queue[Command]) -> AsyncIterator[Command]:
    while True:
        yield await commands.get()
