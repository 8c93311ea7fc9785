"""The data folder of a person's own cluster, and how a client finds the gateway.

store/          engines, when no other store is given
work/           what builds write before it is uploaded
logs/           <service>.log of the cluster that runs, or ran last
cluster.json    where the running cluster listens; removed when it ends
cluster.lock    held as long as any process of a cluster may live
"""

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from engine.errors import FailedPrecondition

DEFAULT_PORT = 8400
DEFAULT_HTTP_PORT = 8480
DEFAULT_GATEWAY = f"127.0.0.1:{DEFAULT_PORT}"


class ClusterState(msgspec.Struct, frozen=True):
    """What cluster.json says: addresses are host:port as a client on this machine reaches them, pids are by service.

    So are the URLs of metrics, and of the gateway's HTTP API, if there are any.
    """

    pid: int
    gateway: str
    builder: str
    executors: list[str]
    store: str
    pids: dict[str, int]
    metrics: dict[str, str] = {}
    http: str = ""


@dataclass(frozen=True)
class Home:
    """A data folder.

    Example:
        >>> from enginehouse import Home
        >>> Home.find("/data").store
        'file:///data/store'
    """

    root: Path

    @staticmethod
    def find(data: str | Path | None = None) -> "Home":
        """The folder given, else $ENGINEHOUSE_HOME, else ~/.enginehouse; it need not exist."""
        chosen = data or os.environ.get("ENGINEHOUSE_HOME") or "~/.enginehouse"
        return Home(Path(chosen).expanduser().absolute())

    @property
    def store(self) -> str:
        """URL of the store in this folder."""
        return (self.root / "store").as_uri()

    @property
    def work(self) -> Path:
        """Where builds write."""
        return self.root / "work"

    @property
    def logs(self) -> Path:
        """Where services log."""
        return self.root / "logs"

    @property
    def state_file(self) -> Path:
        """cluster.json."""
        return self.root / "cluster.json"

    def make(self) -> None:
        """Creates the folders."""
        for folder in (self.root, self.work, self.logs):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            except OSError as error:
                raise FailedPrecondition(
                    f"cannot write in {folder}: {error.strerror}; choose another folder with --data",
                    reason="DATA_DENIED",
                ) from None

    def running(self) -> ClusterState | None:
        """The cluster that runs on this folder, or None; what a killed one left behind does not count."""
        try:
            state = msgspec.json.decode(self.state_file.read_bytes(), type=ClusterState)
        except (OSError, msgspec.MsgspecError):
            return None
        return state if _alive(state.pid) else None

    def lock(self) -> IO[str]:
        """The folder for this process alone, until the file is closed here and in every process that it is passed to.

        Raises:
            FailedPrecondition: says which process has it.
        """
        self.make()
        file = open(self.root / "cluster.lock", "a+", encoding="utf-8")  # noqa: SIM115  (the caller keeps it open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                message = self._taken(file.read().strip())
            raise FailedPrecondition(message, reason="CLUSTER_RUNNING") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self.state_file.unlink(missing_ok=True)
        return file

    def _taken(self, holder: str) -> str:
        if not (holder.isdigit() and _alive(int(holder))):
            return f"services of a killed `enginehouse up` are still ending in {self.root}: try again in some seconds"
        running = self.running()
        at = f", gateway {running.gateway}" if running else ""
        return (
            f"a cluster runs on {self.root} already (process {holder}{at}): use that one, stop it with "
            f"`kill {holder}`, or give this one another folder with --data"
        )


def gateway_address(given: str | None, home: Home) -> str:
    """The gateway to talk to: the one given, else that of the running cluster, else where `up` would put it."""
    if given:
        return given
    running = home.running()
    return running.gateway if running else DEFAULT_GATEWAY


def _alive(pid: int) -> bool:
    with contextlib.suppress(PermissionError):  # somebody else's process is alive, too
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
