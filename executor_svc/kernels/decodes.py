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

MOST_HEADS, MOST_ROWS = 16, 32  # of one combination, and of parts that are read for it at once: registers hold them
SPLITS_FOR = 1024  # programs that fill the device, mostly of a warp: an H100's 132 multiprocessors
FEW, MOST_SPLITS = 256, 64  # programs that long contexts are split for at least; and at most, in how many parts


@triton.jit(do_not_specialize_on_alignment=["table_rows", "lengths"])
def _decode(
    q, k_cache, v_cache, alibi, tables, table_rows, lengths, out, partial, stats, arrived, table_stride, scale, v_scale, cap,
    window, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BD: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr, CAP: tl.constexpr,
    APART: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Of a step's columns, which the host has brought.
    length, table_row = tl.load(lengths + row), tl.load(table_rows + row)
    wait_before(PDL)
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
    whole = first  # all in one loop, with masks: a second one for the last keys begins to read when the first has ended
    if APART and not WINDOW:
        whole = tl.minimum(last, length // N * N)
    best, total, output = attend(
        values, k_cache, v_cache, tables + table_row.to(tl.int64) * table_stride, first, whole, last, position, slope, group,
        scale, v_scale, cap, window, G, D, PAGE, M, N, BD, CAP, ALIBI, WINDOW, ASM,
    )  # fmt: skip
    if splits == 1:
        target = out + (row.to(tl.int64) * H + heads)[:, None] * D + dims[None, :]
        tl.store(target, (output * _inverse(total)[:, None]).to(out.dtype.element_ty), there)
    else:
        at = (row.to(tl.int64) * SPLITS + split) * H + heads
        tl.store(partial + at[:, None] * BD + dims[None, :], output, (mine < H // G)[:, None])
        tl.store(stats + 2 * at, best, mine < H // G)
        tl.store(stats + 2 * at + 1, total, mine < H // G)
        tl.debug_barrier()  # what all threads have stored is there before one of them says so
        if tl.atomic_add(arrived + row * G + group, 1) == splits - 1:
            tl.store(arrived + row * G + group, 0)
            for some in tl.static_range(0, H // G, HEADS):
                _combine(
                    partial, stats, out, row.to(tl.int64), group * (H // G), some, splits, H, H // G, D, BD, SPLITS, HEADS,
                    TOGETHER,
                )  # fmt: skip


@triton.jit
def _inverse(total):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """1 / total; 1 where nothing was seen."""
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _combine(
    partial, stats, out, row, head, begin, splits, H: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """What TOGETHER splits at a time have found of HEADS heads, from the begin'th on, of a group's SHARE, whose first is `head`.

    It is read past the first cache, which may hold what was there before.
    """
    mine, dims = begin + tl.arange(0, HEADS), tl.arange(0, BD)
    heads, ours = head + mine, mine < SHARE
    best = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    output = tl.zeros((HEADS, BD), tl.float32)
    for earlier in range(0, splits, TOGETHER):
        split = earlier + tl.arange(0, TOGETHER)
        at = (row * SPLITS + split)[:, None] * H + heads[None, :]
        there = (split < splits)[:, None] & ours[None, :]
        known = tl.load(stats + 2 * at, there, float("-inf"), cache_modifier=".cg")
        sums = tl.load(stats + 2 * at + 1, there, 0.0, cache_modifier=".cg")
        places = partial + at[:, :, None] * BD + dims[None, None, :]
        parts = tl.load(places, there[:, :, None], 0.0, cache_modifier=".cg")
        higher = tl.maximum(best, tl.max(known, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, rescale = tl.exp2(known - base[None, :]), tl.exp2(best - base)
        total = total * rescale + tl.sum(sums * weights, 0)
        output = output * rescale[:, None] + tl.sum(parts * weights[:, :, None], 0)
        best = higher
    target = out + (row * H + heads)[:, None] * D + dims[None, :]
    result = output * _inverse(total)[:, None]
    tl.store(target, result.to(out.dtype.element_ty), ours[:, None] & (dims < D)[None, :])


# For heads of up to 128 numbers, by the queries of a tile. Of 16 the fastest of bench/attention.py: a warp alone waits for no
# other. Of more, which were not measured, as many warps as have registers for it.
_FORMS = {16: Form(32, 1, 3), 32: Form(32, 2, 3)}
_WIDE_FORM = Form(32, 4, 3)
_SMALL_FORM = Form(128, 4, 3)  # of 8 bits, which take more arithmetic than memory where there are many, without masks


def parts(programs: int) -> int:
    """Of a context, for so many sequences' key heads: a power of 2, which a power of 2 of sequences has all values of."""
    programs = triton.next_power_of_2(programs)
    return max(1, min(SPLITS_FOR // programs, max(FEW // programs, FEW // 8), MOST_SPLITS))


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
    splits = parts(rows * groups)
    shape = (rows, splits, heads) if splits > 1 else (0, 0, 0)
    partial, stats = (q.new_empty((*shape, size), dtype=torch.float32) for size in (wide, 2))
    tile = max(16, triton.next_power_of_2(heads // groups))
    together = min(MOST_HEADS, triton.next_power_of_2(heads // groups))
    apart, short = splits == 1 and k_cache.itemsize == 1, wide * q.itemsize <= 256
    if form is None and short:
        form = _SMALL_FORM if apart else _FORMS.get(tile, _WIDE_FORM)
    form = form or best_form(wide * q.itemsize)[1]
    options = {
        "CAP": soft_cap != 0,
        "APART": apart,
        "ALIBI": alibi is not None,
        "WINDOW": window != 0,
        "ASM": capability() > 0,
        **pdl(),
    }
    _decode[(rows, groups, splits)](
        q, k_cache, v_cache, alibi, tables, table_rows, lengths, out, partial, stats, arrived, tables.stride(0), scale, v_scale,
        soft_cap, window,
        H=heads, G=groups, D=head_dim, PAGE=page, M=tile, N=form.keys, BD=wide, SPLITS=splits, HEADS=together,
        TOGETHER=min(splits, MOST_ROWS // together), num_warps=form.warps, num_stages=form.stages, **options,
    )  # fmt: skip
