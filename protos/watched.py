"""What files say, as long as a process lives: read again when they change."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from engine.errors import EnginehouseError

T = TypeVar("T")

_INTERVAL = 1.0  # seconds between two looks at the files

log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """The newest usable version of what `load` makes of files.

    A version that cannot be used, such as a certificate whose key has not been written yet, is told in the log once, and the
    one before stays. Looks are so seldom and cheap that every call may ask; from any thread.

    Attributes:
        version: rises with each one.
    """

    def __init__(
        self, paths: Sequence[Path], load: Callable[[], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Loads at once. Raises what `load` raises.

        Args:
            clock: seconds.
        """
        self.version = 1
        self._paths, self._load, self._clock = paths, load, clock
        self._seen, self._looked = self._look(), clock()
        self._value = load()

    def get(self) -> T:
        """The value; at most a second older than the files."""
        now = self._clock()
        if now - self._looked >= _INTERVAL:
            self._looked = now
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                self._renew()
        return self._value

    def _renew(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._load()
        except EnginehouseError as error:
            log.error("%s changed and cannot be used, what it said before stays in force: %s", names, error.message)
            return
        self.version += 1
        log.info("read %s again", names)

    def _look(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file is written or, as Kubernetes does with mounted secrets, a link in its path is moved."""
        return [_signature(path) for path in self._paths]


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
