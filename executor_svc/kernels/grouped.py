"""A Triton kernel for products in which each row has a matrix of its own: rows are sorted by it, and taken in tiles.

Which tile is whose is found on the device, in each program, so that a CUDA graph holds for all choices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.rows import pdl, silu_mul, wait_before


@triton.jit
def _grouped(
    x, weight, y, order, ends, outputs, columns, groups, share,
    FIRST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """FIRST: row order[i] // share of x into row i of y; else row i of x into row order[i] of y."""
    wait_before(PDL)
    tile, group = tl.program_id(0), tl.arange(0, WIDE)
    end = tl.load(ends + group, group < groups, 0)
    begin = tl.load(ends + group - 1, (group > 0) & (group < groups), 0)
    tiles = (end - begin + M - 1) // M
    until = tl.cumsum(tiles, 0)
    mine = tl.sum(((until <= tile) & (group < groups)).to(tl.int32), 0)
    if mine >= groups:  # there is room for more tiles than there are
        return
    before = tl.sum(tl.where(group < mine, tiles, 0), 0)
    row = tl.load(ends + mine - 1, mine > 0, 0) + (tile - before) * M + tl.arange(0, M)
    there = row < tl.load(ends + mine)
    other = tl.load(order + row, there, 0)
    source = other // share if FIRST else row
    target = row if FIRST else other
    out, at = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, K)
    theirs = x + source.to(tl.int64)[:, None] * columns + at[None, :]
    ours = weight + mine.to(tl.int64) * outputs * columns + out[None, :] * columns + at[:, None]
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, columns, K):
        inside = start + at < columns
        values = tl.load(theirs + start, there[:, None] & inside[None, :], 0.0)
        w = tl.load(ours + start, inside[:, None] & (out < outputs)[None, :], 0.0)
        sums += tl.dot(values, w, input_precision="ieee")
    made = y + target.to(tl.int64)[:, None] * outputs + out[None, :]
    tl.store(made, sums.to(y.dtype.element_ty), there[:, None] & (out < outputs)[None, :])


def _product(x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, share: int, *, first: bool) -> Tensor:
    """[len(order), outputs]; weight [groups, outputs, columns], ends: the number of rows up to each group's last."""
    groups, outputs, columns = weight.shape
    y = x.new_empty(len(order), outputs)
    m, n, k, stages = (16, 64, 128, 4) if len(order) < 32 * groups else (64, 128, 64, 3)
    tiles = len(order) // m + min(groups, len(order))
    _grouped[(tiles, triton.cdiv(outputs, n))](
        x, weight, y, order, ends, outputs, columns, groups, share,
        FIRST=first, M=m, N=n, K=k, WIDE=triton.next_power_of_2(groups), num_warps=4, num_stages=stages, **pdl(),
    )  # fmt: skip
    return y


def experts(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, normalize: bool) -> Tensor:
    """The operator: only the experts that are chosen are read."""
    weights, chosen = router_logits.float().softmax(-1).topk(top_k, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    of, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(of, torch.arange(len(gate_up), device=x.device), right=True)
    made = silu_mul(_product(x.contiguous(), gate_up, order, ends, top_k, first=True))
    made = _product(made, down, order, ends, top_k, first=False)
    return torch.bmm(weights.to(x.dtype)[:, None, :], made.view(len(x), top_k, made.shape[1]))[:, 0]
