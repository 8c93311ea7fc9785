"""Operators on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import Step

__all__ = ["add_rms_norm", "attention", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """torch's fused norm computes in float32 as the reference does."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, and its norm as above."""
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, step: Step, cache: int, head_dim: int, scale: float, window: int
) -> Tensor:
    """Sequence by sequence through torch's flash attention; keys are gathered from their blocks."""
    k_cache, v_cache = step.k_caches[cache], step.v_caches[cache]
    block_size, groups = k_cache.shape[1], k_cache.shape[2]
    k_cache.view(-1, groups, head_dim).index_copy_(0, step.slots, k.view(-1, groups, head_dim))
    v_cache.view(-1, groups, head_dim).index_copy_(0, step.slots, v.view(-1, groups, head_dim))
    output = torch.empty_like(q)
    start = 0
    for row, (query_len, context_len) in enumerate(zip(step.query_lens, step.context_lens, strict=True)):
        first = (
            max(0, context_len - query_len - window + 1) // block_size if window else 0
        )  # blocks before are out of every window
        blocks = step.block_tables[row, first : -(-context_len // block_size)]
        length = context_len - first * block_size
        keys = k_cache.index_select(0, blocks).view(-1, groups, head_dim)[:length].transpose(0, 1)
        values = v_cache.index_select(0, blocks).view(-1, groups, head_dim)[:length].transpose(0, 1)
        queries = q[start : start + query_len].view(query_len, -1, head_dim).transpose(0, 1)
        mask = None
        if window or query_len not in (1, length):
            at = torch.arange(length - query_len, length)[:, None]
            seen = torch.arange(length)[None, :]
            mask = (seen <= at) & (seen > at - window) if window else seen <= at
        result = F.scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            mask,
            is_causal=mask is None and query_len > 1,
            scale=scale,
            enable_gqa=True,
        )
        output[start : start + query_len].view(query_len, -1, head_dim).copy_(result[0].transpose(0, 1))
        start += query_len
    return output
