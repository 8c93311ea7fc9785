"""How fast requests come to their end, and so how long those that wait will. Pure Python."""

from collections import deque

SHORTEST, LONGEST = 1.0, 60.0  # seconds that anybody is told to wait
_KEPT = 64  # ends: what is recent


class Pace:
    """Counts the ends of requests that have run, since the engine was last idle."""

    def __init__(self) -> None:
        self._since = 0.0
        self._ends: deque[float] = deque()

    def restart(self, now: float) -> None:
        """Work begins after a time without any, which says nothing about the pace."""
        self._since = now
        self._ends.clear()

    def ended(self, now: float) -> None:
        """A request has run to its end, whichever that is."""
        self._ends.append(now)
        if len(self._ends) > _KEPT:
            self._since = self._ends.popleft()

    def wait(self, requests: int, now: float) -> float:
        """Seconds until so many requests have run, between SHORTEST and LONGEST; SHORTEST while none has yet."""
        if not self._ends:
            return SHORTEST
        return min(max(requests * (now - self._since) / len(self._ends), SHORTEST), LONGEST)
