"""Triton kernels for attention over the paged KV cache: prompts in tiles (FlashAttention-2, Dao 2023), decodes split over the
context (Flash-Decoding, Dao et al. 2023), query heads of a key head packed into one tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.rows import partners, pdl, put, turned, wait_before
from executor_svc.kernels.target import capability

TILE = 128  # queries of a sequence that a program of `prefill` takes
LOG2E = tl.constexpr(1.4426950408889634)  # scores are powers of 2: their exponential is one instruction
SPLITS_FOR = 132  # programs that fill the device: an H100's multiprocessors


class Form(NamedTuple):
    """Keys of a block, warps and stages of a program: bench/attention.py tries them."""

    keys: int
    warps: int
    stages: int


# Pairs of 8-bit numbers, two pairs at a time: the first of each, and the second of each, in float16. An integer is made of the
# float16 1024 + (number + 128), whose lower byte it is.
_FP8 = tl.constexpr("""{
.reg .b16 one, other;
.reg .b32 x, y;
mov.b32 {one, other}, $2;
cvt.rn.f16x2.e4m3x2 x, one;
cvt.rn.f16x2.e4m3x2 y, other;
prmt.b32 $0, x, y, 0x5410;
prmt.b32 $1, x, y, 0x7632;
}""")
_INT8 = tl.constexpr("""{
.reg .b32 x, less;
mov.b32 less, 0x64806480;
xor.b32 x, $2, 0x80808080;
prmt.b32 $0, x, 0x64646464, 0x4240;
prmt.b32 $1, x, 0x64646464, 0x4341;
sub.rn.f16x2 $0, $0, less;
sub.rn.f16x2 $1, $1, less;
}""")


@triton.jit
def _halves(pairs, small: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Of numbers of 8 bits, two in each of 16, the first and the second ones, in float16: exactly."""
    if ASM:
        first, second = tl.inline_asm_elementwise(
            _INT8 if small == tl.int8 else _FP8, "=&r,=&r,r", [pairs], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        first = (pairs & 255).to(tl.uint8).to(small, bitcast=True).to(tl.float16)
        second = ((pairs >> 8) & 255).to(tl.uint8).to(small, bitcast=True).to(tl.float16)
    return first, second


@triton.jit
def _block(
    q, q_odd, k_cache, v_cache, table, start, last, position, slope, group, scale, cap, window, best, total, output, output_odd,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, small: tl.constexpr,
    CAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """N keys from `start` on; without MASK every query sees all of them. Heads are D long, in memory as in these caches."""
    dims = tl.arange(0, WIDE)
    seen = start + tl.arange(0, N)
    inside = seen < last if MASK else tl.full((N,), True, tl.int1)
    wide = dims < D if D < WIDE else tl.full((WIDE,), True, tl.int1)
    page = tl.load(table + seen // PAGE, inside, 0).to(tl.int64)
    row = ((page * PAGE + seen % PAGE) * G + group) * D
    k = tl.load(k_cache + row[None, :] + dims[:, None], inside[None, :] & wide[:, None], 0)
    if small is None:
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
    else:
        k, k_odd = _halves(k, small, ASM)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        scores = tl.dot(q_odd, k_odd.to(q.dtype), scores, input_precision="ieee")
    if CAP:
        scores = cap * LOG2E * (2.0 / (1.0 + tl.exp(-2.0 * scores * scale / cap)) - 1.0)
    else:
        scores *= scale * LOG2E
    if ALIBI:
        scores += slope[:, None] * LOG2E * (seen[None, :] - position[:, None]).to(tl.float32)
    if MASK:
        visible = (seen[None, :] <= position[:, None]) & inside[None, :]
        if WINDOW:
            visible = visible & (seen[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(best - base)
    total = total * rescale + tl.sum(weights, 1)
    weights = weights.to(q.dtype)
    v = tl.load(v_cache + row[:, None] + dims[None, :], inside[:, None] & wide[None, :], 0)
    if small is None:
        output = output * rescale[:, None] + tl.dot(weights, v.to(q.dtype), input_precision="ieee")
    else:
        v, v_odd = _halves(v, small, ASM)
        output = output * rescale[:, None] + tl.dot(weights, v.to(q.dtype), input_precision="ieee")
        output_odd = output_odd * rescale[:, None] + tl.dot(weights, v_odd.to(q.dtype), input_precision="ieee")
    return higher, total, output, output_odd


@triton.jit
def _queries(values, cache):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Queries in the dtype of products with the cache's keys and values.

    Of bfloat16 and a cache of 8 bits it is float16: the device has an instruction that makes it of 8 bits, and none for bfloat16.
    """
    if cache.dtype.element_ty.primitive_bitwidth == 8 and values.dtype == tl.bfloat16:
        values = tl.clamp(values.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return values


@triton.jit
def _attend(
    q, k_cache, v_cache, table, first, whole, last, position, slope, group, scale, v_scale, cap, window, G: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, CAP: tl.constexpr,
    ALIBI: tl.constexpr, WINDOW: tl.constexpr, ASM: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """A tile of queries over the keys [first, whole) and [whole, last), of which they all see the former: maximum, sum, output.

    Keys and values of 8 bits are in units of scales: that of keys is part of `scale`. They are read two at a time, as 16 bits,
    which the device brings from shared memory to its products as they lie, and products are of the even and the odd dimensions.
    """
    EIGHT: tl.constexpr = k_cache.dtype.element_ty.primitive_bitwidth == 8
    small: tl.constexpr = k_cache.dtype.element_ty if EIGHT else None
    WIDE: tl.constexpr = BD // 2 if EIGHT else BD
    LONG: tl.constexpr = D // 2 if EIGHT else D
    best = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = tl.zeros((M, WIDE), tl.float32)
    q_odd, output_odd = q, output
    if EIGHT:
        q, q_odd = tl.split(tl.reshape(q, (M, WIDE, 2)))
        k_cache, v_cache = k_cache.to(tl.pointer_type(tl.int16)), v_cache.to(tl.pointer_type(tl.int16))
    for start in range(first, whole, N):
        best, total, output, output_odd = _block(
            q, q_odd, k_cache, v_cache, table, start, last, position, slope, group, scale, cap, window, best, total, output,
            output_odd, G, LONG, PAGE, N, WIDE, small, CAP, ALIBI, WINDOW, False, ASM,
        )  # fmt: skip
    for start in range(tl.maximum(first, whole), last, N):
        best, total, output, output_odd = _block(
            q, q_odd, k_cache, v_cache, table, start, last, position, slope, group, scale, cap, window, best, total, output,
            output_odd, G, LONG, PAGE, N, WIDE, small, CAP, ALIBI, WINDOW, True, ASM,
        )  # fmt: skip
    if EIGHT:
        output = tl.interleave(output, output_odd)
    return best, total, output * v_scale


@triton.jit(do_not_specialize_on_alignment=["table_rows", "starts", "lengths", "tile_row", "tile_at"])
def _prefill(
    q, k_cache, v_cache, out, alibi, tables, table_rows, starts, lengths, tile_row, tile_at, table_stride, scale, v_scale, cap,
    window, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    PARTS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr,
    WINDOW: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    wait_before(PDL)
    tile, head = tl.program_id(1) // PARTS, tl.program_id(0)
    row, at = tl.load(tile_row + tile), tl.load(tile_at + tile) + tl.program_id(1) % PARTS * M
    begin, length = tl.load(starts + row), tl.load(lengths + row)
    count = tl.load(starts + row + 1) - begin
    if at >= count:
        return
    query = at + tl.arange(0, M)
    dims = tl.arange(0, BD)
    there = (query < count)[:, None] & (dims < D)[None, :]
    offset = ((begin + query).to(tl.int64) * H + head)[:, None] * D + dims[None, :]
    values = _queries(tl.load(q + offset, there, 0.0), k_cache)
    position = length - count + query
    slope = tl.zeros((M,), tl.float32)
    if ALIBI:
        slope += tl.load(alibi + head)
    last = tl.minimum(length, length - count + at + M)
    first = 0
    if WINDOW:
        first = tl.maximum(0, length - count + at - window + 1) // N * N
    whole = (length - count + at + 1) // N * N
    if WINDOW:
        whole = first
    best, total, output = _attend(
        values, k_cache, v_cache, tables + tl.load(table_rows + row).to(tl.int64) * table_stride, first, whole, last, position,
        slope, head // (H // G), scale, v_scale, cap, window, G, D, PAGE, M, N, BD, CAP, ALIBI, WINDOW, ASM,
    )  # fmt: skip
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + offset, output.to(out.dtype.element_ty), there)


def _form(row_bytes: int) -> tuple[int, Form]:
    """Queries of a program, and its form, by the bytes of a head: shared memory holds them all."""
    if row_bytes <= 256:
        return TILE, Form(64, 8, 3)
    return (64, Form(64, 4, 2)) if row_bytes <= 512 else (32, Form(32, 4, 1))


def prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, alibi: Tensor | None, tables: Tensor, table_rows: Tensor, starts: Tensor,
    lengths: Tensor,
    tiles: tuple[Tensor, Tensor], out: Tensor, *, scale: float, v_scale: float = 1.0, window: int, soft_cap: float,
) -> None:  # fmt: skip
    """Attention of ragged queries [T, H * D] over their sequences' pages, into `out`.

    Args:
        tables: int32 [rows, max_blocks]. table_rows: int32 [S], each sequence's.
        starts: int32 [S + 1], rows of q. lengths: int32 [S], keys that a sequence's last query sees.
        tiles: int32 [n] twice: the sequence of each tile of TILE queries, and the first of them.
    """
    _, page, groups, head_dim = k_cache.shape
    heads = q.shape[1] // head_dim
    wide = triton.next_power_of_2(head_dim)
    m, form = _form(wide * q.itemsize)
    _prefill[(heads, len(tiles[0]) * (TILE // m))](
        q, k_cache, v_cache, out, alibi, tables, table_rows, starts, lengths, *tiles, tables.stride(0), scale, v_scale, soft_cap,
        window,
        H=heads, G=groups, D=head_dim, PAGE=page, M=m, N=form.keys, PARTS=TILE // m, BD=max(16, wide),
        CAP=soft_cap != 0, ALIBI=alibi is not None, WINDOW=window != 0, ASM=capability() > 0, num_warps=form.warps,
        num_stages=form.stages, **pdl(),
    )  # fmt: skip


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
    values = _queries(values, k_cache)
    slope = tl.zeros((M,), tl.float32)
    if ALIBI:
        slope += tl.load(alibi + heads, mine < H // G, 0.0)
    position = tl.full((M,), 0, tl.int32) + length - 1
    whole = tl.minimum(last, length // N * N)
    if WINDOW:
        whole = first
    best, total, output = _attend(
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
    """What a decode is to rotate, and to write into the caches: keys and values [S, G * D] of its tokens.

    Attributes:
        cos, sin: float32 [S, r / 2]. slots: [S], rows of the flattened caches.
        k_scale: of caches of 8 bits.
    """

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
        new: if given, q is rotated, too, and what is written is seen; if not, the caches hold it already.
    """
    _, page, groups, head_dim = k_cache.shape
    rows, heads = q.shape[0], q.shape[1] // head_dim
    wide = max(16, triton.next_power_of_2(head_dim))
    splits = max(1, min(64, triton.next_power_of_2(SPLITS_FOR // (rows * groups) + 1)))
    partial = q.new_empty((rows, splits, heads, wide), dtype=torch.float32)
    stats = q.new_empty((rows, splits, heads), dtype=torch.float32)
    if form is None:
        form = _form(wide * q.itemsize)[1]
        if wide * q.itemsize <= 256:
            form = _DECODE if k_cache.itemsize > 1 else _DECODE_SMALL
    options = {
        "CAP": soft_cap != 0,
        "ALIBI": alibi is not None,
        "WINDOW": window != 0,
        "ASM": capability() > 0,
        **pdl(),
    }
    k, v, cos, sin, slots, interleaved, k_scale = new or New(q, q, q, q, q, False, 0.0)
    _decode[(rows, groups, splits)](
        q, k, v, cos, sin, slots, k_cache, v_cache, alibi, tables, table_rows, lengths, out, partial, stats, arrived,
        tables.stride(0), q.stride(0), k.stride(0), v.stride(0), cos.shape[-1], scale, k_scale, v_scale, soft_cap, window,
        H=heads, G=groups, D=head_dim, PAGE=page, M=max(16, triton.next_power_of_2(heads // groups)), N=form.keys, BD=wide,
        SPLITS=splits, ROPE=new is not None, INTERLEAVED=interleaved, num_warps=form.warps, num_stages=form.stages, **options,
    )  # fmt: skip
