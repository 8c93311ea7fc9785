"""Which sequences are out of time. Pure Python."""

import heapq

from executor_svc.core import Sequence


class Deadlines:
    """Sequences by their deadline, the earliest first; those that have ended are dropped in bulk, or when they surface."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._sweep_at = 64

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence that has its place among the arrivals; one without a deadline is never out of time."""
        if sequence.deadline is None:
            return
        heapq.heappush(self._heap, (sequence.deadline, sequence.serial, sequence))
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[2].finish is None]
            heapq.heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + 64

    def passed(self, now: float) -> list[Sequence]:
        """The sequences that have not ended and whose deadline is not after `now`; each of them once."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.finish is None:
                found.append(sequence)
        return found
