"""The sequences that are not admitted. Pure Python."""

import heapq

from executor_svc.core import Sequence


class Waiting:
    """Sequences by rank. Those that end while they wait stay until they surface or are dropped in bulk; nobody sees them."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, in no order."""
        return [sequence for _, sequence in self._heap if sequence.finish is None]

    def push(self, sequence: Sequence) -> None:
        """Takes a sequence that has its place among the arrivals."""
        heapq.heappush(self._heap, (sequence.rank, sequence))
        self._count += 1

    def first(self) -> Sequence | None:
        """The one that is admitted next; it stays."""
        while self._heap and self._heap[0][1].finish is not None:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Removes what `first` has given."""
        self._count -= 1
        return heapq.heappop(self._heap)[1]

    def ended(self) -> None:
        """To be called when the end of one of them is set."""
        self._count -= 1
        if len(self._heap) > 2 * self._count + 64:
            self._heap = [entry for entry in self._heap if entry[1].finish is None]
            heapq.heapify(self._heap)
