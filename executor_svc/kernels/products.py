"""Triton kernels for products with few rows, whose time goes into reading the weight once.

The first part of a weight that a GEMV takes is on its way before it waits for the kernel before (`wait_before`): no kernel writes
weights. A pair is the product with gate and up, [2 * n, columns], and `silu_mul` of it, whose input stays in registers.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.rows import pdl, wait_before


class Form(NamedTuple):
    """Rows of the weight and columns of a block, stages and warps of a program of `thin`: bench/products.py tries them.

    splits: parts of the columns that are summed side by side.
    """

    n: int = 64
    k: int = 128
    stages: int = 5
    warps: int = 4
    splits: int = 1


@functools.cache
def counters(device: torch.device) -> Tensor:
    """int32 zeros, which a kernel leaves as it finds them: products of a stream run one after another."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def partials(x: Tensor, splits: int, outputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for what `summed` keeps of a product with x [T, in]: [splits, T, outputs], nothing for a product in one part."""
    return x.new_empty((splits, len(x), outputs) if splits > 1 else (0,), dtype=dtype)


@triton.jit
def summed(sums, partial, counter, split, size, target, inside, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Whether this program is the last of a tile's to end, and then the sum of all their parts, in one order whoever was last.

    A program's part goes to `partial` + split * size + target; `counter` counts them, and is 0 again afterwards.
    """
    last = True
    if SPLITS > 1:
        tl.store(partial + split.to(tl.int64) * size + target, sums, inside)
        tl.debug_barrier()  # what all threads have stored is there before one of them says so
        last = tl.atomic_add(counter, 1) == SPLITS - 1
        if last:
            tl.store(counter, 0)
            sums = tl.zeros_like(sums)
            for number in tl.static_range(SPLITS):
                sums += tl.load(partial + number * size + target, inside, 0, cache_modifier=".cg")
    return last, sums


@triton.jit
def _silu_mul(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Of sums in float32, each rounded where the operator by itself would read what the product has written."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype)
    return (gate * tl.sigmoid(gate)).to(dtype) * up


@triton.jit
def _gemv(
    x,
    weight,
    bias,
    y,
    columns,
    outputs,
    PAIR: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001
    out = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    ours = weight + out * columns + at
    second = weight + (out + outputs) * columns + at
    ahead = tl.load(ours, at < columns, 0.0)
    ahead_up = ahead
    if PAIR:
        ahead_up = tl.load(second, at < columns, 0.0)
    wait_before(PDL)
    sums = tl.zeros((BLOCK,), tl.float32)
    sums_up = sums
    for start in range(0, columns, BLOCK):
        following = start + BLOCK + at < columns
        w = ahead.to(tl.float32)
        ahead = tl.load(ours + start + BLOCK, following, 0.0)
        values = tl.load(x + start + at, start + at < columns, 0.0).to(tl.float32)
        sums += values * w
        if PAIR:
            w = ahead_up.to(tl.float32)
            ahead_up = tl.load(second + start + BLOCK, following, 0.0)
            sums_up += values * w
    result, result_up = tl.sum(sums), tl.sum(sums_up)
    if BIAS:
        result += tl.load(bias + out).to(tl.float32)
        if PAIR:
            result_up += tl.load(bias + outputs + out).to(tl.float32)
    result = _silu_mul(result, result_up, y.dtype.element_ty) if PAIR else result.to(y.dtype.element_ty)
    tl.store(y + out, result)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, *, pair: bool = False, block: int = 2048) -> Tensor:
    """linear, or of a pair linear and silu_mul, for one row x [1, columns]: a program for each row of the weight."""
    columns = weight.shape[1]
    outputs = weight.shape[0] // 2 if pair else weight.shape[0]
    y = x.new_empty(1, outputs)
    _gemv[(outputs,)](
        x, weight, bias, y, columns, outputs, PAIR=pair, BIAS=bias is not None, BLOCK=block, num_warps=4, **pdl()
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def _thin(
    x, weight, bias, y, partial, arrived, rows, outputs, columns, x_stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, PAIR: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    row, at = tl.arange(0, M), tl.arange(0, K)
    if PAIR:  # half of a program's rows are of gate, the others the same rows of up
        WIDTH: tl.constexpr = N // 2
        mine = tl.program_id(0) * WIDTH + tl.arange(0, N) % WIDTH
        out = mine + tl.arange(0, N) // WIDTH * outputs
    else:
        mine = tl.program_id(0) * N + tl.arange(0, N)
        out = mine
    split, share = tl.program_id(1), tl.cdiv(tl.cdiv(columns, K), SPLITS) * K
    ours = weight + out.to(tl.int64)[:, None] * columns + at[None, :]
    wait_before(PDL)
    sums = tl.zeros((N, M), tl.float32)
    for start in range(split * share, tl.minimum(columns, (split + 1) * share), K):
        inside = start + at < columns
        w = tl.load(ours + start, (mine < outputs)[:, None] & inside[None, :], 0.0, eviction_policy="evict_first")
        values = tl.load(
            x + row[None, :] * x_stride + (start + at)[:, None], (row < rows)[None, :] & inside[:, None], 0.0
        )
        sums = tl.dot(w, values, sums)
    made, last = mine, True
    if PAIR:
        if BIAS:
            sums += tl.load(bias + out, mine < outputs, 0.0).to(tl.float32)[:, None]
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, N // 2, M)), (1, 2, 0)))
        made = tl.program_id(0) * (N // 2) + tl.arange(0, N // 2)
        result = _silu_mul(gate, up, y.dtype.element_ty)
    there = (made < outputs)[:, None] & (row < rows)[None, :]
    target = row.to(tl.int64)[None, :] * outputs + made[:, None]
    if not PAIR:
        counter = arrived + tl.program_id(0)
        last, sums = summed(sums, partial, counter, split, rows.to(tl.int64) * outputs, target, there, SPLITS)
        if BIAS:
            sums += tl.load(bias + out, mine < outputs, 0.0).to(tl.float32)[:, None]
        result = sums.to(y.dtype.element_ty)
    if last:
        tl.store(y + target, result, there)


def thin(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form = Form(), *, pair: bool = False) -> Tensor:  # noqa: B008  (frozen)
    """linear, or of a pair linear and silu_mul, without splits, for up to 64 rows: the weight is the product's tall side."""
    rows, columns = x.shape[0], weight.shape[1]
    outputs = weight.shape[0] // 2 if pair else weight.shape[0]
    y, splits = x.new_empty(rows, outputs), 1 if pair else form.splits
    partial = partials(x, splits, outputs)
    _thin[(triton.cdiv(outputs, form.n // 2 if pair else form.n), splits)](
        x, weight, bias, y, partial, counters(x.device), rows, outputs, columns, x.stride(0),
        M=max(16, triton.next_power_of_2(rows)), N=form.n, K=form.k, SPLITS=splits, PAIR=pair, BIAS=bias is not None,
        num_stages=form.stages, num_warps=form.warps, **pdl(),
    )  # fmt: skip
    return y
