"""Where a build writes weights before they are uploaded, locked while it runs: that tells what killed ones have left."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from engine.errors import EnginehouseError, FailedPrecondition, ResourceExhausted

_PREFIX = "enginehouse-build-"
MORE_ROOM = "free some space, or choose another folder: --data of `enginehouse build`, --work-dir of a builder"
_FRESH = 10.0  # seconds in which a new directory may not be locked yet


class WorkDirectory:
    """A new directory, removed by `remove` or at the end of a `with`. Raises OSError if it cannot be made."""

    def __init__(self, parent: Path | None) -> None:
        """In `parent`, by default the system's directory of temporary files."""
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = _lock(self.path)

    def remove(self) -> None:
        """Removes it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


def clear(parent: Path | None) -> None:
    """Removes what builds that were killed have left in `parent`: weights, as large as their engines."""
    for directory in Path(parent or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody works in it, or it is another user's
            if directory.stat().st_mtime < time.time() - _FRESH:
                lock = _lock(directory)
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)


def unwritable(path: Path, error: OSError, fix: str = "") -> EnginehouseError:
    """Why a file cannot be written, and what to do: MORE_ROOM for one in a work directory."""
    message = f"cannot write {path}: {error.strerror}" + (f"; {fix}" if fix else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(message, reason="WORK_DIR_FULL")
    return FailedPrecondition(message, reason="WORK_DIR_UNWRITABLE")


def _lock(directory: Path) -> int:
    """Says that somebody works in a directory, until the descriptor is closed. Raises BlockingIOError if somebody does."""
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
