"""Packed weights as the matrices that they stand for."""

from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.ops import DENSE
from engine.opset import PACKED, packed_inputs, quantizes_input
from engine.program import Op, Program, TensorType
from executor_svc import memory

_ROWS = 1024  # that are expanded at a time, where rows do not depend on each other


def expand(program: Program, weights: dict[str, Tensor], kept: set[int]) -> tuple[Program, dict[str, Tensor]]:
    """A program of the same meaning whose packed products are `linear`, and its weights; those that round their input stay.

    Args:
        kept: operators that stay, too, by their place in the program.

    Each matrix is rounded to the dtype of the activations, as the packed operators' references do. Other weights are copied: then
    nothing holds the memory any more that the files were read into.
    """
    chosen = {place for place, op in enumerate(program.ops) if _expands(op)} - kept
    if not chosen:
        return program, weights
    ops: list[Op] = []
    types, made = dict(program.weights), dict[str, Tensor]()
    for place, op in enumerate(program.ops):
        if place in chosen:
            weight, scales, bias, _ = packed_inputs(op.op, op.inputs)
            dtype = op.outputs[0].type.dtype
            parts = [weights[name] if name else None for name in scales]
            made[weight] = _matrix(op.op, weights[weight], parts, op.attrs, getattr(torch, dtype))
            types[weight] = TensorType(dtype, tuple(made[weight].shape))
            op = msgspec.structs.replace(op, op="linear", inputs=(op.inputs[0], weight, bias), attrs={})
        ops.append(op)
    used = {name for op in ops for name in op.inputs}
    types = {name: declared for name, declared in types.items() if name in used}
    found = {name: made[name] if name in made else _zeros(weights[name]).copy_(weights[name]) for name in types}
    return msgspec.structs.replace(program, ops=tuple(ops), weights=types), found


def _expands(op: Op) -> bool:
    return op.op in PACKED and not quantizes_input(op.op, op.inputs, op.attrs)


def _matrix(op: str, weight: Tensor, scales: list[Tensor | None], attrs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Made a piece at a time: the float32 form of all of a large head would be gigabytes."""
    outputs, inputs = weight.shape[0], weight.shape[1] * PACKED[op]
    matrix = _zeros(torch.empty(outputs, inputs, dtype=dtype, device="meta"))
    block = int(attrs.get("block_rows", 1))
    rows = -(-_ROWS // block) * block
    for start in range(0, outputs, rows):
        of_rows = slice(start // block, -(-(start + rows) // block))
        pieces = [None if scale is None else scale[of_rows] for scale in scales]
        matrix[start : start + rows] = DENSE[op](weight[start : start + rows], *pieces, **attrs)
    return matrix


def _zeros(like: Tensor) -> Tensor:
    """In huge pages."""
    return memory.zeros(like.nbytes).view(like.dtype).view(like.shape)
