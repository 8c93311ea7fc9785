"""A service of the local cluster as a child process."""

import asyncio
import contextlib
import os
import re
import signal
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import Unavailable
from enginehouse.warden import Warden, signal_group

_LISTENING = re.compile(rb"^enginehouse \w+ listening on (\S+:\d+)\s*$", re.MULTILINE)
_METRICS = re.compile(rb"^enginehouse \w+ metrics on (http://\S+)\s*$", re.MULTILINE)
_HTTP = re.compile(rb"^enginehouse \w+ http on (https?://\S+)\s*$", re.MULTILINE)
_LAST_LINES = 12
_STOP_GRACE = 10.0  # seconds between SIGTERM and SIGKILL; a service gives its running calls 5 of them (see cluster.py)


class ServiceProcess:
    """`python -m <module> ...` in a session of its own, its stdout and stderr in one log file.

    A session of its own, so that the terminal's Ctrl-C reaches `up` alone, which then stops services in order.

    Attributes:
        name: "builder", "executor-1", "gateway".
        log: what it has printed since it was started.
        address: host:port, once it listens.
        metrics: URL of its metrics, once it listens, if it was started with --metrics-port.
        http: the same of --http-port.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self.address = self.metrics = self.http = ""
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Of the running process. Raises Unavailable before it is started."""
        return self._started().pid

    async def start(self, environment: Mapping[str, str], warden: Warden) -> None:
        """Starts it, over an older log."""
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *warden.watched(self._command),
                pass_fds=warden.pass_fds,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._warden = warden

    async def listening(self) -> None:
        """Returns when the service says that it listens; waits as long as it does not (see `LocalCluster.guard`)."""
        while not (found := _LISTENING.search(said := self.log.read_bytes())):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # a file tells nobody that it has grown
        self.address = found[1].decode()
        if metrics := _METRICS.search(said):  # said before
            self.metrics = metrics[1].decode()
        if http := _HTTP.search(said):
            self.http = http[1].decode()

    async def ended(self) -> None:
        """Returns when the process has ended."""
        await self._started().wait()

    def death(self) -> Unavailable:
        """The error that says how it ended, with the last lines of its log."""
        status = self._started().returncode or 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        lines = self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        said = "".join(f"\n  | {line}" for line in lines) or " nothing"
        return Unavailable(f"{self.name} {how}; the end of its log, {self.log}:{said}", reason="SERVICE_DIED")

    async def stop(self) -> None:
        """SIGTERM, and after 10 s SIGKILL; then its process group is empty, whatever it had started."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_GRACE)
        self.kill()
        await process.wait()
        self._warden.forget(process.pid)

    def kill(self) -> None:
        """SIGKILL to its process group, at once."""
        if self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)

    def _started(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise Unavailable(f"{self.name} has not been started")
        return self._process


def service_environment() -> dict[str, str]:
    """The environment of a service: ours, and what makes it run this very code, and reach its neighbours."""
    environment = dict(os.environ)
    # A folder `gateway/` or `engine/` where the person happens to stand must not be taken for ours.
    environment["PYTHONSAFEPATH"] = "1"
    here = str(Path(__file__).parent.parent)
    if here not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), here)))
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = ",".join(filter(None, (environment.get(name), "127.0.0.1,localhost")))
    return environment
