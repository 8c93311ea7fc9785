"""Triton kernel for the product of one row in float8_e4m3fn, without the tensor cores.

Their tiles have 64 rows of the weight, so that a matrix of 4096 rows keeps half of a large device busy. Here a program has one or
two, and their first part is on its way before it waits for the kernel before. Neighbours are taken by fours, a word, of which two
instructions make pairs of float16. If one of them is divided by 64, a product of two float8 is exact there, and the sum of two
such products is rounded to 11 bits, before all are added up in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.rows import pdl, wait_before
from executor_svc.kernels.target import capability

_PAIRS = """{
.reg .b16 low, high;
.reg .b32 by;
mov.b32 {low, high}, $2;
mov.b32 by, 0x24002400;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
mul.rn.f16x2 $0, $0, by;
mul.rn.f16x2 $1, $1, by;
}"""
_PRODUCTS = """{
.reg .b16 low, high;
.reg .b32 first, second;
.reg .f32 one, other;
mov.b32 {low, high}, $1;
cvt.rn.f16x2.e4m3x2 first, low;
cvt.rn.f16x2.e4m3x2 second, high;
mul.rn.f16x2 first, first, $2;
fma.rn.f16x2 first, second, $3, first;
mov.b32 {low, high}, first;
cvt.f32.f16 one, low;
cvt.f32.f16 other, high;
add.f32 $0, one, other;
}"""


@triton.jit
def _number(words, AT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    return ((words >> (8 * AT)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _multiplied(w, x, PAIRS: tl.constexpr, PRODUCTS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The sums of the products of words of four float8, [N, C, 4] and [1, C, 4], divided by 64."""
    if PAIRS == "":
        sums = _number(w, 0) * _number(x, 0) + _number(w, 1) * _number(x, 1)
        sums = (sums + _number(w, 2) * _number(x, 2) + _number(w, 3) * _number(x, 3)) / 64
    else:
        pairs: tl.constexpr = (tl.int32, tl.int32)
        first, second = tl.inline_asm_elementwise(PAIRS, "=&r,=&r,r", [x], pairs, is_pure=True, pack=1)
        sums = tl.inline_asm_elementwise(PRODUCTS, "=f,r,r,r", [w, first, second], tl.float32, is_pure=True, pack=1)
    return sums


@triton.jit
def _gemv_fp8(
    q, q_scales, weight, scales, bias, y, outputs, words, N: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr,
    PRODUCTS: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """For N rows of the weight. A block is of C times four words, the 16 bytes that a thread reads at once; words: of a row."""
    out, four, word = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, C), tl.arange(0, 4)
    there, at = out < outputs, four[:, None] * 4 + word[None, :]
    ours = weight + out.to(tl.int64)[:, None, None] * words + at[None, :, :]
    ahead = tl.load(ours, there[:, None, None] & (four * 4 < words)[None, :, None], 0)
    of_out = tl.load(scales + out, there, 0.0).to(tl.float32)
    wait_before(PDL)
    sums = tl.zeros((N, C), tl.float32)
    for start in range(0, words, 4 * C):
        w, following = ahead, start + (C + four) * 4 < words
        x = tl.load(q + start + at[None, :, :], (start + four * 4 < words)[None, :, None], 0)
        sums += tl.sum(_multiplied(w, x, PAIRS, PRODUCTS), 2)
        ahead = tl.load(ours + start + 4 * C, there[:, None, None] & following[None, :, None], 0)
    made = tl.sum(sums, 1) * of_out * (tl.load(q_scales) * 64.0)
    if BIAS:
        made += tl.load(bias + out, there, 0.0).to(tl.float32)
    tl.store(y + out, made.to(y.dtype.element_ty), there)


def gemv(
    q: Tensor, q_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
    *, n: int = 2, k: int = 1024, warps: int = 1,
) -> Tensor:  # fmt: skip
    """The product for one row of a multiple of 16 inputs; a program has n rows of the weight, by blocks of k inputs."""
    outputs, columns = weight.shape
    y = torch.empty(1, outputs, dtype=dtype, device=q.device)
    pairs, multiplied = (_PAIRS, _PRODUCTS) if capability() else ("", "")
    _gemv_fp8[(triton.cdiv(outputs, n),)](
        q.view(torch.int32), q_scales, weight.view(torch.int32), scales, bias, y, outputs, columns // 4,
        N=n, C=k // 16, PAIRS=pairs, PRODUCTS=multiplied, BIAS=bias is not None, num_warps=warps, **pdl(),
    )  # fmt: skip
    return y
