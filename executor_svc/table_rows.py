"""Which row of the block tables each running sequence has, and which of its blocks stand there already."""

from collections.abc import Callable

from executor_svc.core import Batch, Sequence


class TableRows:
    """Gives rows out. One that is wanted again is taken from the sequence which has been absent from batches for longest.

    But from none of which a token is pending, since the device keeps that by row: there is always one that does not run.

    A sequence's `blocks` only ever grows in place; for anything else, giving its blocks back above all, it gets another
    list. So what a row holds is known by the list that it was made of.

    Args:
        max_batch_size: sequences that run at once; more in one batch have no rows.
        write: called with (row, place of the first, blocks) for what is not in the tables yet.
    """

    def __init__(self, max_batch_size: int, write: Callable[[int, int, list[int]], None]) -> None:
        self._write = write
        self._made_of: list[list[int]] = [[] for _ in range(max_batch_size)]  # by row: the list
        self._filled = [0] * max_batch_size  # by row: the blocks that have been written
        self._rows: dict[Sequence, int] = {}  # the longest absent from batches first
        self._free = list(range(max_batch_size))

    def of(self, batch: Batch) -> list[int]:
        """The rows of the batch's sequences, brought up to date."""
        rows, found = [], self._rows
        for item in batch.items:  # first all that have one: none of them is given to another sequence
            if (row := found.pop(item.sequence, None)) is not None:
                found[item.sequence] = row
        for item in batch.items:
            sequence = item.sequence
            row = found.get(sequence)
            if row is None:
                row = self._take(sequence)
            blocks = sequence.blocks
            if self._made_of[row] is not blocks:
                self._made_of[row], self._filled[row] = blocks, 0
            filled = self._filled[row]
            if filled < len(blocks):
                self._write(row, filled, blocks[filled:])
                self._filled[row] = len(blocks)
            rows.append(row)
        return rows

    def _take(self, sequence: Sequence) -> int:
        """A row for a sequence that has none."""
        if not self._free:
            absent = next(one for one in self._rows if one.finish is not None or not one.pending)
            self._free.append(self._rows.pop(absent))
        row = self._rows[sequence] = self._free.pop()
        return row
