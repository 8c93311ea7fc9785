"""From logits to tokens: greedy, or temperature, top-k and top-p with random numbers that are counted, not drawn.

The random number of a token depends on (seed, position) alone: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", 2011) with the seed as key and the position as counter. So the text does not depend on the batch, on preemption
or on where a stream was resumed. What is kept is a set of tokens that the row's own settings define (ties at the border
are all kept), and the token is found by inverting the distribution function in the order of the vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from executor_svc.core import Sampling

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


def sample(logits: Tensor, settings: list[Sampling], positions: list[int]) -> list[int]:
    """The next token of each row.

    Args:
        logits: [N, vocab] of any float dtype.
        settings: one a row.
        positions: of the tokens that are chosen, counted from the sequence's first token.
    """
    random = [row for row, sampling in enumerate(settings) if sampling.temperature > 0]
    tokens: list[int] = logits.argmax(-1).tolist()
    if random:
        chosen = [settings[row] for row in random]
        numbers = uniform([sampling.seed for sampling in chosen], [positions[row] for row in random])
        drawn = _draw(logits[random].double(), chosen, torch.from_numpy(numbers).to(logits.device))
        for row, token in zip(random, drawn.tolist(), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Tensor, settings: list[Sampling], numbers: Tensor) -> Tensor:
    """[N, vocab] float64, [N] in [0, 1) -> [N] tokens."""
    temperatures = torch.tensor(
        [sampling.temperature for sampling in settings], dtype=logits.dtype, device=logits.device
    )
    scaled = logits / temperatures[:, None]
    for row, sampling in enumerate(settings):
        scaled[row] = _kept(scaled[row], sampling)
    mass = torch.softmax(scaled, -1).cumsum(-1)
    target = numbers[:, None] * mass[:, -1:]  # below the last sum, so that rounding cannot lead past the end
    return torch.searchsorted(mass, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _kept(row: Tensor, sampling: Sampling) -> Tensor:
    """[vocab]; what top-k and top-p leave out becomes -inf."""
    vocab = row.shape[-1]
    limit = sampling.top_k if 0 < sampling.top_k < vocab else vocab
    if limit == vocab and sampling.top_p >= 1:
        return row
    ordered = row.topk(limit).values if limit < vocab else row.sort(descending=True).values
    last = limit - 1
    if sampling.top_p < 1:
        last = int(
            (torch.softmax(ordered, -1).cumsum(-1) < sampling.top_p).sum()
        )  # the smallest set that reaches top_p
    return row.masked_fill(row < ordered[min(last, limit - 1)], float("-inf"))
