"""A Triton kernel for attention of prompts that begin in this step: their keys and values lie side by side, so that the bulk copy
engine (TMA, Hopper and later) brings them, and no page table is read (FlashAttention-2, Dao 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from executor_svc.kernels.paged import TILE, Form
from executor_svc.kernels.rows import pdl, wait_before
from executor_svc.kernels.target import capability

ROWS, FORM = 64, Form(64, 4, 3)  # queries of a program; the fastest of bench/attention.py on an H200


@triton.jit
def _block(
    q, keys, values, begin, count, start, column, query, scale, best, total, output, N: tl.constexpr, MASK: tl.constexpr
):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    k = keys.load([begin + start, column])
    scores = tl.dot(q, k.T)
    if MASK:
        scores = tl.where((start + tl.arange(0, N))[None, :] <= query[:, None], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    rescale = tl.exp2(best - higher)
    v = values.load([begin + start, column])
    if MASK:  # behind the prompt lies another's, whose infinities a weight of 0 would not undo
        v = tl.where((start + tl.arange(0, N) < count)[:, None], v, 0.0)
    output = tl.dot(weights.to(v.dtype), v, output * rescale[:, None])
    return higher, total * rescale + tl.sum(weights, 1), output


@triton.jit(do_not_specialize_on_alignment=["starts", "tile_row", "tile_at"])
def _prompt(
    q, keys, values, out, starts, tile_row, tile_at, scale, v_scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    wait_before(PDL)
    tile, head = tl.program_id(1) // PARTS, tl.program_id(0)
    at = tl.load(tile_at + tile) + (PARTS - 1 - tl.program_id(1) % PARTS) * M
    begin = tl.load(starts + tl.load(tile_row + tile))
    count = tl.load(starts + tl.load(tile_row + tile) + 1) - begin
    if at >= count:
        return
    query, column = at + tl.arange(0, M), head // (H // G) * D
    ours = q.load([begin + at, head * D])
    scale *= 1.4426950408889634  # scores are powers of 2
    best = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = tl.zeros((M, D), tl.float32)
    whole = (at + 1) // N * N
    for start in range(0, whole, N):
        best, total, output = _block(
            ours, keys, values, begin, count, start, column, query, scale, best, total, output, N, False
        )  # fmt: skip
    for start in range(whole, tl.minimum(count, at + M), N):
        best, total, output = _block(
            ours, keys, values, begin, count, start, column, query, scale, best, total, output, N, True
        )  # fmt: skip
    target = ((begin + query).to(tl.int64) * H + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + target, (output * (v_scale / total)[:, None]).to(out.dtype.element_ty), (query < count)[:, None])


def takes(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> bool:
    """Whether the kernel can: heads of 64 or 128 numbers of 16 bits, rows that the copy engine can address."""
    able = capability() == 0 or capability() >= 90  # the interpreter can
    aligned = all(part.stride(1) == 1 and part.stride(0) % 8 == 0 and part.data_ptr() % 16 == 0 for part in (q, k, v))
    return able and aligned and head_dim in (64, 128) and q.dtype in (torch.bfloat16, torch.float16)


def prompt(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, tiles: tuple[Tensor, Tensor], out: Tensor,
    *, head_dim: int, scale: float, v_scale: float = 1.0, rows: int = ROWS, form: Form = FORM,
) -> None:  # fmt: skip
    """Causal attention of ragged prompts [T, H * D] over their own keys and values [T, G * D], into `out`.

    Args:
        starts: int32 [S + 1], the rows at which the prompts begin and end.
        tiles: int32 [n] twice: the prompt of each tile of TILE queries, and the first of them.
    """
    heads, groups = q.shape[1] // head_dim, k.shape[1] // head_dim
    queries = TensorDescriptor.from_tensor(q, [rows, head_dim])
    keys, values = (TensorDescriptor.from_tensor(part, [form.keys, head_dim]) for part in (k, v))
    _prompt[(heads, len(tiles[0]) * (TILE // rows))](
        queries, keys, values, out, starts, *tiles, scale, v_scale,
        H=heads, G=groups, D=head_dim, M=rows, PARTS=TILE // rows, N=form.keys, num_warps=form.warps,
        num_stages=form.stages, **pdl(),
    )  # fmt: skip
