"""What `up` owes to the terminal: what signals do, and a command run in the foreground."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import NotFound
from enginehouse.cluster import LocalCluster
from enginehouse.credentials import typed_environment

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_COMMAND_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


class Signals:
    """SIGINT, SIGTERM and SIGHUP, while the block runs in an asyncio task.

    The first cancels the task, the next one calls `hurry`. While a command runs they are the command's: a Ctrl-C of the
    terminal has reached it already, another signal is passed on, and a second SIGTERM cancels the task.

    Attributes:
        received: the signal that cancelled the task.
        command: the command that runs in the foreground.
    """

    def __init__(self, hurry: Callable[[], None]) -> None:
        self.received: signal.Signals | None = None
        self.command: asyncio.subprocess.Process | None = None
        self._hurry = hurry
        self._passed_on = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _on(self, number: signal.Signals) -> None:
        if self.command is not None and self.received is None and not (self._passed_on and number != signal.SIGINT):
            if number != signal.SIGINT or not _in_foreground():
                self._passed_on = number != signal.SIGINT
                with contextlib.suppress(ProcessLookupError):
                    self.command.send_signal(number)
        elif self.received is None and self._task is not None:
            self.received = number
            self._task.cancel()
        else:
            self._hurry()


def find_program(name: str) -> str:
    """The path of a command; this installation's own come first. Raises NotFound."""
    found = shutil.which(name, path=_path())
    if found is None:
        raise NotFound(f"no command {name!r} on the path", reason="COMMAND_NOT_FOUND")
    return found


async def run_command(command: Sequence[str], cluster: LocalCluster, signals: Signals) -> int:
    """Runs a command against the cluster with this process' terminal, and returns its status as a shell would.

    It finds $ENGINEHOUSE_GATEWAY, $ENGINEHOUSE_BUILDER and $ENGINEHOUSE_HOME, and this installation's `enginehouse` on its path.
    Cancelled, it ends the command first.

    Raises:
        NotFound: there is no such command.
    """
    environment = {
        **os.environ,
        "PATH": _path(),
        "ENGINEHOUSE_GATEWAY": cluster.gateway,
        "ENGINEHOUSE_BUILDER": cluster.builder,
        "ENGINEHOUSE_HOME": str(cluster.home.root),
        **typed_environment(),
    }
    warden = cluster.warden
    program = warden.watched([find_program(command[0]), *command[1:]])
    process = await asyncio.create_subprocess_exec(*program, pass_fds=warden.pass_fds, env=environment)
    signals.command = process
    try:
        status = await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _COMMAND_GRACE)
        except TimeoutError:
            process.kill()
            await process.wait()
        raise
    finally:
        signals.command = None
        warden.forget(process.pid)
    return status if status >= 0 else 128 - status


def _path() -> str:
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def _in_foreground() -> bool:
    """Whether a Ctrl-C of the terminal reaches this process and, with it, the command."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
