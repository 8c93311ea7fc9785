"""From a Batch to the few numbers of a step that a device does not have yet: block tables and last tokens stay there."""

from dataclasses import dataclass, replace

import numpy as np

from engine.manifest import Limits
from executor_svc.core import Batch, Scheduled
from executor_svc.kernels.logit_keys import WIDTH
from executor_svc.kernels.paged import TILE
from executor_svc.table_rows import TableRows

PROMPTS = 16  # in a step that a graph holds
UNKNOWN = -1  # a token that a batch in flight is still sampling
NOTHING = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class HostStep:
    """Columns of int32, T tokens packed one sequence after another, S sequences.

    Attributes:
        tokens, positions, token_rows: [T]; the token or UNKNOWN, its position, the table row of its sequence.
        rows: [S], the table row of each sequence. starts: [S + 1]. lengths: [S], keys that its last token sees.
        num_decodes: the first so many sequences have one token each.
        samples: [n], the token whose logits are wanted of each item that samples; prompt_rows: those of prompts' tokens.
        sampling_rows: [n], where the sampled tokens are kept.
        updates: [u, 2]: entry of the flattened tables, block.
        rope_lengths: [T], `engine.program.ROPE_LENGTHS` of programs that have this input; else empty.
    """

    tokens: np.ndarray
    positions: np.ndarray
    token_rows: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_decodes: int
    samples: np.ndarray
    prompt_rows: np.ndarray
    sampling_rows: np.ndarray
    updates: np.ndarray
    rope_lengths: np.ndarray

    def tiles(self, chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of the sequences behind the first num_decodes: which one each tile of queries is of, and its first query.

        Those with the most keys come first, so that none of them is left for the end.

        Args:
            chosen: bool, which of the sequences; all by default.
        """
        counts = -(-np.diff(self.starts[self.num_decodes :]) // TILE)
        if chosen is not None:
            counts = np.where(chosen, counts, 0)
        rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        first = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * TILE
        order = np.argsort(-first, kind="stable")
        return rows[order], first[order].astype(np.int32)

    @property
    def num_logits(self) -> int:
        """Rows of logits that are wanted."""
        return len(self.samples) + len(self.prompt_rows)

    @property
    def begins(self) -> np.ndarray:
        """bool, which of the sequences behind the first num_decodes have all their keys in this step."""
        lengths: np.ndarray = self.lengths[self.num_decodes :]
        return np.diff(self.starts[self.num_decodes :]) == lengths

    def of_row(self, row: int) -> "HostStep":
        """The same step with all its sequences in one table row."""
        same = {name: np.full_like(getattr(self, name), row) for name in ("token_rows", "rows", "sampling_rows")}
        return replace(self, **same)


def trial(decodes: int, prompt: int = 0, cached: int = 0, *, count: int = 1, told: bool = False) -> HostStep:
    """A step of decodes of a token each, then prompts, that is there to be tried: its tokens are 0, its rows one another's.

    Args:
        prompt: tokens of each prompt; 0 for none.
        cached: tokens of it that the cache would have already.
        count: of prompts.
        told: whether the logits of the prompts' tokens are wanted, too.
    """
    counts = np.array([1] * decodes + [prompt] * (count if prompt else 0), dtype=np.int32)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    zeros, rows = np.zeros(starts[-1], dtype=np.int32), np.zeros(len(counts), dtype=np.int32)
    return HostStep(
        tokens=zeros,
        positions=zeros,
        token_rows=zeros,
        rows=rows,
        starts=starts,
        lengths=counts + cached,
        num_decodes=decodes,
        samples=starts[1:] - 1,
        prompt_rows=np.arange(decodes, starts[-1] - 1 if told else decodes, dtype=np.int32),
        sampling_rows=rows,
        updates=np.zeros((0, 2), dtype=np.int32),
        rope_lengths=zeros + 1,
    )


def largest(limits: Limits) -> list[HostStep]:
    """Trials of as many decodes, and of as many tokens of prompts, as a step may hold."""
    longest = min(limits.max_num_tokens, limits.max_seq_len)
    return [trial(limits.max_batch_size), trial(0, longest, count=limits.max_num_tokens // longest)]


class Shape:
    """A step of a fixed size: room for sequences with one token each and, behind them, for the tokens of prompts.

    Args:
        decodes: sequences with one token each, at most.
        tokens: in all, at most; as many as decodes: none of prompts.
        samples: rows whose logits are computed.
        block_size: of the cache.
        fill_row: the table row of what only fills it up.
        rope_lengths: whether the program wants them.

    Attributes:
        sizes: of the columns: tokens, positions, token_rows; rows and lengths of the decodes, then of the prompts; starts (of the
            prompts), samples, sampling_rows, the tiles' sequences and first queries, updates, and rope_lengths.
        updates: pairs that their column has room for.
    """

    def __init__(
        self, decodes: int, tokens: int, samples: int, block_size: int, fill_row: int, *, rope_lengths: bool = False
    ) -> None:
        self.decodes, self.tokens, self._fill_row = decodes, tokens, fill_row
        self._prompts = prompts = PROMPTS if tokens > decodes else 0
        self._samples = samples = min(samples, decodes + prompts)
        self.updates = tokens // block_size + decodes + 2 * prompts
        sequences, tiles = decodes + prompts, (tokens // TILE + prompts if prompts else 0)
        self.sizes = (
            [tokens] * 3 + [sequences + 1] * 2 + [prompts + 2] + [samples] * 2 + [tiles] * 2 + [2 * self.updates]
            + [tokens if rope_lengths else 0]
        )  # fmt: skip

    def fits(self, layout: HostStep) -> bool:
        """Whether a step finds its place in it."""
        prompts, tokens = len(layout.rows) - layout.num_decodes, len(layout.tokens)
        large = layout.num_decodes > self.decodes or prompts > self._prompts or tokens > self.tokens
        return not large and len(layout.samples) <= self._samples and not len(layout.prompt_rows)

    def empty(self) -> list[np.ndarray]:
        """Columns of nothing: sequences have no tokens, and the tiles are of one behind the last."""
        fill = self._fill_row
        values = [0, 0, fill, fill, 0, 0, 0, fill, self._prompts, 0, -1, 1]
        return [np.full(size, value, dtype=np.int32) for size, value in zip(self.sizes, values, strict=True)]

    def fill(self, layout: HostStep) -> np.ndarray:
        """The columns of a step that fits, one after another; updates that do not fit are left out."""
        whole, count, total = self.empty(), layout.num_decodes, len(layout.rows)
        tokens, positions, token_rows, rows, lengths, starts, samples, sampling_rows, *rest = whole
        tile_rows, tile_first, updates, rope_lengths = rest
        for column, part in (
            (tokens, layout.tokens), (positions, layout.positions), (token_rows, layout.token_rows),
            (rope_lengths, layout.rope_lengths),
        ):  # fmt: skip
            column[: len(part)] = part
        for column, part in ((rows, layout.rows), (lengths, layout.lengths)):
            column[:count] = part[:count]
            column[self.decodes : self.decodes + total - count] = part[count:]
        begins = layout.starts[count:]
        starts[: len(begins)], starts[len(begins) :] = begins, begins[-1]
        samples[: len(layout.samples)] = layout.samples
        sampling_rows[: len(layout.samples)] = layout.sampling_rows
        tiles = layout.tiles()
        tile_rows[: len(tiles[0])], tile_first[: len(tiles[0])] = tiles
        news = layout.updates[: self.updates].reshape(-1)
        updates[: len(news)] = news
        return np.concatenate(whole)


class CudaLayout:
    """Knows which blocks the device has been told.

    Args:
        max_batch_size: sequences that run at once.
        max_blocks: of one sequence.
        rope_lengths: whether they are wanted.
    """

    def __init__(self, max_batch_size: int, max_blocks: int, *, rope_lengths: bool = False) -> None:
        self._max_blocks = max_blocks
        self._rope_lengths = rope_lengths
        self._rows = TableRows(max_batch_size, self._write)
        self._updates: list[tuple[int, int]] = []

    def lay_out(self, batch: Batch) -> HostStep:
        """The columns of a batch."""
        items = batch.items
        rows = np.array(self._rows.of(batch), dtype=np.int32)
        updates, self._updates = np.array(self._updates, dtype=np.int32).reshape(-1, 2), []
        counts = np.array([item.count for item in items], dtype=np.int32)
        begins = np.array([item.start for item in items], dtype=np.int32)
        starts = np.zeros(len(items) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        tokens: list[int] = []
        prompt_rows: list[int] = []
        for item in items:
            known, start, count = item.sequence.token_ids, item.start, item.count
            if item.prompt_rows:
                prompt_rows += range(
                    *(len(tokens) + at - start for at in (item.prompt_rows.start, item.prompt_rows.stop))
                )
            if count == 1:
                tokens.append(known[start] if start < len(known) else UNKNOWN)
            else:
                part = known[start : start + count]
                tokens += part
                tokens += [UNKNOWN] * (count - len(part))
        owner = np.repeat(np.arange(len(items)), counts)
        sampling = np.array([number for number, item in enumerate(items) if item.samples], dtype=np.int64)
        positions = (np.arange(len(tokens)) + (begins - starts[:-1])[owner]).astype(np.int32)
        lengths = np.zeros(0, dtype=np.int32)
        if self._rope_lengths:
            least = np.array([item.sequence.rope_length for item in items], dtype=np.int32)
            lengths = np.maximum(least[owner], positions + 1)
        return HostStep(
            tokens=np.array(tokens, dtype=np.int32),
            positions=positions,
            token_rows=rows[owner],
            rows=rows,
            starts=starts,
            lengths=begins + counts,
            num_decodes=int(np.argmax(counts > 1)) if (counts > 1).any() else len(items),
            samples=(starts[1:][sampling] - 1).astype(np.int32),
            prompt_rows=np.array(prompt_rows, dtype=np.int32),
            sampling_rows=rows[sampling],
            updates=updates,
            rope_lengths=lengths,
        )

    def _write(self, row: int, start: int, blocks: list[int]) -> None:
        first = row * self._max_blocks + start
        self._updates += zip(range(first, first + len(blocks)), blocks, strict=True)


def draws(items: list[Scheduled], rows: np.ndarray) -> np.ndarray:
    """How `kernels.sample` is to draw the tokens of items, int32 [n * WIDTH], then the rows where they are kept, [n].

    NOTHING if the most probable ones are wanted of all.
    """
    samplings = [item.sequence.sampling for item in items]
    if all(sampling.temperature == 0 for sampling in samplings):
        return NOTHING
    table = np.empty((len(items), WIDTH), dtype=np.int32)
    packed = b"".join([sampling.packed for sampling in samplings])
    table[:, : WIDTH - 1] = np.frombuffer(packed, dtype=np.int32).reshape(len(items), WIDTH - 1)
    table[:, WIDTH - 1] = [item.start + item.count for item in items]
    return np.concatenate([table.reshape(-1), rows])
