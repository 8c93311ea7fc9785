"""Starts the real services as processes, each on a free port of the loopback interface."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Service:
    """A running service; `metrics` and `http` are its URLs, if it was started with --metrics-port and --http-port."""

    name: str
    process: subprocess.Popen[str]
    address: str
    log: Path
    metrics: str = ""
    http: str = ""

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def service(
    package: str,
    log: Path,
    *arguments: str,
    port: str = "0",
    program: Sequence[str] = (),
    within: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    alone: bool = False,
    extras: Sequence[str] = (),
) -> Iterator[Service]:
    """`python -m package --port 0 arguments`, until the block ends; its log is shown if it does not come up.

    It sees only what its own extra installs.

    Args:
        port: that it listens on; 0 takes a free one.
        program: Python's arguments instead of `-m package`.
        within: a command that becomes the one behind it, such as `ip netns exec NAME`.
        environment: added to this process' own.
        alone: the environment is all that it gets.
        extras: that it sees beside its own.
    """
    everything = {
        **({} if alone else os.environ),
        **(environment or {}),
        # This very checkout, whichever one is installed.
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent / "only_extra"), str(Path(__file__).parents[2]))),
        "PYTHONSAFEPATH": "1",
        "ENGINEHOUSE_ONLY": ",".join((package.removesuffix("_svc"), *extras)),
    }
    command = [*within, sys.executable, *(program or ("-m", package)), "--port", port, *arguments]
    with log.open("a") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=everything)
    assert process.stdout is not None
    try:
        line, metrics, http = process.stdout.readline(), "", ""
        if " metrics on " in line:
            metrics, line = line.split()[-1], process.stdout.readline()
        if " http on " in line:
            http, line = line.split()[-1], process.stdout.readline()
        assert " listening on " in line, f"{package} did not start: {log.read_text()}"
        yield Service(package, process, line.split()[-1], log, metrics, http)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextlib.contextmanager
def standing(pid: int) -> Iterator[None]:
    """A process that stands still: what it would do, it does after the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def up(model: str, root: Path, before: Sequence[str] = (), behind: Sequence[str] = ()) -> Iterator[str]:
    """The URL of the HTTP API of a cluster that `enginehouse up` starts; Ctrl-C ends it, with status 0.

    Args:
        model: NAME=CHECKPOINT.
        root: where it keeps its data; `up.log` there has what it says.
        before, behind: arguments before `up`, and after its own.
    """
    command = [sys.executable, "-m", "enginehouse", *before, "up", model, "--port", "0", "--json", "--data", str(root)]
    with (root / "up.log").open("w") as log:
        process = subprocess.Popen([*command, *behind], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told, (root / "up.log").read_text()
        found: str = json.loads(told)["http"]
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout is not None
        process.stdout.close()
