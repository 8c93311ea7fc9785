"""Sees to it that no process of a cluster outlives `enginehouse up`, even when that is killed with SIGKILL.

A small process of its own holds the read end of a pipe whose only write end is in `up`, and hears through it which processes
there are. When the pipe ends, for whatever reason, it ends what is left: SIGTERM, five seconds later SIGKILL, to whole process
groups, so that a service's own children go as well.

Why not PR_SET_PDEATHSIG: it is for Linux alone, reaches children but not their children, and its signal is either one
that a hanging service does not hear or one that leaves it no orderly end.

This file is also the process's program, run without site-packages (20 ms): it imports the standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time


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
            [sys.executable, "-I", "-S", __file__, str(grace)],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(keep_open,),
        )
        os.close(read)

    def watch(self, pid: int) -> None:
        """A process was started; its group goes with it if it leads one."""
        self._say(f"watch {pid}")

    def forget(self, pid: int) -> None:
        """A process and its group have ended: their number may soon be somebody else's."""
        self._say(f"forget {pid}")

    def close(self) -> None:
        """Ends what is still watched, then the warden itself."""
        os.close(self._pipe)
        self._process.wait()

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the warden: an orderly end is still possible
            os.write(self._pipe, line.encode() + b"\n")


def signal_group(pid: int, number: int) -> bool:
    """Signals the process group that `pid` leads, or else the process; False if neither is there."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, number)
            return True
    return False


def main() -> None:
    """The warden's life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when `up` does, and not before
    watched: set[int] = set()
    for line in sys.stdin.buffer:
        verb, pid = line.split()
        (watched.add if verb == b"watch" else watched.discard)(int(pid))
    deadline = time.monotonic() + float(sys.argv[1])
    left = {pid for pid in watched if signal_group(pid, signal.SIGTERM)}
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = {pid for pid in left if signal_group(pid, 0)}
    for pid in left:
        signal_group(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
