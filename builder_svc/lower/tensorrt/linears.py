"""Products, a strategy for each form of weight. Weights stay [out, in], as programs have them, and are read transposed."""

import torch

from builder_svc.lower.tensorrt.net import ITensor, Net, Weight
from engine.ops import FP8_MAX

INT8_MAX = 127.0
INT4_GROUPS = (128, 64, 32, 16)
"""Inputs that may share a scale, the largest first."""


def _biased(net: Net, y: ITensor, bias: Weight | None) -> ITensor:
    return y if bias is None else net.add(y, net.weight(bias, (1, bias.tensor.numel())))


def linear(net: Net, x: ITensor, weight: Weight, bias: Weight | None = None) -> ITensor:
    """[T, in] -> [T, out]."""
    return _biased(net, net.matmul(x, net.weight(weight), transposed=True), bias)


def int4_group(group_size: int) -> int | None:
    """The size of groups that TensorRT takes and that divides the program's, or None."""
    return next((size for size in INT4_GROUPS if group_size % size == 0), None)


def linear_int4(
    net: Net,
    x: ITensor,
    weight: Weight,
    scales: Weight,
    zeros: Weight | None = None,
    bias: Weight | None = None,
    *,
    group_size: int,
) -> ITensor:
    """Codes less 8, times the scales of their groups, which are rounded to the dtype of x.

    The layer has no zero points: sum_k x_k (q_k - z) s = sum_k x_k (q_k - 8) s + (8 - z) s sum_k x_k, a second, small product
    with the sums of the input's groups.
    """
    dtype = net.torch_dtypes[x.dtype]
    rows, columns = weight.tensor.shape[0], weight.tensor.shape[1] * 2
    size = int4_group(group_size) or group_size
    # A nibble of 0 ... 15 less 8, as two's complement, is the nibble with its highest bit turned.
    signed = net.constant(weight.name, weight.tensor ^ 0x88, (rows, columns), net.trt.int4)
    of_groups = scales.tensor.to(dtype)
    fine = of_groups.repeat_interleave(group_size // size, 1)[:, : columns // size]
    matrix = net.dequantize(signed, net.constant(scales.name, fine), dtype)
    y = net.matmul(x, matrix, transposed=True)
    if zeros is not None:
        shift = ((8 - zeros.tensor.float()) * scales.tensor.float()).to(dtype)
        sums = net.reduce(net.reshape(x, ("num_tokens", columns // group_size, group_size)), "SUM", 2, keep=False)
        y = net.add(y, net.matmul(sums, net.constant(zeros.name, shift), transposed=True))
    return _biased(net, y, bias)


def linear_int8(
    net: Net,
    x: ITensor,
    weight: Weight,
    scales: Weight,
    bias: Weight | None = None,
    input_scale: Weight | None = None,
    *,
    per_token: bool = False,
) -> ITensor:
    """A scale a row of the weight; x in 8 bits, too, with a scale of its own (SmoothQuant: Xiao et al. 2023) or one a token."""
    return _eight_bits(net, x, weight, scales.tensor, scales.name, bias, input_scale, per_token, INT8_MAX)


def linear_fp8(
    net: Net,
    x: ITensor,
    weight: Weight,
    scales: Weight,
    bias: Weight | None = None,
    input_scale: Weight | None = None,
    *,
    block_rows: int,
    block_columns: int,  # noqa: ARG001  (as long as the row: a table has seen to it)
    per_token: bool = False,
) -> ITensor:
    """A scale for each block_rows rows of the weight, which becomes one for each row."""
    of_rows = scales.tensor[:, 0].repeat_interleave(block_rows)[: weight.tensor.shape[0]]
    return _eight_bits(net, x, weight, of_rows, scales.name, bias, input_scale, per_token, FP8_MAX)


def _eight_bits(
    net: Net,
    x: ITensor,
    weight: Weight,
    scales: torch.Tensor,
    name: str,
    bias: Weight | None,
    input_scale: Weight | None,
    per_token: bool,
    largest: float,
) -> ITensor:
    """Both factors as codes and scales, which TensorRT makes a product of codes; where x has none, one of matrices."""
    dtype = net.torch_dtypes[x.dtype]
    codes = net.weight(weight)
    matrix = net.dequantize(codes, net.constant(name, scales.to(dtype)), dtype, axis=0)
    if input_scale is not None:
        unit = net.constant(input_scale.name, input_scale.tensor.reshape(()).to(dtype))
        x = net.dequantize(net.quantize(x, unit, codes.dtype), unit, dtype)
        return _biased(net, net.matmul(x, matrix, transposed=True), bias)
    if not per_token:
        return _biased(net, net.matmul(x, matrix, transposed=True), bias)
    # The layer that quantizes takes one scale for all: rows are brought to at most 1 before it, and back behind the product.
    most = net.reduce(net.unary(net.cast(x, torch.float32), "ABS"), "MAX", 1)
    most = net.elementwise(most, net.number(1e-12, most), "MAX")
    within = net.cast(net.divide(net.cast(x, torch.float32), most), dtype)
    unit = net.constant(f"1 / {largest} {dtype}", torch.tensor(1 / largest, dtype=dtype))
    within = net.dequantize(net.quantize(within, unit, codes.dtype), unit, dtype)
    y = net.multiply(net.cast(net.matmul(within, matrix, transposed=True), torch.float32), most)
    return _biased(net, net.cast(y, dtype), bias)
