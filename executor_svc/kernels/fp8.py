"""Triton kernels in float8_e4m3fn and int8: rows that are quantized where they are made, and their products.

As `engine.ops.linear_fp8` and `linear_int8` say: what is of int8 is summed in int32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executor_svc.kernels.products import counters, partials, summed
from executor_svc.kernels.rows import PART, gated, normed, pdl, silu_mul_parts, to_small, wait_before
from executor_svc.kernels.target import capability

F8 = torch.float8_e4m3fn
_IN_PARTS = 64  # rows, of which a program each leaves most of the device idle


def able() -> bool:
    """Whether the device has the instructions: Hopper and later, and the interpreter."""
    return capability() == 0 or capability() >= 90


@triton.jit
def keep(value, highest, input_scale, q, scales, row, at, size, STATIC: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Writes numbers `at` of a row in 8 bits, and its scale. `highest`: the row's largest; of a scale that is given, anything."""
    if STATIC:
        scale = tl.load(input_scale)
    else:
        scale = tl.maximum(highest, 1e-12) / (127.0 if q.dtype.element_ty == tl.int8 else 448.0)
    tl.store(q + row * size + at, to_small(value, scale, q.dtype.element_ty), at < size)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize_on_alignment=["input_scale"])
def _quantize(
    x, highest, input_scale, q, scales, size, stride, PARTS: tl.constexpr, WIDE: tl.constexpr, STATIC: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """PARTS: that there are of a row, each with its largest number; 0 where a program has a whole row."""
    wait_before(PDL)
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + at, at < size, 0.0)
    if PARTS:
        part = tl.arange(0, WIDE)
        most = tl.max(tl.load(highest + row * PARTS + part, part < PARTS, 0.0))
    else:
        most = tl.max(tl.abs(value.to(tl.float32)))
    keep(value, most, input_scale, q, scales, row, at, size, STATIC)


