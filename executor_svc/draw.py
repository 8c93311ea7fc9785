"""Random tokens: temperature, then the sets that top-k, top-p and min-p keep, then one token of what is left.

What is kept is defined by a row's own logits: all tokens at least as probable as the last one that top-k or top-p needs, so
that equal ones stay together, and of these the ones that min-p keeps. The token is found by inverting the distribution
function in the order of the vocabulary. Whatever is computed of a row does not depend on the rows beside it.
"""

import torch
from torch import Tensor

from executor_svc.core import Sampling

_WIDTHS = (256, 4096)  # most probable tokens that are looked at, before all are sorted
_CHUNK = 512  # tokens whose probabilities are summed in float32; sums of sums are float64


def draw(logits: Tensor, settings: list[Sampling], numbers: Tensor) -> Tensor:
    """A token a row, int64 [N].

    Args:
        logits: float32 [N, vocab]; overwritten.
        settings: one a row, temperatures above 0. A slice is quickest where all of them or none are `limited`.
        numbers: float64 [N] in [0, 1).
    """
    temperatures = _column([sampling.temperature for sampling in settings], logits)
    logits -= logits.amax(-1, keepdim=True)  # so that a tiny temperature leads to -inf, never to inf
    logits /= temperatures
    weights = torch.softmax(logits, -1)
    if any(sampling.limited for sampling in settings):
        dropped = logits < _thresholds(logits, weights, settings)
        if any(sampling.min_p > 0 for sampling in settings):
            shares = _column([sampling.min_p for sampling in settings], logits)
            dropped |= weights < shares * weights.amax(-1, keepdim=True)
        weights.masked_fill_(dropped, 0)
    return _invert(weights, numbers)


def _thresholds(logits: Tensor, probabilities: Tensor, settings: list[Sampling]) -> Tensor:
    """[N, 1]: the logit of the last token that top-k and, of what it leaves, top-p need; -inf where they keep all."""
    vocab = logits.shape[-1]
    thresholds = logits.new_full((len(settings), 1), float("-inf"))
    limits = [min(sampling.top_k or vocab, vocab) for sampling in settings]
    left = [row for row, sampling in enumerate(settings) if limits[row] < vocab or sampling.top_p < 1]
    for width in (*(width for width in _WIDTHS if width < vocab), vocab):
        rows = [row for row in left if limits[row] <= width or limits[row] == vocab]
        if not rows:
            continue
        best, ids = logits[rows].topk(width) if width < vocab else logits[rows].sort(descending=True)
        limit = torch.tensor([limits[row] for row in rows], device=logits.device)[:, None]
        share = torch.tensor([settings[row].top_p for row in rows], dtype=torch.float64, device=logits.device)[:, None]
        mass = probabilities[rows].gather(-1, ids).double()
        mass = mass.masked_fill_(torch.arange(width, device=logits.device) >= limit, 0).cumsum_(-1)
        whole = limit <= width
        wanted = share * torch.where(whole, mass[:, -1:], 1.0)
        last = (mass < wanted).sum(-1, keepdim=True)  # the smallest set that reaches top_p
        last = torch.where(share < 1, torch.minimum(last, limit - 1), limit - 1).clamp(max=width - 1)
        found = (whole | (mass[:, -1:] >= wanted)).squeeze(-1).tolist()
        kept = [index for index, is_found in enumerate(found) if is_found]
        done = [rows[index] for index in kept]
        thresholds[done] = best.gather(-1, last)[kept]
        left = sorted(set(left) - set(done))
    return thresholds


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """[N, vocab] float32, [N] in [0, 1) -> the first token at which the sum of weights exceeds the number's share, [N]."""
    vocab = weights.shape[-1]
    whole = vocab // _CHUNK * _CHUNK
    sums = weights[:, :whole].unflatten(-1, (-1, _CHUNK)).sum(-1) if whole else weights[:, :0]
    sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1).double()
    mass = sums.cumsum(-1)
    target = numbers[:, None] * mass[:, -1:]
    chunk = torch.searchsorted(mass, target, right=True).clamp_(max=sums.shape[-1] - 1)
    token_ids = chunk * _CHUNK + torch.arange(_CHUNK, device=weights.device)
    inside = weights.gather(-1, token_ids.clamp(max=vocab - 1)).double().masked_fill_(token_ids >= vocab, 0).cumsum_(-1)
    rest = target - (mass - sums).gather(-1, chunk)
    below_all = torch.nextafter(inside[:, -1:], inside.new_zeros(()))  # rounding must not lead past the chunk's end
    token = chunk * _CHUNK + torch.searchsorted(inside, torch.minimum(rest, below_all), right=True)
    return token.squeeze(-1).clamp_(max=vocab - 1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
