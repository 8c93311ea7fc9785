"""One subprocess a build, so that a build that crashes, hangs or eats all memory takes nothing else with it.

The service keeps a pipe open to the child's stdin: the request comes through it as one JSON line, and its end means that the
service is gone. The child writes its events to stdout, one JSON line each; whatever anybody prints goes to stderr.

    service --stdin-->  BuildRequest               child
            <--stdout-- Progressed* (Result | Failed)
            <--stderr-- log lines

This is the service's side, which imports no torch; `builder_svc/child.py` is the other.
"""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, cast

import msgspec

from builder_svc.build_config import BuildConfig, Progress
from builder_svc.phases import Phases
from builder_svc.work_directory import WorkDirectory
from engine.errors import EnginehouseError, Internal, ResourceExhausted
from protos.rpc import from_failure
from protos.v1.common_pb2 import Failure

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
COMMAND = (sys.executable, "-m", "builder_svc.child")

_LOG_LINES, _LOG_LINE_CHARS, _LOG_CHARS = 100, 500, 16_384
_MAX_LINE_BYTES = 1 << 20
Log = Callable[[str], None]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class BuildRequest(msgspec.Struct, frozen=True):
    """What the child is asked for.

    Attributes:
        signer: id of the key that the service signs with: an engine that is there without its signature is built again.
    """

    checkpoint: str
    store: str = ""
    options: BuildConfig = msgspec.field(default_factory=BuildConfig)
    work_dir: str | None = None
    signer: str = ""


class Progressed(msgspec.Struct, frozen=True, tag="progress"):
    """How far a phase is."""

    phase: str
    done: _Count
    total: _Count
    unit: str


