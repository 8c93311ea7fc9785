"""Operators on the CPU."""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import REFERENCE, Step
from engine.ops import rms_norm as reference_rms_norm

__all__ = ["add_rms_norm", "attention", "rms_norm", "scale"]

_SLACK = 64  # keys by which contexts may differ in one batch, beside half of their length


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """torch's fused norm computes in float32 as the reference does, with one dtype."""
    if weight.dtype != x.dtype:
        return reference_rms_norm(x, weight, eps=eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, and its norm as above."""
    total = x + residual
    return rms_norm(total, weight, eps=eps), total


def scale(x: Tensor, *, factor: float) -> Tensor:
    """A number instead of a tensor that is made each time."""
    return x * _rounded(factor, x.dtype)


@functools.cache
def _rounded(factor: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(factor, dtype=dtype))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi: Tensor | None = None,
    *,
    step: Step,
    cache: int,
    head_dim: int,
    scale: float,
    window: int,
    soft_cap: float = 0.0,
    **units: float,
) -> Tensor:
    """torch's flash attention: sequences with one new token in groups of like length, the others one by one.

    Keys and values are gathered from their blocks. With alibi, a soft cap or a cache of 8 bits, the reference serves.
    """
    if alibi is not None or soft_cap or any(units.values()):
        settings = {"cache": cache, "head_dim": head_dim, "scale": scale, "window": window, "soft_cap": soft_cap}
        result: Tensor = REFERENCE["attention"](q, k, v, alibi, step=step, **settings, **units)
        return result
    k_cache, v_cache = step.k_caches[cache], step.v_caches[cache]
    block_size, groups = k_cache.shape[1], k_cache.shape[2]
    k_cache.view(-1, groups, head_dim).index_copy_(0, step.slots, k.view(-1, groups, head_dim))
    v_cache.view(-1, groups, head_dim).index_copy_(0, step.slots, v.view(-1, groups, head_dim))
    queries, output = q.view(len(q), -1, head_dim), torch.empty_like(q).view(len(q), -1, head_dim)
    starts = list(itertools.accumulate(step.query_lens, initial=0))
    for rows in _batches(step):
        tokens = [at for row in rows for at in range(starts[row], starts[row + 1])]
        query_len, longest = step.query_lens[rows[0]], max(step.context_lens[row] for row in rows)
        first = 0  # blocks before are out of every window
        if window:
            first = (
                max(0, min(step.context_lens[row] - step.query_lens[row] for row in rows) - window + 1) // block_size
            )
        blocks = step.block_tables[rows, first : -(-longest // block_size)]
        keys, values = (
            part.index_select(0, blocks.flatten()).view(len(rows), -1, groups, head_dim)[
                :, : longest - first * block_size
            ]
            for part in (k_cache, v_cache)
        )
        whole = (
            query_len == keys.shape[1] and len(rows) == 1 and not window
        )  # a prompt from its beginning: causal, no mask
        ends = torch.tensor([step.context_lens[row] for row in rows]) - first * block_size
        result = F.scaled_dot_product_attention(
            queries[tokens].view(len(rows), query_len, -1, head_dim).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            None if whole else _visible(ends, query_len, keys.shape[1], window),
            is_causal=whole and query_len > 1,
            scale=scale,
            enable_gqa=True,
        )
        output[tokens] = result.transpose(1, 2).flatten(0, 1)
    return output.view_as(q)


def _batches(step: Step) -> list[list[int]]:
    """Rows that are computed together: those with one new token whose contexts differ by at most half, and single others."""
    decodes = sorted((length, row) for row, length in enumerate(step.context_lens) if step.query_lens[row] == 1)
    batches: list[list[int]] = [[row] for row, count in enumerate(step.query_lens) if count > 1]
    shortest = 0
    for length, row in decodes:
        if not shortest or length > 2 * shortest + _SLACK:
            batches.append([])
            shortest = length
        batches[-1].append(row)
    return batches


def _visible(ends: Tensor, query_len: int, num_keys: int, window: int) -> Tensor | None:
    """[N] key counts -> which keys each of the last query_len positions sees, [N, 1, query_len, num_keys]; None for all."""
    at = ends[:, None] - query_len + torch.arange(query_len)
    seen = torch.arange(num_keys)
    visible = seen <= at[..., None]
    if window:
        visible &= seen > at[..., None] - window
    return None if bool(visible.all()) else visible[:, None]
