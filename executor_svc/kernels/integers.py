"""Triton kernels for products with weights of 4 and 8 bits (`engine.ops.linear_int4`, `linear_int8`), as the set lays them out.

One row: words of 32 bits are taken apart in float32 (`gemv`). More: tiles of the weight become integers of 16 bits in registers,
for the tensor cores, and sums are scaled group by group (`tiles`). Many: the matrix is made in memory (`expand`), for cuBLAS.

Codes become floating point numbers by their bits alone, since the instruction that converts integers is a slow one: below the
leading bits of 16 (24, 128, ...) they count in steps of 1, and what is too much is taken away.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.products import counters, summed
from executor_svc.kernels.rows import pdl, wait_before
from executor_svc.kernels.target import capability


class Packed(NamedTuple):
    """A weight of integers: int4 [outputs, inputs / 2] or int8 [outputs, inputs], and what scales it.

    Attributes:
        group: inputs that share a scale; all of a row's for int8.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int = 0

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.group else 8

    @property
    def columns(self) -> int:
        """Inputs."""
        return int(self.weight.shape[1]) * 8 // self.bits

    @property
    def kind(self) -> str:
        """Of its products, for a table of tactics."""
        return f"int4/{self.unit}" if self.group else "int8"

    @property
    def unit(self) -> int:
        """Of int4 what `unit` says; 0 for int8."""
        return unit(self.group, self.columns) if self.group else 0


def unit(group: int, columns: int) -> int:
    """The most inputs that a tile can take at once: a power of 2 that divides the groups, at most 128."""
    return 128 if group >= columns else min(128, group & -group)


def takes(packed: Packed, x: Tensor) -> bool:
    """Whether the kernels can: 16 bits, rows of whole words, groups that tiles divide."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    whole = packed.weight.is_contiguous() and packed.scales.is_contiguous() and packed.columns % 8 == 0
    return halves and whole and (packed.bits == 8 or packed.unit >= 32)


@triton.jit
def _float(words, BITS: tl.constexpr, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Codes of words as float32: 16 + code of 4 bits, 256 + code of 8."""
    SHIFT: tl.constexpr = 23 - BITS - BITS * NUMBER
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    LEADING: tl.constexpr = 0x41800000 if BITS == 4 else 0x43800000
    if SHIFT >= 0:
        moved = words << SHIFT
    else:
        moved = words >> -SHIFT
    return ((moved & MASK) | LEADING).to(tl.float32, bitcast=True)