@triton.jit(do_not_specialize_on_alignment=["input_scale"])
def _norm(
    x, residual, weight, input_scale, q, scales, total, size, stride, eps,
    ADD: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    factors = tl.load(weight + at, at < size, 0.0)
    wait_before(PDL)
    value = normed(x, residual, factors, total, row, at, size, stride, eps, ADD)
    keep(value, tl.max(tl.abs(value.to(tl.float32))), input_scale, q, scales, row, at, size, STATIC)


@triton.jit(do_not_specialize_on_alignment=["input_scale"])
def _silu_mul_rounded(
    gate_up, input_scale, q, scales, size, STATIC: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    wait_before(PDL)
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = gated(gate_up, row, at, size)
    keep(value, tl.max(tl.abs(value.to(tl.float32))), input_scale, q, scales, row, at, size, STATIC)


def _empty(x: Tensor, size: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """For the rows of x: numbers of 8 bits [T, size], and scales [T, 1]."""
    q = torch.empty(len(x), size, dtype=kind, device=x.device)
    return q, torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


def _form(size: int) -> dict[str, int]:
    """A program has a whole row: its largest number is the row's scale."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 512))}


def quantize(x: Tensor, input_scale: Tensor | None, kind: torch.dtype = F8) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` or `quantize_int8` of x [T, n], whose last dimension is contiguous."""
    return _quantized(x, None, 0, input_scale, kind, **_form(x.shape[1]))


def _quantized(
    x: Tensor, highest: Tensor | None, parts: int, input_scale: Tensor | None, kind: torch.dtype, **form: int
) -> tuple[Tensor, Tensor]:
    size = x.shape[1]
    q, scales = _empty(x, size, kind)
    _quantize[(len(x), max(parts, 1))](
        x, highest, input_scale, q, scales, size, x.stride(0),
        PARTS=parts, WIDE=triton.next_power_of_2(max(parts, 1)), STATIC=input_scale is not None, **form, **pdl(),
    )  # fmt: skip
    return q, scales


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, input_scale: Tensor | None, eps: float, kind: torch.dtype = F8
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` of `rows.norm`, and the sum."""
    size = x.shape[1]
    q, scales = _empty(x, size, kind)
    total = x if residual is None else x.new_empty(x.shape)
    _norm[(len(x),)](
        x, residual, weight, input_scale, q, scales, total, size, x.stride(0), eps,
        ADD=residual is not None, STATIC=input_scale is not None, **_form(size), **pdl(),
    )  # fmt: skip
    return q, scales, total


def silu_mul(gate_up: Tensor, input_scale: Tensor | None, kind: torch.dtype = F8) -> tuple[Tensor, Tensor]:
    """`quantize` of `rows.silu_mul`: of few rows by many programs, and in two kernels where the largest number is to be found."""
    size, form = gate_up.shape[1] // 2, {"BLOCK": PART, "num_warps": 4}
    if input_scale is None:
        if len(gate_up) <= _IN_PARTS:
            y, highest = silu_mul_parts(gate_up)
            return _quantized(y, highest, highest.shape[1], None, kind, **form)
        form = _form(size)
    q, scales = _empty(gate_up, size, kind)
    _silu_mul_rounded[(len(gate_up), triton.cdiv(size, form["BLOCK"]))](
        gate_up, input_scale, q, scales, size, STATIC=input_scale is not None, **form, **pdl()
    )
    return q, scales


@triton.jit(do_not_specialize=["rows"])
def _tiles(
    q, q_scales, weight, scales, bias, y, partial, arrived, rows, outputs, columns,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    row, out = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    at = tl.arange(0, K)
    here, there = row < rows, out < outputs
    ours = weight + out.to(tl.int64)[:, None] * columns + at[None, :]
    theirs = q + row.to(tl.int64)[None, :] * columns + at[:, None]
    of_out = tl.load(scales + out, there, 0.0)
    split, share = tl.program_id(2), tl.cdiv(tl.cdiv(columns, K), SPLITS) * K
    wait_before(PDL)
    KIND: tl.constexpr = tl.int32 if q.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros((N, M), KIND)
    for start in range(split * share, tl.minimum(columns, (split + 1) * share), K):
        inside = start + at < columns
        w = tl.load(ours + start, there[:, None] & inside[None, :], 0.0)
        values = tl.load(theirs + start, here[None, :] & inside[:, None], 0.0)
        # Of float8 the tensor core adds up with some 14 bits: its sums go into others of 32 at each turn.
        sums = tl.dot(w, values, sums, max_num_imprecise_acc=K, out_dtype=KIND)
    target, inside = row.to(tl.int64)[None, :] * outputs + out[:, None], there[:, None] & here[None, :]
    counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    last, sums = summed(sums, partial, counter, split, rows.to(tl.int64) * outputs, target, inside, SPLITS)
    if last:
        made = sums.to(tl.float32) * of_out.to(tl.float32)[:, None] * tl.load(q_scales + row, here, 0.0)[None, :]
        if BIAS:
            made += tl.load(bias + out, there, 0.0).to(tl.float32)[:, None]
        tl.store(y + target, made.to(y.dtype.element_ty), inside)


def tiles(
    q: Tensor, q_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
    *, m: int = 64, n: int = 64, k: int = 256, stages: int = 5, warps: int = 4, splits: int = 1,
) -> Tensor:  # fmt: skip
    """The product for any number of rows, of which a program takes up to m; the weight is the tall side, read once for them.

    splits: parts of the inputs, side by side.
    """
    rows, (outputs, columns) = len(q), weight.shape
    y = torch.empty(rows, outputs, dtype=dtype, device=q.device)
    m = min(m, max(16, triton.next_power_of_2(rows)))
    partial = partials(q, splits, outputs, _sums_of(q))
    _tiles[(triton.cdiv(rows, m), triton.cdiv(outputs, n), splits)](
        q, q_scales, weight, scales, bias, y, partial, counters(q.device), rows, outputs, columns,
        M=m, N=n, K=k, SPLITS=splits, BIAS=bias is not None, num_stages=stages, num_warps=warps, **pdl(),
    )  # fmt: skip
    return y


def _sums_of(q: Tensor) -> torch.dtype:
    """What a product of q is summed in."""
    return torch.int32 if q.dtype is torch.int8 else torch.float32


@triton.jit(do_not_specialize=["rows"])
def _bulk(
    q, weight, q_scales, scales, bias, y, partial, arrived, rows, outputs, columns, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, SPLITS: tl.constexpr, BAND: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """Programs beside one another share weights, and BAND of them later their rows: the L2 cache has both."""
    wait_before(PDL)
    wide = BAND * tl.cdiv(outputs, N)
    first = tl.program_id(0) // wide * BAND
    high = tl.minimum(tl.cdiv(rows, M) - first, BAND)
    top, left = (first + tl.program_id(0) % wide % high) * M, tl.program_id(0) % wide // high * N
    KIND: tl.constexpr = tl.int32 if q.dtype == tl.int8 else tl.float32
    split, share = tl.program_id(1), tl.cdiv(tl.cdiv(columns, K), SPLITS) * K
    sums = tl.zeros((M, N), KIND)
    for start in range(split * share, tl.minimum(columns, (split + 1) * share), K):
        sums = tl.dot(q.load([top, start]), weight.load([left, start]).T, sums, out_dtype=KIND)
    row, out = top + tl.arange(0, M), left + tl.arange(0, N)
    here, there = row < rows, out < outputs
    inside = here[:, None] & there[None, :]
    target = row.to(tl.int64)[:, None] * outputs + out[None, :]
    last, sums = summed(
        sums, partial, arrived + tl.program_id(0), split, rows.to(tl.int64) * outputs, target, inside, SPLITS
    )
    if last:
        of_out = tl.load(scales + out, there, 0.0).to(tl.float32)
        made = sums.to(tl.float32) * tl.load(q_scales + row, here, 0.0)[:, None] * of_out[None, :]
        if BIAS:
            made += tl.load(bias + out, there, 0.0).to(tl.float32)[None, :]
        tl.store(y + target, made.to(y.dtype.element_ty), inside)


def bulk(
    q: Tensor, q_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
    *, m: int = 128, n: int = 128, k: int = 128, stages: int = 4, warps: int = 8, splits: int = 1,
) -> Tensor:  # fmt: skip
    """The product for many rows, of a multiple of 16 inputs, which the bulk copy engine (TMA) brings.

    splits: parts of the inputs, side by side, where there are few tiles.
    """
    rows, (outputs, columns) = len(q), weight.shape
    y = torch.empty(rows, outputs, dtype=dtype, device=q.device)
    left, right = (TensorDescriptor.from_tensor(part, [size, k]) for part, size in ((q, m), (weight, n)))
    partial = partials(q, splits, outputs, _sums_of(q))
    _bulk[(triton.cdiv(rows, m) * triton.cdiv(outputs, n), splits)](
        left, right, q_scales, scales, bias, y, partial, counters(q.device), rows, outputs, columns,
        M=m, N=n, K=k, SPLITS=splits, BAND=8, BIAS=bias is not None, num_stages=stages, num_warps=warps, **pdl(),
    )  # fmt: skip
    return y


def library(q: Tensor, q_scales: Tensor, weight: Tensor, scales: Tensor, *, fast: bool = True) -> Tensor:
    """The product by torch, bfloat16; for sizes that are multiples of 16. Fast is with the tensor core's own sums."""
    of_outputs = scales.view(1, -1)
    return torch._scaled_mm(q, weight.t(), q_scales, of_outputs, out_dtype=torch.bfloat16, use_fast_accum=fast)
