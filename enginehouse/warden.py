"""Sees to it that no process of a cluster outlives `enginehouse up`, even when that is killed with SIGKILL.

A small process of its own holds the read end of a pipe whose write end is in `up`, and hears through it which processes there
are. When the pipe ends, for whatever reason, it ends what is left: SIGTERM, five seconds later SIGKILL, to whole process
groups, so that a service's own children go as well. A process says itself that it is there, holding the pipe open until it
has: one that `up` has started in its last instant is known, too.

Why not PR_SET_PDEATHSIG: it is for Linux alone, reaches children but not their children, and its signal is either one
that a hanging service does not hear or one that leaves it no orderly end.

This file is also the program of the process and of the watched ones before they become what they shall be, run without
site-packages (20 ms): it imports the standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_PYTHON = [sys.executable, "-I", "-S", __file__]


class Warden:
    """The handle that `up` keeps."""

    def __init__(self, keep_open: int, grace: float = 5.0) -> None:
        """Starts the process.

        Args:
            keep_open: a file descriptor, the lock of the data folder, that stays held until the last process has ended.
            grace: seconds between SIGTERM and SIGKILL.
        """
        read, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [*_PYTHON, str(grace)],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(keep_open,),
        )
        os.close(read)

    @property
    def pass_fds(self) -> tuple[int]:
        """What a process that is started with `watched` needs of `subprocess`."""
        return (self._pipe,)

    def watched(self, command: Sequence[str]) -> list[str]:
        """A command that lets itself be watched and becomes `command`, whose process group goes with it if it leads one."""
        return [*_PYTHON, "watched", str(self._pipe), *command]

    def forget(self, pid: int) -> None:
        """A process and its group have ended: their number may soon be somebody else's."""
        _say(self._pipe, f"forget {pid}")

    def close(self) -> None:
        """Ends what is still watched, then the warden itself."""
        os.close(self._pipe)
        self._process.wait()


def signal_group(pid: int, number: int) -> bool:
    """Signals the process group that `pid` leads, or else the process; False if neither is there."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, number)
            return True
    return False


def become(pipe: int, command: list[str]) -> None:
    """What a process does that was started with `Warden.watched`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _say(pipe, f"watch {os.getpid()}")
    os.close(pipe)
    os.execvp(command[0], command)


def guard(grace: float) -> None:
    """The warden's life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when `up` does, and not before
    watched: set[int] = set()
    for line in sys.stdin.buffer:
        verb, pid = line.split()
        (watched.add if verb == b"watch" else watched.discard)(int(pid))
    deadline = time.monotonic() + grace
    left = {pid for pid in watched if signal_group(pid, signal.SIGTERM)}
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = {pid for pid in left if signal_group(pid, 0)}
    for pid in left:
        signal_group(pid, signal.SIGKILL)


def _say(pipe: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # somebody killed the warden: an orderly end is still possible
        os.write(pipe, line.encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1] == "watched":
        become(int(sys.argv[2]), sys.argv[3:])
    guard(float(sys.argv[1]))