class Result(msgspec.Struct, frozen=True, tag="result"):
    """The end of a build that made or found an engine.

    Attributes:
        manifest: SHA-256 of the stored manifest if this build has made everything that it names; else empty.
    """

    engine_id: str
    reused: bool
    manifest: str = ""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The end of a build that failed in an orderly way: an EnginehouseError, as its fields."""

    code: Annotated[int, msgspec.Meta(ge=1, le=16)]
    reason: str
    message: str
    metadata: dict[str, str]


_decoder = msgspec.json.Decoder(Progressed | Result | Failed)


class BuildProcess:
    """Starts a subprocess for each build, in a process group of its own.

    Args:
        command: the child's command line.
        work_dir: each build gets a directory in it, which is removed with the child; by default the system's.
        grace: seconds that a child has between SIGTERM and SIGKILL.
        on_phase: called with each phase of a build that is over, and its seconds.
    """

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        *,
        work_dir: Path | None = None,
        grace: float = GRACE,
        on_phase: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        self.command = tuple(command)
        self.work_dir = work_dir
        self.grace = grace
        self._on_phase = on_phase

    async def run(self, request: BuildRequest, progress: Progress, log: Log = lambda _: None) -> Result:
        """Builds. When this returns or raises, the child and all that it started have ended.

        A cancelled call ends the child first: SIGTERM, and SIGKILL after the grace.

        Args:
            progress: called as the child reports it.
            log: called with each line that the child prints.

        Raises:
            EnginehouseError: the child's own; for a child that died without a word Internal, or ResourceExhausted if it
                was killed by SIGKILL. The message then ends with the child's last log lines.
        """
        try:
            work = WorkDirectory(self.work_dir)
        except OSError as error:
            raise _not_started(error) from None
        phases = Phases(progress, self._on_phase)
        try:
            return await self._run(msgspec.structs.replace(request, work_dir=str(work.path)), phases.progress, log)
        finally:
            phases.close()
            await asyncio.to_thread(work.remove)

    async def _run(self, request: BuildRequest, progress: Progress, log: Log) -> Result:
        loop = asyncio.get_running_loop()
        try:
            _, child = await loop.subprocess_exec(lambda: _Child(loop, progress, log), *self.command, process_group=0)
        except OSError as error:
            raise _not_started(error) from None
        try:
            child.send(msgspec.json.encode(request) + b"\n")
            await child.told
        finally:
            await child.end(self.grace)
        if isinstance(child.outcome, Failed):
            outcome = child.outcome
            raise from_failure(
                Failure(code=outcome.code, reason=outcome.reason, message=outcome.message, metadata=outcome.metadata)
            )
        if child.outcome is None:
            raise _crash(child.returncode, child.tail())
        return child.outcome


class _Child(asyncio.SubprocessProtocol):
    """What the service hears of a child. A protocol and no streams: `Process.wait()` would wait for grandchildren too."""

    def __init__(self, loop: asyncio.AbstractEventLoop, progress: Progress, log: Log) -> None:
        self.outcome: Result | Failed | None = None
        self.told = loop.create_future()  # done with the outcome, or with the end of a child that gave none
        self.closed = loop.create_future()  # done when the child has ended and its pipes are read to the end
        self._loop = loop
        self._progress = progress
        self._tell = log
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._rest = {1: b"", 2: b""}

    def send(self, data: bytes) -> None:
        """Writes to the child's stdin, which stays open."""
        cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0)).write(data)

    @property
    def returncode(self) -> int:
        """Of a child that has ended; negative for a signal."""
        return self._transport.get_returncode() or 0

    def tail(self) -> str:
        """The last log lines."""
        return "\n".join(self._log)[-_LOG_CHARS:]

    async def end(self, grace: float) -> None:
        """Ends the child if it has not ended by itself, and whatever is left in its process group."""
        try:
            self._kill(signal.SIGTERM)
            await asyncio.wait([self.closed], timeout=grace)
            self._kill(signal.SIGKILL)
            await self.closed
        finally:
            self._kill(signal.SIGKILL)  # a second cancellation came
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._rest[fd] + data).split(b"\n")
        for line in lines:
            self._line(fd, line)
        if len(rest) > _MAX_LINE_BYTES:
            self._line(2, rest)
            rest = b""
        self._rest[fd] = rest

    def pipe_connection_lost(self, fd: int, _exc: Exception | None) -> None:
        if rest := self._rest.pop(fd, b""):
            self._line(fd, rest)

    def process_exited(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # what it started and left behind holds its pipes open
            os.killpg(self._transport.get_pid(), signal.SIGKILL)
        self._loop.call_later(1.0, self._transport.close)  # and so does what has left the group

    def connection_lost(self, _exc: Exception | None) -> None:
        for future in (self.told, self.closed):
            if not future.done():
                future.set_result(None)

    def _line(self, fd: int, line: bytes) -> None:
        if fd == 1 and self.outcome is None:
            try:
                event = _decoder.decode(line)
            except msgspec.MsgspecError:
                pass  # no event: a log line in the wrong place
            else:
                return self._event(event)
        if text := line[: 4 * _LOG_LINE_CHARS].decode(errors="replace").rstrip():
            self._log.append(text[:_LOG_LINE_CHARS])
            self._tell(text[:_LOG_LINE_CHARS])
        return None

    def _event(self, event: Progressed | Result | Failed) -> None:
        if isinstance(event, Progressed):
            self._progress(event.phase, event.done, event.total, event.unit)
            return
        self.outcome = event
        if not self.told.done():
            self.told.set_result(None)

    def _kill(self, number: signal.Signals) -> None:
        if self._transport.get_returncode() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._transport.get_pid(), number)


def _not_started(error: OSError) -> EnginehouseError:
    return Internal(f"cannot start a build process: {error}", reason="BUILD_NOT_STARTED")


def _crash(returncode: int, tail: str) -> EnginehouseError:
    """What to say of a child that ended without an outcome."""
    number = -returncode if returncode < 0 else returncode - 128  # a shell's way to say it
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = ""
    ending = f"the build process was killed by {name}" if name else f"the build process ended with status {returncode}"
    if name == "SIGKILL":
        ending += ", probably out of memory"
    message = ending + (f"; its last output:\n{tail}" if tail else "; it printed nothing")
    if name == "SIGKILL":
        return ResourceExhausted(message, reason="BUILD_KILLED", metadata={"signal": name})
    return Internal(message, reason="BUILD_CRASHED", metadata={"signal": name} if name else {})
