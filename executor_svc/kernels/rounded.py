"""Operators of 8 bits that a device has beside the set's own (`fuse.DEVICE_OPERATORS`): products, and what makes their input."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.ops import rms_norm as reference_rms_norm
from engine.opset import FLOATS
from executor_svc.kernels import fp8, tactics
from executor_svc.kernels.tactics import RULE, Table

Operators = tuple[Callable[..., Any], ...]


def operators(small: torch.dtype, kind: str) -> Operators:
    """quantize, rms_norm, add_rms_norm, silu_mul and product.

    Args:
        small: float8_e4m3fn or int8.
        kind: that the products have in a table of tactics.
    """
    made = (functools.partial(function, small=small) for function in (_quantize, _rms_norm, _add_rms_norm, _silu_mul))
    return *made, functools.partial(_product, kind=kind)


def _quantize(x: Tensor, input_scale: Tensor | None = None, *, small: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the reference says. The others here do it as they make x."""
    return fp8.quantize(x, input_scale, small)


def _rms_norm(
    x: Tensor, weight: Tensor, input_scale: Tensor | None = None, *, eps: float, small: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A weight of another dtype is the reference's."""
    if weight.dtype != x.dtype:
        return fp8.quantize(reference_rms_norm(x, weight, eps=eps), input_scale, small)
    return fp8.norm(x, None, weight, input_scale, eps, small)[:2]


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, input_scale: Tensor | None = None, *, eps: float, small: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As above, and the sum."""
    if weight.dtype != x.dtype:
        total = x + residual
        return *fp8.quantize(reference_rms_norm(total, weight, eps=eps), input_scale, small), total
    return fp8.norm(x, residual, weight, input_scale, eps, small)


def _silu_mul(gate_up: Tensor, input_scale: Tensor | None = None, *, small: torch.dtype) -> tuple[Tensor, Tensor]:
    return fp8.silu_mul(gate_up, input_scale, small)


def _product(
    q: Tensor,
    q_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: int,
    kind: str,
    table: Table = RULE,
) -> Tensor:
    """The product of what is quantized, with a scale for each row of the weight, by the tactic of its shape."""
    how = tactics.choose(tactics.shape_of(q, weight, kind), table)
    return tactics.multiply_fp8(q, q_scales, weight, scales, bias, getattr(torch, FLOATS[dtype]), how)
