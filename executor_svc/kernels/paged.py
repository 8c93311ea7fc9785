"""Triton kernels for attention of tiles of queries over the paged KV cache: of prompts (FlashAttention-2, Dao 2023)."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.rows import pdl, wait_before
from executor_svc.kernels.target import capability

TILE = 128  # queries of a sequence that a program of `prefill` takes
LOG2E = tl.constexpr(1.4426950408889634)  # scores are powers of 2: their exponential is one instruction


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
def queries(values, cache):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Queries in the dtype of products with the cache's keys and values.

    Of bfloat16 and a cache of 8 bits it is float16: the device has an instruction that makes it of 8 bits, and none for bfloat16.
    """
    if cache.dtype.element_ty.primitive_bitwidth == 8 and values.dtype == tl.bfloat16:
        values = tl.clamp(values.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return values


@triton.jit
def attend(
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
    values = queries(tl.load(q + offset, there, 0.0), k_cache)
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
    best, total, output = attend(
        values, k_cache, v_cache, tables + tl.load(table_rows + row).to(tl.int64) * table_stride, first, whole, last, position,
        slope, head // (H // G), scale, v_scale, cap, window, G, D, PAGE, M, N, BD, CAP, ALIBI, WINDOW, ASM,
    )  # fmt: skip
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + offset, output.to(out.dtype.element_ty), there)


def best_form(row_bytes: int) -> tuple[int, Form]:
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
    m, form = best_form(wide * q.itemsize)
    _prefill[(heads, len(tiles[0]) * (TILE // m))](
        q, k_cache, v_cache, out, alibi, tables, table_rows, starts, lengths, *tiles, tables.stride(0), scale, v_scale, soft_cap,
        window,
        H=heads, G=groups, D=head_dim, PAGE=page, M=m, N=form.keys, PARTS=TILE // m, BD=max(16, wide),
        CAP=soft_cap != 0, ALIBI=alibi is not None, WINDOW=window != 0, ASM=capability() > 0, num_warps=form.warps,
        num_stages=form.stages, **pdl(),
    )  # fmt: skip
