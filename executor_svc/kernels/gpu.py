"""Operators on CUDA: Triton kernels for what reads memory once, the libraries behind torch for matrix products.

`attention` takes a `DeviceStep`, whose tensors are all on the device: nothing here waits for it, so that a CUDA graph can hold
a step.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import Step
from engine.ops import rms_norm as reference_rms_norm
from executor_svc.kernels import paged, prompt, rows
from executor_svc.kernels.grouped import experts

__all__ = [
    "DeviceStep",
    "add_rms_norm",
    "attention",
    "experts",
    "linear",
    "rms_norm",
    "rope",
    "rope_attention",
    "silu_mul",
]

_GEMV_ROWS = (1, 2, 4)
_THIN_ROWS = 64
_LARGE = 50_000_000  # elements of a matrix (bench/products.py: measured on an H100)


Tiles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DeviceStep(Step):
    """A step as the device sees it: first sequences with one token each, then the others, in tiles.

    Attributes:
        num_decodes: the first so many sequences, and rows of the batch.
        rows: int32 [num_seqs], each sequence's row of block_tables.
        lengths: int32 [num_seqs], context_lens.
        starts: int32, the rows of the batch at which the other sequences begin, and the last one's end.
        tiles: int32 [n] twice, as `paged.prefill` takes them.
        fresh, cached: the tiles of sequences that begin in this step, and the rest; None where that is not known.
    """

    num_decodes: int
    rows: Tensor
    lengths: Tensor
    starts: Tensor | None = None
    tiles: Tiles | None = None
    fresh: Tiles | None = None
    cached: Tiles | None = None

    @staticmethod
    def of(step: Step) -> "DeviceStep":
        """The same step, with what the kernels need beside it."""
        if isinstance(step, DeviceStep):
            return step
        device, lens = step.slots.device, step.query_lens
        count = next((row for row, length in enumerate(lens) if length > 1), len(lens))
        starts = [0, *itertools.accumulate(lens)][count:]
        at = [(row, first) for row, length in enumerate(lens[count:]) for first in range(0, length, paged.TILE)]
        begins = [length == context for length, context in zip(lens[count:], step.context_lens[count:], strict=True)]

        def tiles(chosen: list[tuple[int, int]]) -> Tiles | None:
            if not chosen:
                return None
            of, first = (torch.tensor(part, dtype=torch.int32, device=device) for part in zip(*chosen, strict=True))
            return of, first

        return DeviceStep(
            **{name: getattr(step, name) for name in Step.__dataclass_fields__},
            num_decodes=count,
            rows=torch.arange(len(lens), dtype=torch.int32, device=device),
            lengths=torch.tensor(step.context_lens, dtype=torch.int32, device=device),
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            tiles=tiles(at),
            fresh=tiles([tile for tile in at if begins[tile[0]]]),
            cached=tiles([tile for tile in at if not begins[tile[0]]]),
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Where the time goes into reading the weight, kernels that read it as fast as memory gives it; else cuBLAS."""
    count = x.shape[0]
    if 0 < count <= _THIN_ROWS and x.dtype is not torch.float32 and weight.is_contiguous() and x.stride(-1) == 1:
        if count in _GEMV_ROWS:
            return rows.gemv(x, weight, bias)
        large = weight.numel() > _LARGE
        if count <= 16:
            return rows.thin(x, weight, bias, k=256 if large else 128)
        return rows.thin(x, weight, bias, stages=3 if large and weight.shape[0] > weight.shape[1] else 5)
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """One kernel; a weight of another dtype is the reference's."""
    if weight.dtype != x.dtype:
        return reference_rms_norm(x, weight, eps=eps)
    return rows.norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm, in one kernel."""
    if weight.dtype != x.dtype:
        total = x + residual
        return reference_rms_norm(total, weight, eps=eps), total
    return rows.norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """One kernel."""
    return rows.silu_mul(gate_up)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, interleaved: bool) -> Tensor:
    """One kernel."""
    return rows.rope(x, cos, sin, head_dim=head_dim, interleaved=interleaved)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi: Tensor | None = None,
    *,
    step: Step,
    cache: int,
    head_dim: int,  # noqa: ARG001  (the cache has it)
    scale: float,
    window: int,
    soft_cap: float = 0.0,
) -> Tensor:
    """Writes keys and values, then reads them: prompts in tiles, decodes split over the context."""
    here = DeviceStep.of(step)
    rows.write(k, v, here.slots, here.k_caches[cache], here.v_caches[cache])
    return _attend(q.contiguous(), k, v, alibi, here, cache, scale=scale, window=window, soft_cap=soft_cap)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    alibi: Tensor | None = None,
    *,
    step: Step,
    cache: int,
    head_dim: int,  # noqa: ARG001  (the cache has it)
    scale: float,
    window: int,
    soft_cap: float,
    interleaved: bool,
) -> Tensor:
    """`rope` of q and k, and `attention`: what is rotated goes straight into the cache."""
    here = DeviceStep.of(step)
    k_cache, v_cache = here.k_caches[cache], here.v_caches[cache]
    keep = here.fresh is not None
    q, k = rows.rope_write(q, k, v, cos, sin, here.slots, k_cache, v_cache, interleaved=interleaved, keep=keep)
    return _attend(q, k, v, alibi, here, cache, scale=scale, window=window, soft_cap=soft_cap)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None, step: DeviceStep, cache: int,
    *, scale: float, window: int, soft_cap: float,
) -> Tensor:  # fmt: skip
    """Attention of what the cache holds already."""
    k_cache, v_cache, tables = step.k_caches[cache], step.v_caches[cache], step.block_tables
    settings = {"scale": scale, "window": window, "soft_cap": soft_cap}
    # Rows that only fill a step up are of no sequence, and keep what lies there; numbers that overflow would be told of on a CPU.
    out, count = torch.empty_like(q) if q.is_cuda else torch.zeros_like(q), step.num_decodes
    if count:
        paged.decode(
            q[:count], k_cache, v_cache, alibi, tables, step.rows[:count], step.lengths[:count], out[:count], **settings
        )
    if step.starts is None:
        return out
    tiles, head_dim = step.tiles, k_cache.shape[-1]
    if step.fresh and alibi is None and not (window or soft_cap) and prompt.takes(q, k, v, head_dim):
        prompt.prompt(q, k, v, step.starts, step.fresh, out, head_dim=head_dim, scale=scale)
        tiles = step.cached
    if tiles:
        rest = (step.rows[count:], step.starts, step.lengths[count:], tiles)
        paged.prefill(q, k_cache, v_cache, alibi, tables, *rest, out, **settings)
    return out
