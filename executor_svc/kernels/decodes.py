"""A Triton kernel for attention of one query a sequence over the paged KV cache, split over the context (Flash-Decoding, Dao et
al. 2023), query heads of a key head packed into one tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.paged import Form, attend, best_form, queries
from executor_svc.kernels.rows import partners, pdl, put, turned, wait_before
from executor_svc.kernels.target import capability

SPLITS_FOR = 132  # programs that fill the device: an H100's multiprocessors


@triton.jit
def _turned(
    q, k, v, cos, sin, slot, k_cache, v_cache, heads, there, group, owner, half, k_scale, v_scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """A token's queries, rotated. Its key of a group, rotated, and its value are in the caches then, for the owner's threads.

    Without a branch, so that all that is read is on its way at once.
    """
    SMALL: tl.constexpr = k_cache.dtype.element_ty.primitive_bitwidth == 8
    one, dims = group + tl.arange(0, 1), tl.arange(0, BD)
    mine = (one < G) & owner
    inside = mine[:, None] & (dims < D)[None, :]
    queries, others = partners(q, heads, there, half, D, BD, INTERLEAVED)
    key, other = partners(k, one, mine, half, D, BD, INTERLEAVED)
    value = tl.load(v + one[:, None] * D + dims[None, :], inside, 0.0)
    queries = turned(queries, others, cos, sin, half, BD, INTERLEAVED)
    key = turned(key, other, cos, sin, half, BD, INTERLEAVED)
    put(key, k_cache, k_cache, 0, slot, one, inside, k_scale, G, D, BD, SMALL, False)
    put(value, v_cache, v_cache, 0, slot, one, inside, v_scale, G, D, BD, SMALL, False)
    tl.debug_barrier()
    return queries


@triton.jit(do_not_specialize_on_alignment=["table_rows", "lengths", "slots"])
def _decode(
    q, k, v, cos, sin, slots, k_cache, v_cache, alibi, tables, table_rows, lengths, out, partial, stats, arrived, table_stride,
    q_stride, k_stride, v_stride, half, scale, k_scale, v_scale, cap, window, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
    CAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    wait_before(PDL)
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    if length == 0:  # the step has fewer sequences than room for them: this row of `out` is another's
        return
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, (length - window) // N * N)
    share = tl.cdiv(tl.cdiv(length - begin, SPLITS), N) * N
    splits = tl.cdiv(length - begin, share)  # a short context has work for fewer
    first = begin + split * share
    last = tl.minimum(length, first + share)
    if split >= splits:
        return
    mine = tl.arange(0, M)
    heads = group * (H // G) + mine
    dims = tl.arange(0, BD)
    there = (mine < H // G)[:, None] & (dims < D)[None, :]
    token = row.to(tl.int64)
    if ROPE:
        cos += token * half
        sin += token * half
        values = _turned(
            q + token * q_stride, k + token * k_stride, v + token * v_stride, cos, sin, tl.load(slots + token), k_cache, v_cache,
            heads, mine < H // G, group, split == splits - 1, half, k_scale, v_scale, G, D, BD, INTERLEAVED,
        )  # fmt: skip
    else:
        values = tl.load(q + token * q_stride + heads[:, None] * D + dims[None, :], there, 0.0)
    values = queries(values, k_cache)
    slope = tl.zeros((M,), tl.float32)
    if ALIBI:
        slope += tl.load(alibi + heads, mine < H // G, 0.0)
    position = tl.full((M,), 0, tl.int32) + length - 1
    whole = tl.minimum(last, length // N * N)
    if WINDOW:
        whole = first
    best, total, output = attend(
        values, k_cache, v_cache, tables + tl.load(table_rows + row).to(tl.int64) * table_stride, first, whole, last, position,
        slope, group, scale, v_scale, cap, window, G, D, PAGE, M, N, BD, CAP, ALIBI, WINDOW, ASM,
    )  # fmt: skip
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    if splits == 1:
        target = out + (row.to(tl.int64) * H + heads)[:, None] * D + dims[None, :]
        tl.store(target, output.to(out.dtype.element_ty), there)
    else:
        at = (row.to(tl.int64) * SPLITS + split) * H + heads
        tl.store(partial + at[:, None] * BD + dims[None, :], output, (mine < H // G)[:, None])
        known = tl.where(total == 0.0, float("-inf"), best + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(stats + at, known, mine < H // G)
        tl.debug_barrier()  # what all threads have stored is there before one of them says so
        if tl.atomic_add(arrived + row * G + group, 1) == splits - 1:
            tl.store(arrived + row * G + group, 0)
            for number in tl.static_range(H // G):
                _combine(partial, stats, out, row.to(tl.int64), group * (H // G) + number, splits, H, D, BD, SPLITS)


@triton.jit
def _combine(
    partial, stats, out, row, head, splits, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr
):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """What the splits have found of a head, weighed by their sums; read past the first cache, which may hold what was there."""
    dims = tl.arange(0, BD)
    split = tl.arange(0, SPLITS)
    at = (row * SPLITS + split) * H + head
    known = tl.load(stats + at, split < splits, float("-inf"), cache_modifier=".cg")
    weights = tl.exp2(known - tl.max(known))
    weights /= tl.sum(weights)
    parts = tl.load(partial + at[:, None] * BD + dims[None, :], (split < splits)[:, None], 0.0, cache_modifier=".cg")
    result = tl.sum(parts * weights[:, None], 0)
    tl.store(out + (row * H + head) * D + dims, result.to(out.dtype.element_ty), dims < D)


# The fastest of bench/attention.py for heads of up to 128 numbers, of caches of 16 bits and of 8.
_DECODE, _DECODE_SMALL = Form(64, 2, 3), Form(128, 4, 3)


class New(NamedTuple):
    """What a decode is to rotate, and to write into the caches: queries [S, H * D], keys and values [S, G * D] of its tokens.

    Attributes:
        cos, sin: float32 [S, r / 2]. slots: [S], rows of the flattened caches.
        k_scale: of caches of 8 bits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    interleaved: bool
    k_scale: float


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, alibi: Tensor | None, tables: Tensor, table_rows: Tensor,
    lengths: Tensor, arrived: Tensor, out: Tensor,
    *, scale: float, v_scale: float = 1.0, window: int, soft_cap: float, new: New | None = None, form: Form | None = None,
) -> None:  # fmt: skip
    """Attention of one query a sequence, [S, H * D], into `out`, whose rows with a length of 0 stay as they are.

    The grid depends on S alone, so that a graph holds for all lengths. Of a sequence's splits the last to end combines them.

    Args:
        arrived: int32, at least [S, G], zeros, and zeros again afterwards: how many splits have ended.
        new: if given, its queries are rotated, and taken instead of q, and what is written is seen.
    """
    _, page, groups, head_dim = k_cache.shape
    rows, heads = q.shape[0], q.shape[1] // head_dim
    wide = max(16, triton.next_power_of_2(head_dim))
    splits = max(1, min(64, triton.next_power_of_2(SPLITS_FOR // (rows * groups) + 1)))
    partial = q.new_empty((rows, splits, heads, wide), dtype=torch.float32)
    stats = q.new_empty((rows, splits, heads), dtype=torch.float32)
    if form is None:
        form = best_form(wide * q.itemsize)[1]
        if wide * q.itemsize <= 256:
            form = _DECODE if k_cache.itemsize > 1 else _DECODE_SMALL
    options = {
        "CAP": soft_cap != 0,
        "ALIBI": alibi is not None,
        "WINDOW": window != 0,
        "ASM": capability() > 0,
        **pdl(),
    }
    q, k, v, cos, sin, slots, interleaved, k_scale = new or New(q, q, q, q, q, q, False, 0.0)
    _decode[(rows, groups, splits)](
        q, k, v, cos, sin, slots, k_cache, v_cache, alibi, tables, table_rows, lengths, out, partial, stats, arrived,
        tables.stride(0), q.stride(0), k.stride(0), v.stride(0), cos.shape[-1], scale, k_scale, v_scale, soft_cap, window,
        H=heads, G=groups, D=head_dim, PAGE=page, M=max(16, triton.next_power_of_2(heads // groups)), N=form.keys, BD=wide,
        SPLITS=splits, ROPE=new is not None, INTERLEAVED=interleaved, num_warps=form.warps, num_stages=form.stages, **options,
    )  # fmt: skip
