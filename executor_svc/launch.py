"""Worker processes, started before it is known for which engine: importing torch takes longer than all else at a start."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

WORKER = ("-m", "executor_svc.worker")

# Threads that wait for each other by spinning take the cores from whom they wait for, as soon as anything else runs:
# measured on two busy cores, a model of 5 million parameters, 9 tokens/s spinning and 110 not. But to fall asleep between
# two operators costs a quarter of a step of half a billion parameters (bench/LOG.md): so they spin for some 50 us first.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


class Launched(NamedTuple):
    """A worker's process and the front's end of the socket between them; it waits to be told its engine."""

    process: subprocess.Popen[bytes]
    connection: socket.socket


class Spares:
    """Starts worker processes, some ahead of time.

    One that waits takes memory (237 MB once it has imported torch, 153 of them its own), and its start takes 2 s of
    a core, so there is one only where it is known that an engine will be loaded.

    Args:
        arguments: the worker's command line apart from --fd.
        program: Python's arguments before them.
        environment: the processes'; by default this one's.
        log: where they print; by default where this one does.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        program: Sequence[str] = WORKER,
        environment: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self._environment, self._log = environment, log
        self._command = [sys.executable, *program]
        self._arguments = list(arguments)
        self._waiting: list[Launched] = []

    def prepare(self, count: int) -> None:
        """Sees to it that so many processes wait. Raises OSError: the system gives no process or socket."""
        for launched in [launched for launched in self._waiting if launched.process.poll() is not None]:
            self._waiting.remove(launched)
            launched.connection.close()
        while len(self._waiting) < count:
            self._waiting.append(self._launch())

    def take(self) -> Launched:
        """The process that has waited for longest, or a new one. Raises OSError."""
        self.prepare(1)
        return self._waiting.pop(0)

    def close(self) -> None:
        """Ends those that wait. They hold nothing yet, so that they need not be asked."""
        while self._waiting:
            process, connection = self._waiting.pop()
            connection.close()
            process.kill()
            process.wait()

    def _launch(self) -> Launched:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [*self._command, "--fd", str(theirs.fileno()), *self._arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={
                        **THREADS,
                        "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink needs rights that containers often have not
                        **(self._environment or os.environ),
                    },
                    stdout=self._log,
                    stderr=self._log,
                )
            except OSError:
                ours.close()
                raise
        return Launched(process, ours)