@triton.jit
def _half(pairs, SECOND: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The first or second number of 16 bits in each word of 32."""
    return ((pairs >> 16) if SECOND else pairs).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _gemv(
    x, weight, scales, zeros, bias, y, outputs, columns, groups, group,
    N: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    EACH: tl.constexpr = 32 // BITS
    out, at = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, WORDS)
    there, words = (out < outputs)[:, None], columns // EACH
    ours = weight + out.to(tl.int64)[:, None] * words + at[None, :]
    ahead = tl.load(ours, there & (at < words)[None, :], 0)
    wait_before(PDL)
    sums = tl.zeros((N, WORDS), tl.float32)
    for start in range(0, words, WORDS):
        word = ahead
        if BITS == 8:
            word = word ^ -2139062144  # 0x80808080: then codes are 0 ... 255
        ahead = tl.load(ours + start + WORDS, there & (start + WORDS + at < words)[None, :], 0)
        part, total = tl.zeros((N, WORDS), tl.float32), tl.zeros((1, WORDS), tl.float32)
        for pair in tl.static_range(EACH // 2):
            values = tl.load(x + (start + at) * (EACH // 2) + pair, start + at < words, 0)[None, :]
            first = _half(values, False, y.dtype.element_ty).to(tl.float32)
            second = _half(values, True, y.dtype.element_ty).to(tl.float32)
            part += _float(word, BITS, 2 * pair) * first
            part += _float(word, BITS, 2 * pair + 1) * second
            total += first + second
        if BITS == 8:
            sums += part - total * 384.0
        else:
            place = out[:, None] * groups + ((start + at) * EACH // group)[None, :]
            inside = there & (start + at < words)[None, :]
            middle = 24.0
            if ZEROS:
                middle = tl.load(zeros + place, inside, 0).to(tl.float32) + 16.0
            sums += (part - total * middle) * tl.load(scales + place, inside, 0.0).to(tl.float32)
    result = tl.sum(sums, 1)
    if BITS == 8:
        result *= tl.load(scales + out, out < outputs, 0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + out, out < outputs, 0.0).to(tl.float32)
    tl.store(y + out, result.to(y.dtype.element_ty), out < outputs)


def gemv(x: Tensor, packed: Packed, bias: Tensor | None, *, n: int = 16, k: int = 1024, warps: int = 4) -> Tensor:
    """linear of one row, [1, inputs] of 16 bits; a program has n outputs, and k inputs at a time."""
    outputs, columns, bits = len(packed.weight), packed.columns, packed.bits
    y = x.new_empty(1, outputs)
    _gemv[(triton.cdiv(outputs, n),)](
        x.view(torch.int32), packed.weight.view(torch.int32), packed.scales, packed.zeros, bias, y, outputs, columns,
        *_groups(packed), N=n, WORDS=k * bits // 32, BITS=bits, ZEROS=packed.zeros is not None, BIAS=bias is not None,
        num_warps=warps, **pdl(),
    )  # fmt: skip
    return y


def _groups(packed: Packed) -> tuple[int, int]:
    """How many a row has, and how long they are."""
    group = min(packed.group or packed.columns, packed.columns)
    return triton.cdiv(packed.columns, group), group


# Four codes in bytes, of which two at a time are spread over words of 32 bits, as `leading` + code; then `less` is added.
_SPREAD = """{{
.reg .b32 one;
mov.b32 one, {one};
prmt.b32 $0, $2, 0, 0x4140;
prmt.b32 $1, $2, 0, 0x4342;
{shift}
lop3.b32 $0, $0, 0x000F000F, {leading}, 0xEA;
lop3.b32 $1, $1, 0x000F000F, {leading}, 0xEA;
fma.rn.{kind}x2 $0, $0, one, $3;
fma.rn.{kind}x2 $1, $1, one, $4;
}}"""
_SHIFT = "shr.b32 $0, $0, 4;\nshr.b32 $1, $1, 4;"
_BF16 = {"one": "0x3F803F80", "leading": "0x43004300", "kind": "bf16"}
_FP16 = {"one": "0x3C003C00", "leading": "0x64006400", "kind": "f16"}
_LOW_BF16, _HIGH_BF16 = (tl.constexpr(_SPREAD.format(shift=shift, **_BF16)) for shift in ("", _SHIFT))
_LOW_FP16, _HIGH_FP16 = (tl.constexpr(_SPREAD.format(shift=shift, **_FP16)) for shift in ("", _SHIFT))


@triton.jit
def _nibbles(codes, zero, HIGH: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The low or high four bits of bytes [N, K], less zero [N]: integers of 16 bits, exactly."""
    if ASM:
        LEADING: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        less = tl.broadcast_to((-(zero + LEADING)).to(dtype)[:, None], codes.shape)
        if dtype == tl.bfloat16:
            code = tl.inline_asm_elementwise(
                _HIGH_BF16 if HIGH else _LOW_BF16, "=&r,=&r,r,r,r", [codes, less], tl.bfloat16, is_pure=True, pack=4
            )
        else:
            code = tl.inline_asm_elementwise(
                _HIGH_FP16 if HIGH else _LOW_FP16, "=&r,=&r,r,r,r", [codes, less], tl.float16, is_pure=True, pack=4
            )
    else:
        code = (((codes >> 4) if HIGH else (codes & 15)).to(tl.float32) - zero[:, None]).to(dtype)
    return code


@triton.jit(do_not_specialize=["rows"])
def _tiles(
    x, weight, scales, zeros, bias, y, partial, arrived, rows, outputs, columns, groups, group, x_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    dtype: tl.constexpr = y.dtype.element_ty
    WIDTH: tl.constexpr = K * BITS // 8  # bytes of a row of a tile
    row, out = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    split, at = tl.program_id(2), tl.arange(0, WIDTH)
    here, there, width = row < rows, out < outputs, columns * BITS // 8
    ours = weight + out.to(tl.int64)[:, None] * width + at[None, :]
    theirs = x + row.to(tl.int64)[None, :] * x_stride + at[:, None]
    share = tl.cdiv(tl.cdiv(width, WIDTH), SPLITS) * WIDTH
    wait_before(PDL)
    sums = tl.zeros((N, M), tl.float32)
    for start in range(split * share, tl.minimum(width, (split + 1) * share), WIDTH):
        inside = start + at < width
        codes = tl.load(ours + start, there[:, None] & inside[None, :], 0, eviction_policy="evict_first")
        values = tl.load(theirs + start, here[None, :] & inside[:, None], 0)
        if BITS == 8:
            sums = tl.dot(codes.to(dtype), values, sums)
        else:
            place = out * groups + start * 2 // group
            zero = tl.full((N,), 8.0, tl.float32)
            if ZEROS:
                zero = tl.load(zeros + place, there, 0).to(tl.float32)
            part = tl.dot(_nibbles(codes, zero, False, dtype, ASM), _half(values, False, dtype))
            part = tl.dot(_nibbles(codes, zero, True, dtype, ASM), _half(values, True, dtype), part)
            sums += part * tl.load(scales + place, there, 0.0).to(tl.float32)[:, None]
    target = row.to(tl.int64)[None, :] * outputs + out[:, None]
    inside = there[:, None] & here[None, :]
    counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    last, sums = summed(sums, partial, counter, split, rows.to(tl.int64) * outputs, target, inside, SPLITS)
    if last:
        if BITS == 8:
            sums *= tl.load(scales + out, there, 0.0).to(tl.float32)[:, None]
        if BIAS:
            sums += tl.load(bias + out, there, 0.0).to(tl.float32)[:, None]
        tl.store(y + target, sums.to(dtype), inside)


def tiles(
    x: Tensor, packed: Packed, bias: Tensor | None,
    *, m: int = 64, n: int = 64, k: int = 128, stages: int = 5, warps: int = 4, splits: int = 1,
) -> Tensor:  # fmt: skip
    """linear of any number of rows of 16 bits, of which a program takes up to m; splits: parts of the inputs, side by side."""
    rows, outputs, bits = len(x), len(packed.weight), packed.bits
    y = x.new_empty(rows, outputs)
    m, k = min(m, max(16, triton.next_power_of_2(rows))), min(k, packed.unit or k)
    grid = (triton.cdiv(rows, m), triton.cdiv(outputs, n))
    partial = x.new_empty((splits, rows, outputs) if splits > 1 else (0,), dtype=torch.float32)
    words: Any = x.view(torch.int32) if bits == 4 else x
    _tiles[(*grid, splits)](
        words, packed.weight, packed.scales, packed.zeros, bias, y, partial, counters(x.device), rows, outputs, packed.columns,
        *_groups(packed), words.stride(0), M=m, N=n, K=k, SPLITS=splits, BITS=bits, ZEROS=packed.zeros is not None,
        BIAS=bias is not None, ASM=capability() > 0, num_stages=stages, num_warps=warps, **pdl(),
    )  # fmt: skip
    return y


@triton.jit
def _expand(
    weight, scales, zeros, y, width, groups, group,
    WIDTH: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    out, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    codes = tl.load(weight + out * width + at, at < width, 0)
    wait_before(PDL)
    if BITS == 8:
        made = codes.to(tl.float32) * tl.load(scales + out).to(tl.float32)
        tl.store(y + out * width + at, made.to(y.dtype.element_ty), at < width)
    else:
        place = out * groups + at * 2 // group
        zero = tl.full((WIDTH,), 8.0, tl.float32)
        if ZEROS:
            zero = tl.load(zeros + place, at < width, 0).to(tl.float32)
        scale = tl.load(scales + place, at < width, 0.0).to(tl.float32)
        low, high = ((codes & 15).to(tl.float32) - zero) * scale, ((codes >> 4).to(tl.float32) - zero) * scale
        both = tl.interleave(low.to(y.dtype.element_ty), high.to(y.dtype.element_ty))
        column = tl.program_id(1) * 2 * WIDTH + tl.arange(0, 2 * WIDTH)
        tl.store(y + out * 2 * width + column, both, column < 2 * width)


def expand(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix that the weight stands for, as the references make it."""
    width = packed.weight.shape[1]
    y = torch.empty(len(packed.weight), packed.columns, dtype=dtype, device=packed.weight.device)
    _expand[(len(y), triton.cdiv(width, 1024))](
        packed.weight, packed.scales, packed.zeros, y, width, *_groups(packed),
        WIDTH=1024, BITS=packed.bits, ZEROS=packed.zeros is not None, num_warps=4, **pdl(),
    )  # fmt: skip
    return y
