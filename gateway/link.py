"""The gateway's connection to one executor: one Run stream that carries all requests."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import TYPE_CHECKING

import grpc

from engine.errors import DataLoss, EnginehouseError, Internal, Unavailable
from gateway.circuit import OPEN, Circuit
from gateway.inbox import Inbox
from gateway.inboxes import Inboxes
from gateway.prefixes import Holder
from gateway.routing import View
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
_POLLS = 500  # that a gateway sends in a second at most to executors without a request of its own
_STATUS_TIMEOUT, _LOOK_TIMEOUT = 3.0, 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0  # seconds between attempts to connect
_OWN_FAULTS = (Internal.code, Unavailable.code, DataLoss.code)  # of an executor, when it fails a single request
_RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 3000)]

log = logging.getLogger(__name__)


class Link:
    """Connects, stays connected, sends requests and hands their tokens out; knows how busy the executor is.

    Attributes:
        on_loss: called when a connection that stood is lost.
        on_change: is told which engines requests can be sent for.
        fleet: how many executors the gateway has.
        circuits: of the engines that have failed.
    """

    def __init__(self, address: str, credentials: Credentials = NONE) -> None:
        self.address = address
        self._credentials = credentials
        self.on_loss: Callable[[], None] = lambda: None
        self.on_change: Callable[[Link, Collection[str]], None] = lambda _link, _engine_ids: None
        self.fleet = 1
        self.circuits: dict[str, Circuit] = {}
        self._dial()
        self._connected = False
        self._answers = False
        self._loads: dict[str, EngineLoad] = {}  # of the engines that are ready
        self._holders: dict[str, Holder] = {}  # by engine: what its prefix cache is called
        self._told: Collection[str] = frozenset()  # engines
        self._steps = 0  # that have come
        self._silent = False
        self._inboxes = Inboxes(self.cancel, self._ended)  # of this gateway's requests
        self._commands: asyncio.Queue[Command | None] = asyncio.Queue()  # None ends the stream

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
        load, circuit = self._loads.get(engine_id), self.circuits.get(engine_id)
        own, queued = self._inboxes.live[engine_id], self._inboxes.queued_tokens[engine_id]
        reported = load.running + load.waiting if load else 0
        return View(
            address=self.address,
            connected=self.connected,
            ready=load is not None,
            requests=max(reported, own),
            queued_tokens=max(load.queued_tokens, queued) if load else queued,
            others=max(reported - own, 0),
            free_kv=load.free_kv_blocks / load.total_kv_blocks if load and load.total_kv_blocks else 1.0,
            holder=self._holders.get(engine_id),
            trusted=circuit is None or circuit.state != OPEN,
        )

    def holder(self, engine_id: str) -> Holder:
        """The engine's prefix cache as it is now."""
        return self._holders.setdefault(engine_id, Holder(self.address))

    def send(self, submit: Submit, inbox: Inbox) -> None:
        """Sends a request, whose news go to the inbox. Raises Unavailable if the executor has just been lost."""
        if not self._connected:
            raise self._lost("its connection broke")
        if circuit := self.circuits.get(submit.engine_id):
            circuit.sent()
        self._inboxes.open(submit, inbox)
        self._commands.put_nowait(Command(submit=submit))

    def cancel(self, inbox: Inbox) -> None:
        """Cancels a request that has not ended; does nothing for one that has."""
        if self._inboxes.forget(inbox.handle):
            self._commands.put_nowait(Command(cancel=Cancel(handles=[inbox.handle])))
            if len(inbox.token_ids) > inbox.had:  # it has served, though nobody hears the end, as behind a stop string
                self._succeeded(inbox.engine_id)

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
            self._silent = False
            self._changed()
            log.info("executor %s: connected", self.address)
            poll = asyncio.create_task(self._poll(call))
            try:
                async for step in call:
                    self._steps += 1
                    self._deliver(step)
            finally:
                poll.cancel()
                call.cancel()
                self._commands.put_nowait(None)  # who reads them would wait for ever
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._silent or (task and task.cancelling()):
                raise
            return f"it has not answered for {2 * _STATUS_TIMEOUT:.0f} s"
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

    async def _poll(self, call: "grpc.aio.StreamStreamCall[Command, StepOutput]") -> None:
        """Keeps the status fresh. An executor that does not answer gets no new requests; its Run stream may still live.

        One that leaves two questions in a row without an answer, and sends no step meanwhile, is taken for lost: it has been
        stopped, or the network lies between.
        """
        heard, unanswered = self._steps, 0
        while unanswered < 2:
            if not unanswered:
                await asyncio.sleep(_POLL_INTERVAL if self._inboxes else max(_POLL_INTERVAL, self.fleet / _POLLS))
                heard = self._steps
            asked = time.monotonic()
            try:
                status = await self._stub.GetStatus(GetStatusRequest(), timeout=_STATUS_TIMEOUT)
                self._answers, unanswered = True, 0
                self._note(status)
            except grpc.aio.AioRpcError as error:
                if self._answers:
                    log.warning(
                        "executor %s: does not answer: %s: %s", self.address, error.code().name, error.details()
                    )
                silent = time.monotonic() - asked >= _STATUS_TIMEOUT and heard == self._steps
                self._answers, unanswered = False, unanswered + 1 if silent else 0
                self._changed()
        self._silent = True
        call.cancel()

    def _note(self, status: ExecutorStatus) -> None:
        ready = [] if status.draining else [found for found in status.engines if found.state == ENGINE_STATE_READY]
        self._loads = {engine.engine_id: engine.load for engine in ready}
        self._changed()

    def _deliver(self, step: StepOutput) -> None:
        if step.HasField("engine_lost"):  # first, so that nobody goes on there
            self._forget(step.engine_lost.engine_id)
        elif step.draining:
            self._loads = {}
        elif step.HasField("load") and step.load.engine_id in self._loads:
            self._loads[step.load.engine_id] = step.load
        self._changed()
        self._inboxes.deliver(step)

    def _changed(self) -> None:
        """Tells which engines requests can be sent for, if it is not what was told last."""
        ready = self._loads.keys() if self.connected else ()
        if self._told != ready:
            self._told = frozenset(ready)
            self.on_change(self, self._told)

    def _forget(self, engine_id: str) -> None:
        """An engine is gone with all its requests, and what it had cached."""
        self._loads.pop(engine_id, None)
        self._holders.pop(engine_id, None)
        if self._inboxes.live[engine_id]:
            self._circuit(engine_id).failed()

    def _ended(self, engine_id: str, error: EnginehouseError | None) -> None:
        """The executor has told a request's end."""
        if error is None:
            self._succeeded(engine_id)
        elif error.code in _OWN_FAULTS and error.reason != "EXECUTOR_DRAINING":
            self._circuit(engine_id).failed()
        elif error.reason == "ENGINE_NOT_LOADED":
            self._loads.pop(engine_id, None)  # until its next status
            self._changed()

    def _succeeded(self, engine_id: str) -> None:
        if circuit := self.circuits.get(engine_id):
            circuit.succeeded()

    def _circuit(self, engine_id: str) -> Circuit:
        return self.circuits.setdefault(engine_id, Circuit())

    def _disconnect(self, reason: str) -> None:
        self._connected = self._answers = False
        for engine_id in {*self._loads, *self._inboxes.live}:
            self._forget(engine_id)
        self._changed()
        self._inboxes.fail(self._lost(reason))

    def _lost(self, reason: str) -> Unavailable:
        return Unavailable(
            f"executor {self.address} was lost ({reason}): send the request again",
            reason="EXECUTOR_LOST",
            metadata={"executor": self.address},
        )


async def _drain(commands: asyncio.Queue[Command | None]) -> AsyncIterator[Command]:
    while command := await commands.get():
        yield command
