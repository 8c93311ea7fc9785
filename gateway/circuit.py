"""Circuit breakers (Nygard, Release It!): an executor that fails again and again gets nothing for a while, then one to try."""

import random
import time
from collections.abc import Callable

FAILURES = 3  # in a row, that open it
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds that it stays open

CLOSED, HALF_OPEN, OPEN = 0, 1, 2


class Circuit:
    """Of one engine at one executor. Closed, it lets everything through; open, nothing; half-open, a single request.

    A probe need not be told of when nobody hears of its end: the next one is let through after another pause.

    Args:
        clock: seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._clock, self._jitter = clock, jitter
        self._failures = 0
        self._pause = _FIRST_PAUSE
        self._until = 0.0

    @property
    def state(self) -> int:
        """CLOSED, HALF_OPEN or OPEN."""
        if self._failures < FAILURES:
            return CLOSED
        return OPEN if self._clock() < self._until else HALF_OPEN

    def sent(self) -> None:
        """A request has been sent; where it is half-open that was the one."""
        if self.state == HALF_OPEN:
            self._open()

    def succeeded(self) -> None:
        """A request has ended well."""
        self._failures, self._pause = 0, _FIRST_PAUSE

    def failed(self) -> None:
        """A request has failed by the executor's fault, or several of them together."""
        self._failures += 1
        if self._failures == FAILURES:
            self._open()
        elif self._failures > FAILURES:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._open()

    def _open(self) -> None:
        self._until = self._clock() + self._pause * self._jitter(0.5, 1.5)
