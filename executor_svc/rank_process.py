"""A rank's process as the front sees it: here, or on another machine (`machines.py`)."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator
from typing import Protocol

from engine.errors import EnginehouseError
from executor_svc.frames import frame, read_frames
from executor_svc.launch import Launched, Spares
from protos.v1.worker_pb2 import ToWorker


class RankProcess(Protocol):
    """A worker's process and the way to it.

    Attributes:
        failure: what it has told before it ended.
        where: the machine, if it is another one.
    """

    failure: EnginehouseError | None
    where: str

    @property
    def pid(self) -> int | None:
        """None on another machine."""

    def send(self, message: ToWorker) -> None:
        """Sends a message, into the void if the process is gone."""

    def close(self) -> None:
        """Closes the socket, which makes the process end."""

    def kill(self) -> None:
        """SIGKILL."""

    def messages(self) -> AsyncIterator[bytes]:
        """Serialized FromWorkers, until it has closed its end."""

    async def ended(self) -> str:
        """Waits until it has ended, and says how: by "SIGKILL", for example."""


class LocalRank:
    """A process of this machine."""

    where = ""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.failure: EnginehouseError | None = None
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def launch(cls, spares: Spares) -> "LocalRank":
        """Takes a process that waits, or a new one. Raises OSError."""
        launched: Launched = spares.take()
        return cls(launched.process, *await asyncio.open_connection(sock=launched.connection))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        self.pass_on(message.SerializeToString())

    def pass_on(self, message: bytes) -> None:
        """Sends a serialized ToWorker."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    def close(self) -> None:
        self._writer.close()

    def kill(self) -> None:
        self._process.kill()

    def messages(self) -> AsyncIterator[bytes]:
        return read_frames(self._reader)

    async def ended(self) -> str:
        while (status := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"
