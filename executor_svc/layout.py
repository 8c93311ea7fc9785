"""From a Batch to the tensors of a step. The work a token costs in Python does not grow with the context."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_svc.core import Batch
from executor_svc.table_rows import TableRows


@dataclass(frozen=True)
class StepLayout:
    """What a step's tokens are and where their keys lie. Tensors are contiguous, on the CPU, and nobody changes them.

    Sequences are in the batch's order, T tokens packed one sequence after another.

    Attributes:
        token_ids, positions: int32 [T].
        logit_indices: int32; the row of the last token of each item that samples, then those of all items' prompt_rows.
        query_lens, context_lens: tokens of each sequence in this step; those that its last one sees, itself included.
        block_tables: int32 [num_seqs, max_blocks], as wide as the longest context needs; row i is the i-th sequence's
            table. Entries past a sequence's blocks are 0 or some other block: valid indices, to be masked by context_lens.
        slots: int64 [T]; token t's row in the flattened cache.
        rope_lengths: int32 [T], `engine.program.ROPE_LENGTHS` of programs that have this input.
    """

    token_ids: Tensor
    positions: Tensor
    logit_indices: Tensor
    query_lens: list[int]
    context_lens: list[int]
    block_tables: Tensor
    slots: Tensor
    rope_lengths: Tensor | None = None


class Layout:
    """Lays batches out. Keeps the block table of each running sequence, to which only new blocks are added.

    Args:
        max_batch_size: sequences that run at once; more in one batch cannot be laid out.
        max_blocks: of one sequence.
        rope_lengths: whether they are wanted.
    """

    def __init__(self, max_batch_size: int, max_blocks: int, block_size: int, *, rope_lengths: bool = False) -> None:
        self._block_size = block_size
        self._rope_lengths = rope_lengths
        self._tables = np.zeros((max_batch_size, max_blocks), dtype=np.int32)
        self._rows = TableRows(max_batch_size, self._write)

    def lay_out(self, batch: Batch) -> StepLayout:
        """The tensors of a batch; token ids up to its items' ends are known."""
        token_ids: list[int] = []
        starts, counts, sampling, prompt_rows = [], [], [], []
        for number, item in enumerate(batch.items):
            start, count, known = item.start, item.count, item.sequence.token_ids
            if item.prompt_rows:
                prompt_rows += range(
                    *(len(token_ids) + at - start for at in (item.prompt_rows.start, item.prompt_rows.stop))
                )
            if count == 1:
                token_ids.append(known[start])
            else:
                token_ids += known[start : start + count]
            starts.append(start)
            counts.append(count)
            if item.samples:
                sampling.append(number)
        query_lens = np.array(counts)
        context_lens = np.array(starts) + query_lens
        ends = np.cumsum(query_lens)  # behind each sequence's last token of the step
        longest = -(-int(context_lens.max()) // self._block_size)
        tables = np.ascontiguousarray(self._tables[self._rows.of(batch), :longest])
        if len(token_ids) == len(counts):  # decodes only
            owner, positions = np.arange(len(counts)), context_lens - 1
        else:
            owner = np.repeat(np.arange(len(counts)), query_lens)
            positions = np.arange(len(token_ids)) + (context_lens - ends)[owner]
        lengths = None
        if self._rope_lengths:
            least = np.array([item.sequence.rope_length for item in batch.items])
            lengths = torch.from_numpy(np.maximum(least[owner], positions + 1).astype(np.int32))
        slots = tables[owner, positions // self._block_size] * np.int64(self._block_size) + positions % self._block_size
        return StepLayout(
            token_ids=torch.tensor(token_ids, dtype=torch.int32),
            positions=torch.from_numpy(positions.astype(np.int32)),
            logit_indices=torch.tensor([*(ends[sampling] - 1).tolist(), *prompt_rows], dtype=torch.int32),
            query_lens=counts,
            context_lens=context_lens.tolist(),
            block_tables=torch.from_numpy(tables),
            slots=torch.from_numpy(slots),
            rope_lengths=lengths,
        )

    def _write(self, row: int, start: int, blocks: list[int]) -> None:
        self._tables[row, start : start + len(blocks)] = blocks
