"""Triton kernels for products with weights of 4 and 8 bits (`engine.ops.linear_int4`, `linear_int8`), as the set lays them out.

Few rows: tiles of the weight become integers of 16 bits in the registers from which the tensor cores take them, and sums are
scaled group by group (`tiles`). Many: the matrix is made in memory (`expand`), for cuBLAS.

Codes become floating point numbers by their bits alone, since the instruction that converts integers is a slow one: below the
leading bits of 128 or 1024 they count in steps of 1, and what is too much is taken away, from them or, of few rows, from sums.
They are taken two at a time, a byte of 4 bits or two of 8, as pairs of 16 bits in a word: such words are what a thread has of
the tall side of a product, neighbours of a row, so that nothing is moved between threads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executor_svc.kernels.fp8 import able
from executor_svc.kernels.products import counters, partials, summed
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


def _groups(packed: Packed) -> tuple[int, int]:
    """How many a row has, and how long they are: one by itself is as long as any row."""
    one = not packed.group or packed.group >= packed.columns
    return (1, 1 << 30) if one else (triton.cdiv(packed.columns, packed.group), packed.group)


_EARLY = 512  # inputs of a program's rows that come into the L2 cache while it waits for what makes x
WIDEST = 8  # columns, of few rows, in which a product has groups side by side
# Twice the bits of -128 and of -1024, as int32: with a zero added, of that much less.
LESS_BF16, LESS_FP16 = (tl.constexpr(twice - (1 << 32)) for twice in (0xC300C300, 0xE400E400))


def _assembly(bits: int, dtype: torch.dtype, many: int, above: bool = False) -> str:
    """Makes `many` pairs of numbers of 16 bits of as many pairs of codes, which are a word or the lower part of one.

    A pair is spread over a word, where the bits of 128 or 1024 make numbers of it. Of 4 bits the zero and as much are taken away
    from it, an operand; if `above`, nothing is: they stand so far up in the word that they count in steps of 1 above 16 or 64.
    Of 8 bits bfloat16 has room for 7: the sign is a number of its own, 128 or 256; float16 has 128 added.
    """
    wide = dtype == torch.float16
    kind, one, leading = ("f16x2", "0x3C003C00", "0x64006400") if wide else ("bf16x2", "0x3F803F80", "0x43004300")
    mask, up = "0x000F000F", 0
    if above:
        mask, leading, up = ("0x00F000F0", "0x54005400", 4) if wide else ("0x00780078", "0x41804180", 3)
    code, by = f"${many}", one if bits == 4 else one.replace("3", "B")  # or -1
    lines = [".reg .b32 other, low, by;", f"mov.b32 by, {by};"]
    if bits == 4 and many > 1:
        lines += [f"shl.b32 low, {code}, {up};" if up else f"mov.b32 low, {code};"]
        lines += [f"shr.u32 other, {code}, {4 - up};"]
    for at in range(many):
        pair = f"${at}"
        if bits == 4 and many > 1:
            lines += [f"prmt.b32 {pair}, low, other, 0x0{4 + at}0{at};"]
        elif bits == 4:
            lines += [f"mul.lo.u32 {pair}, {code}, {0x1001 << up:#x};"]
        else:
            lines += [f"prmt.b32 {pair}, {code}, 0, 0x4{2 * at + 1}4{2 * at};"]
        if bits == 4:
            lines += [f"lop3.b32 {pair}, {pair}, {mask}, {leading}, 0xEA;"]
            if not above:
                lines += [f"fma.rn.{kind} {pair}, {pair}, by, ${many + 1 + at};"]
        else:
            if wide:
                lines += [f"xor.b32 {pair}, {pair}, 0x64806480;", "mov.b32 other, 0x64806480;"]
            else:
                lines += [f"lop3.b32 other, {pair}, 0x00800080, {leading}, 0xEA;"]
                lines += [f"lop3.b32 {pair}, {pair}, 0x007F007F, {leading}, 0xEA;"]
            lines += [f"fma.rn.{kind} {pair}, other, by, {pair};"]
    return "{{{}}}".format("\n".join(lines))


@triton.jit
def _above(dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What numbers stand above their codes of 4 bits where zeros are taken from the sums."""
    return 16 if dtype == tl.bfloat16 else 64


