"""How long the phases of a build take."""

import time
from collections.abc import Callable

from builder_svc.build_config import Progress


class Phases:
    """Hears a build's progress and passes it on. A phase lasts until the next one's first word, the last until `close`.

    Args:
        on_phase: called with each phase that is over and its seconds.
        clock: in seconds.
    """

    def __init__(
        self,
        progress: Progress,
        on_phase: Callable[[str, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._on_phase, self._clock = progress, on_phase, clock
        self._current, self._began = "", 0.0

    def progress(self, phase: str, done: int, total: int, unit: str) -> None:
        """As the build tells it."""
        if phase != self._current:
            self.close()
            self._current, self._began = phase, self._clock()
        self._progress(phase, done, total, unit)

    def close(self) -> None:
        """The build has ended, well or not."""
        if self._current:
            self._on_phase(self._current, self._clock() - self._began)
            self._current = ""
