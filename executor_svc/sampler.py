"""From logits to tokens: greedy, or random with numbers that are counted, not drawn; and what is told beside them.

The order: logit bias, bad words, min_tokens and what guided output forbids, repetition penalty, presence and frequency penalty
(processors.py); temperature, top-k, top-p of what top-k leaves, min-p (draw.py). On the CPU a row that wants only a temperature,
and a guide's mask, is drawn by kernels/choose.py, by the same definition. It is transformers' order. vLLM applies min-p
before top-k and top-p, so that its top-p is a share of what min-p leaves, and looks for the beginning of a bad word in the
completion alone. transformers may part equally probable tokens at the border of top-p, which stay together here, and allows a
bad word that is one end-of-sequence id, which is masked here as any other.

The random number of a token depends on (seed, position) alone: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", 2011) with the seed as key and the position as counter. So the text does not depend on the batch, on preemption
or on where a stream was resumed.
"""

import enum

import numpy as np
import torch
from torch import Tensor

from executor_svc.core import Batch, Logprobs, Sampled, Sequence
from executor_svc.draw import draw
from executor_svc.kernels import choose
from executor_svc.logprobs import best, log_probabilities, of_prompts, slices
from executor_svc.processors import edit

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64 [N], uint64 [N] -> the first word of Philox4x32-10, uint32 [N]; key = seed, counter = (position, 0, 0, 0)."""
    k0, k1 = seeds & _LOW, seeds >> _SHIFT
    c0, c1 = positions & _LOW, positions >> _SHIFT
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0.astype(np.uint32)


def uniform(seeds: list[int], positions: list[int]) -> np.ndarray:
    """A number in [0, 1) for each (seed, position): 24 random bits, float64 [N]."""
    words = philox(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64))
    return (words >> np.uint32(8)) * 2.0**-24


def _numbers(sequences: list[Sequence], positions: list[int]) -> np.ndarray:
    return uniform([sequence.sampling.seed for sequence in sequences], positions)


class _Way(enum.Enum):
    """Rows that take the same way are worked on together, and only those pay for it."""

    GREEDY = enum.auto()  # by logits that have been edited
    RANDOM = enum.auto()
    LIMITED = enum.auto()  # random, among some
    CANDIDATES = enum.auto()  # of a beam search


def answer(logits: Tensor, batch: Batch) -> Sampled:
    """All that is wanted of a batch.

    Args:
        logits: float32 [rows, vocab]: of the items that sample, one each, then of all items' prompt_rows.
    """
    items = [item for item in batch.items if item.samples]
    if not items and not len(logits):
        return Sampled([])
    sequences, positions = [item.sequence for item in items], [item.start + item.count for item in items]
    sampled = sample(logits[: len(items)], sequences, positions)
    if len(items) == len(logits):
        return sampled
    return Sampled(sampled.token_ids, sampled.logprobs, of_prompts(logits[len(items) :], batch.items))


@torch.inference_mode()
def sample(logits: Tensor, sequences: list[Sequence], positions: list[int]) -> Sampled:
    """The next token of each row, and its log-probability by the row's unchanged logits where that is wanted.

    Args:
        logits: float32 [N, vocab]; they stay as they are.
        sequences: one a row.
        positions: of the tokens that are chosen, counted from the sequence's first token.
    """
    others = [row for row, sequence in enumerate(sequences) if not sequence.plain]
    ways: dict[_Way, list[int]] = {}
    masks, bits = [0] * len(sequences), 0
    drawn: dict[int, float] = {}  # temperatures of rows that are drawn as they are
    native = choose.serves(logits)
    for row in others:
        sequence = sequences[row]
        if native and sequence.direct:
            if sequence.guide is not None:
                masks[row], bits = sequence.guide.bits(), sequence.guide.num_bits
            if sequence.sampling.temperature > 0:
                drawn[row] = sequence.sampling.temperature
        elif way := _way(sequence, positions[row]):
            ways.setdefault(way, []).append(row)
    if len(sequences) == sum(map(len, ways.values())):
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    elif native:
        numbers = _numbers([sequences[row] for row in drawn], [positions[row] for row in drawn]) if drawn else ()
        tokens = choose.tokens(logits, masks, bits, drawn, numbers)
    else:
        tokens = logits.argmax(-1)
    told: dict[int, Logprobs] = {}
    for way, all_rows in ways.items():
        for rows in slices(all_rows, logits.shape[-1]):
            chosen, at = [sequences[row] for row in rows], [positions[row] for row in rows]
            scores = logits.clone() if len(rows) == len(logits) else logits[rows]
            if way is _Way.CANDIDATES:
                scores = torch.log_softmax(scores, -1)
            edit(scores, chosen, at)
            if way is _Way.CANDIDATES:
                told |= _candidates(scores, chosen, rows)
            if way in (_Way.CANDIDATES, _Way.GREEDY):
                tokens[rows] = scores.argmax(-1)
            else:
                settings = [sequence.sampling for sequence in chosen]
                tokens[rows] = draw(scores, settings, torch.from_numpy(_numbers(chosen, at)).to(logits.device))
    token_ids: list[int] = tokens.tolist()
    wanted: dict[int, list[int]] = {}
    for row in others:
        if (count := sequences[row].logprobs) is not None:
            wanted.setdefault(count, []).append(row)
    for top, rows in wanted.items():
        found = log_probabilities(logits, rows, [token_ids[row] for row in rows], top)
        told.update(zip(rows, found, strict=True))
    return Sampled(token_ids, told)


def _way(sequence: Sequence, position: int) -> _Way | None:
    """None for the most probable token of logits that stay as they are."""
    sampling = sequence.sampling
    if sequence.candidates:
        return _Way.CANDIDATES
    if sampling.temperature > 0:
        return _Way.LIMITED if sampling.limited else _Way.RANDOM
    return (
        _Way.GREEDY
        if sampling.edits or sequence.guide is not None or position - sequence.prompt_len < sequence.min_tokens
        else None
    )


def _candidates(scores: Tensor, sequences: list[Sequence], rows: list[int]) -> dict[int, Logprobs]:
    """The best next tokens of beams, by row."""
    found = {}
    for count in {sequence.candidates for sequence in sequences}:
        mine = [index for index, sequence in enumerate(sequences) if sequence.candidates == count]
        values, ids = best(scores[mine], count)
        for index, row_ids, row_values in zip(mine, ids.tolist(), values.tolist(), strict=True):
            found[rows[index]] = Logprobs([], len(row_ids), row_ids, row_values)
    return found