@triton.jit
def _numbers(codes, zero, ASM: tl.constexpr, MANY: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Of pairs of codes [N, K / 2] integers of 16 bits [N, K], exactly: of 4 bits less zero [N], or, without, as far above."""
    FOUR: tl.constexpr = codes.dtype == tl.uint8
    if ASM == "":
        if FOUR:
            if zero is None:
                less = tl.full((codes.shape[0],), -_above(dtype), tl.float32)
            else:
                less = zero.to(tl.float32)
            first = (codes & 15).to(tl.float32) - less[:, None]
            second = (codes >> 4).to(tl.float32) - less[:, None]
        else:
            first, second = codes.to(tl.int8), (codes >> 8).to(tl.int8)
        first, second = first.to(dtype), second.to(dtype)
    else:
        if FOUR and zero is None:
            if MANY == 4:
                pairs = tl.inline_asm_elementwise(ASM, "=&r,=&r,=&r,=&r,r", [codes], tl.int32, is_pure=True, pack=4)
            else:
                pairs = tl.inline_asm_elementwise(ASM, "=&r,r", [codes.to(tl.int32)], tl.int32, is_pure=True, pack=1)
        elif FOUR:
            LESS: tl.constexpr = LESS_BF16 if dtype == tl.bfloat16 else LESS_FP16
            less = tl.broadcast_to((zero * 0x10001 + LESS)[:, None], codes.shape)
            if MANY == 4:
                form: tl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,r"
                pairs = tl.inline_asm_elementwise(ASM, form, [codes, less], tl.int32, is_pure=True, pack=4)
            else:
                one = codes.to(tl.int32)
                pairs = tl.inline_asm_elementwise(ASM, "=&r,r,r", [one, less], tl.int32, is_pure=True, pack=1)
        elif MANY == 2:
            pairs = tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [codes], tl.int32, is_pure=True, pack=2)
        else:
            pairs = tl.inline_asm_elementwise(ASM, "=&r,r", [codes.to(tl.int32)], tl.int32, is_pure=True, pack=1)
        first, second = pairs.to(tl.int16).to(dtype, bitcast=True), (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(first, second), (codes.shape[0], 2 * codes.shape[1]))


@triton.jit
def _of_rows(pointers, TWICE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """What is at [N] pointers; if TWICE, half at a time: of more pointers than threads Triton would go by shared memory."""
    if TWICE:
        N: tl.constexpr = pointers.shape[0]
        first, second = tl.split(tl.permute(tl.reshape(pointers, (2, N // 2)), (1, 0)))
        found = tl.reshape(tl.permute(tl.join(tl.load(first), tl.load(second)), (1, 0)), (N,))
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def _bring_rows(rows, there, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Has the first bytes of rows, which begin at these addresses, brought into the L2 cache, and waits for nothing."""
    if EARLY > 0:
        lines = rows.to(tl.int64)[:, None] + tl.arange(0, EARLY // 128)[None, :] * 128
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $2, 0;
            @p prefetch.global.L2 [$1];
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [lines, tl.broadcast_to(there[:, None], lines.shape).to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["rows"])
def _tiles(
    x, weight, x_tiles, weight_tiles, scales, zeros, bias, y, partial, arrived, rows, outputs, width, groups, x_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, BULK: tl.constexpr, WHOLE: tl.constexpr, TWICE: tl.constexpr,
    ASM: tl.constexpr, MANY: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """The weight is of pairs of codes, `width` of them a row, which tiles divide if WHOLE.

    WIDE: few rows, of weights of 4 bits. Each has so many columns of the product, one for each group that a tile takes: x is
    there in its own and 0 elsewhere, so that a tile is as wide as the memory wants its rows and each sum has a scale.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    PAIRS: tl.constexpr = K // 2
    ROWS: tl.constexpr = M // WIDE if WIDE else M
    row, out = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * N + tl.arange(0, N)
    here, there = row < rows, out < outputs
    mine = tl.minimum(out, outputs - 1)
    split, share = tl.program_id(2), tl.cdiv(tl.cdiv(width, PAIRS), SPLITS) * PAIRS
    at, column = tl.arange(0, PAIRS), tl.arange(0, K)
    ours = weight + mine.to(tl.int64)[:, None] * width + at[None, :]
    UNIT: tl.constexpr = K // WIDE if WIDE else K
    if WIDE:
        term = tl.program_id(0) * M + tl.arange(0, M)
        seen, term_row, own = (term < rows * WIDE)[None, :], term // WIDE, term % WIDE
        theirs = x + term_row.to(tl.int64)[None, :] * x_stride + column[:, None]
        seen &= (column // UNIT)[:, None] == own[None, :]
        inner = tl.arange(0, UNIT)
        parts = x + term_row.to(tl.int64)[:, None] * x_stride + own[:, None] * UNIT + inner[None, :]
    else:
        seen = here[None, :]
        theirs = x + row.to(tl.int64)[None, :] * x_stride + column[:, None]
    first = tl.minimum(split * share, width - EARLY * 4 // BITS)  # pairs of this part
    _bring_rows(weight + mine.to(tl.int64) * width + first, there, EARLY)
    if BITS == 8:
        scale = _of_rows(scales + mine, TWICE)
    wait_before(PDL)
    sums = tl.zeros((N, M), tl.float32)
    for start in range(split * share, tl.minimum(width, (split + 1) * share), PAIRS):
        if BITS == 4 and WIDE:
            # Of a tile that ends short, the groups behind the last have no x.
            group = tl.minimum((start * 2 + own * UNIT) // GROUP, groups - 1)
            place = mine[:, None] * groups + group[None, :]
            scale = tl.load(scales + place).to(tl.float32)
            zero = 8 + _above(dtype)
            if ZEROS:
                zero = tl.load(zeros + place).to(tl.float32) + _above(dtype)
            behind = width * 2 - start * 2 - own * UNIT
            part_of = tl.load(
                parts + start * 2, (term < rows * WIDE)[:, None] & (inner[None, :] < behind[:, None]), 0.0
            )
            whole = tl.sum(part_of.to(tl.float32), 1)
        elif BITS == 4:
            place = mine * groups + start * 2 // GROUP
            scale = _of_rows(scales + place, TWICE)
            zero = tl.full((N,), 8, tl.int32)
            if ZEROS:
                zero = _of_rows(zeros + place, TWICE).to(tl.int32)
        if BULK:
            codes = weight_tiles.load([tl.program_id(1) * N, start])
            values = x_tiles.load([tl.program_id(0) * M, start * 2]).T
        elif WHOLE:
            codes = tl.load(ours + start, eviction_policy="evict_first")
            values = tl.load(theirs + start * 2, seen, 0.0)
        else:
            codes = tl.load(ours + start, (start + at < width)[None, :], 0, eviction_policy="evict_first")
            values = tl.load(theirs + start * 2, seen & (start * 2 + column < width * 2)[:, None], 0.0)
        if BITS == 4 and WIDE:
            part = tl.dot(_numbers(codes, None, ASM, MANY, dtype), values)
            sums += (part - zero * whole[None, :]) * scale
        else:
            # Not into the sums, of 8 bits either: a warpgroup's product would go on while the next codes come to its registers.
            part = tl.dot(_numbers(codes, zero if BITS == 4 else None, ASM, MANY, dtype), values)
            sums += part * scale.to(tl.float32)[:, None]
    if WIDE:
        sums = tl.sum(tl.reshape(sums, (N, ROWS, WIDE)), 2)
    target = row.to(tl.int64)[None, :] * outputs + out[:, None]
    inside = there[:, None] & here[None, :]
    counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    last, sums = summed(sums, partial, counter, split, rows.to(tl.int64) * outputs, target, inside, SPLITS)
    if last:
        if BIAS:
            sums += tl.load(bias + out, there, 0.0).to(tl.float32)[:, None]
        tl.store(y + target, sums.to(dtype), inside)


def tiles(
    x: Tensor, packed: Packed, bias: Tensor | None, *, m: int = 64, n: int = 64, k: int = 128, stages: int = 5, warps: int = 2,
    splits: int = 1, bulk: bool = False,
) -> Tensor:  # fmt: skip
    """linear of any number of rows of 16 bits, of which a program takes up to m; splits: parts of the inputs, side by side.

    bulk: the copy engine (TMA) brings tiles, where there is one and rows begin at multiples of 16 bytes.
    """
    rows, outputs, bits = len(x), len(packed.weight), packed.bits
    y = x.new_empty(rows, outputs)
    m, wide = min(m, triton.next_power_of_2(rows)), 0
    if bits == 4:
        k = min(k, packed.unit * (1 if bulk else max(1, WIDEST // m)))
        wide = k // packed.unit if k > packed.unit else 0
    together = max(8, m * max(wide, 1))  # columns of the product
    m = together // max(wide, 1)
    grid = (triton.cdiv(rows, m), triton.cdiv(outputs, n), splits)
    partial = partials(x, splits, outputs)
    pairs = packed.weight if bits == 4 else packed.weight.view(torch.int16)
    width, (groups, group) = pairs.shape[1], _groups(packed)
    aligned = all((part.data_ptr() | part.stride(0) * part.element_size()) % 16 == 0 for part in (x, pairs))
    bulk = bulk and able() and aligned
    left = TensorDescriptor.from_tensor(x, [m, k]) if bulk else None
    right = TensorDescriptor.from_tensor(pairs, [n, k // 2]) if bulk else None
    # Warps load their codes as words; for a warpgroup's product the pairs of a word are in four threads.
    grouped = capability() // 10 == 9 and warps % 4 == 0 and together > 8 and n >= 64
    many = 1 if grouped else 16 // bits
    room = 128 if bulk and n <= 16 * warps else None  # registers: two programs of 8 warps share a multiprocessor
    _tiles[grid](
        x, pairs, left, right, packed.scales, packed.zeros, bias, y, partial, counters(x.device), rows, outputs, width, groups,
        x.stride(0), M=together, N=n, K=k, WIDE=wide, SPLITS=splits, BITS=bits, GROUP=group, ZEROS=packed.zeros is not None,
        BIAS=bias is not None, BULK=bulk, WHOLE=packed.columns % k == 0, TWICE=n > 16 * warps,
        ASM=_assembly(bits, x.dtype, many, wide > 0) if capability() else "", MANY=many,
        EARLY=_EARLY * bits // 8 if pdl()["PDL"] and not wide and packed.columns >= _EARLY else 0,
        num_stages=stages, num_warps=warps, maxnreg=room, **pdl(),
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
