"""Triton kernels at both ends of a program: rows that are looked up in a table, and the angles of a step's positions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.rows import pdl, wait_before


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["indices", "first"])
def _take(table, indices, first, y, rows, size, stride, SHARD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    wait_before(PDL)
    target, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(indices + target).to(tl.int64)
    if SHARD:
        row -= tl.load(first).to(tl.int64)
    there = (at < size) & (row >= 0) & (row < rows)
    tl.store(y + target * size + at, tl.load(table + row * stride + at, there, 0.0), at < size)


def take(table: Tensor, indices: Tensor, first: Tensor | None = None) -> Tensor:
    """Rows [m, n] of a table [rows, n], whose last dimension is contiguous, at indices [m]; of others 0.

    Args:
        first: int32 [1], the index of the table's first row.
    """
    size = table.shape[1]
    y = table.new_empty(len(indices), size)
    if len(indices):
        _take[(len(indices), triton.cdiv(size, 1024))](
            table, indices, first, y, len(table), size, table.stride(0),
            SHARD=first is not None, BLOCK=1024, num_warps=4, **pdl(),
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize_on_alignment=["positions", "inv_freq"])
def _rope_table(positions, inv_freq, cos, sin, half, scale, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    wait_before(PDL)
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    angles = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + at, at < half, 0.0)
    tl.store(cos + token * half + at, tl.cos(angles) * scale, at < half)
    tl.store(sin + token * half + at, tl.sin(angles) * scale, at < half)


def rope_table(positions: Tensor, inv_freq: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """As the operator says, in one kernel."""
    half = len(inv_freq)
    cos, sin = (torch.empty(len(positions), half, dtype=torch.float32, device=positions.device) for _ in range(2))
    if len(positions):
        _rope_table[(len(positions),)](
            positions, inv_freq, cos, sin, half, scale, BLOCK=triton.next_power_of_2(half), num_warps=1, **pdl()
        )  # fmt: skip
    return cos, sin
