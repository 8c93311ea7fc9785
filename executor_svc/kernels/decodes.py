"""A Triton kernel for attention of one query a sequence over the paged KV cache, split over the context (Flash-Decoding, Dao et
al. 2023), query heads of a key head packed into one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.paged import Form, attend, best_form, queries
from executor_svc.kernels.rows import pdl, wait_before
from executor_svc.kernels.target import capability

SPLITS_FOR = 132  # programs that fill the device: an H100's multiprocessors


@triton.jit(do_not_specialize_on_alignment=["table_rows", "lengths"])
def _decode(
    q, k_cache, v_cache, alibi, tables, table_rows, lengths, out, partial, stats, arrived, table_stride, scale, v_scale, cap,
    window, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BD: tl.constexpr, SPLITS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
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
    values = tl.load(q + (row.to(tl.int64) * H + heads)[:, None] * D + dims[None, :], there, 0.0)
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


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, alibi: Tensor | None, tables: Tensor, table_rows: Tensor,
    lengths: Tensor, arrived: Tensor, out: Tensor,
    *, scale: float, v_scale: float = 1.0, window: int, soft_cap: float, form: Form | None = None,
) -> None:  # fmt: skip
    """Attention of one query a sequence, [S, H * D], into `out`, whose rows with a length of 0 stay as they are.

    The grid depends on S alone, so that a graph holds for all lengths. Of a sequence's splits the last to end combines them.

    Args:
        arrived: int32, at least [S, G], zeros, and zeros again afterwards: how many splits have ended.
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
    _decode[(rows, groups, splits)](
        q, k_cache, v_cache, alibi, tables, table_rows, lengths, out, partial, stats, arrived, tables.stride(0), scale, v_scale,
        soft_cap, window,
        H=heads, G=groups, D=head_dim, PAGE=page, M=max(16, triton.next_power_of_2(heads // groups)), N=form.keys, BD=wide,
        SPLITS=splits, num_warps=form.warps, num_stages=form.stages, **options,
    )  # fmt: skip
