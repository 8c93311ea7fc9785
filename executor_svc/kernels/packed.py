"""The CPU's products with weights of 4 and 8 bits, which stay packed (`csrc/packed.h`)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.opset import packed_inputs, quantizes_input
from engine.program import Op, Program
from executor_svc.kernels import library

_library: Any = library.load()
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_BITS = {"linear_int4": 4, "linear_int8": 8}
_PANEL = 32  # outputs that lie together
_MOST_EXACT = 1 << 17  # inputs whose products of integers are summed in 32 bits

Key = tuple[str, tuple[str, ...], str]


class Words:
    """A weight of `linear_int4` or `linear_int8` in words of 32 bits, each with inputs of one output, and what scales it."""

    def __init__(self, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group_size: int = 0) -> None:
        """Packs the weight where it lies, if its rows are whole words: whoever else holds the tensor has panels, too.

        Args:
            group_size: of linear_int4; 0 for linear_int8.
        """
        bits = 4 if group_size else 8
        self.outputs, self.inputs = weight.shape[0], weight.shape[1] * 8 // bits
        missing = -weight.shape[1] % 4
        if missing or weight.data_ptr() % 4 or not weight.is_contiguous():
            weight = F.pad(weight, (0, missing)).contiguous()
        self.words = weight.view(torch.int32)
        scale_type = torch.bfloat16 if scales.dtype is torch.bfloat16 else torch.float32
        scales = scales.view(self.outputs, -1)
        self.scales = _panels(scales.to(scale_type))
        self.zeros = None if zeros is None else _panels(zeros)
        depth = self.words.shape[1]
        _library.enginehouse_pack(_TYPES[torch.float32], self.words.data_ptr(), self.outputs, depth)
        self.call = library.Packed(
            **{"bits": bits, "scale_type": _TYPES[scale_type], "inputs": self.inputs, "depth": depth},
            **{"outputs": self.outputs, "group": min(group_size, self.inputs) or self.inputs},
            **{"weight": self.words.data_ptr(), "scales": self.scales.data_ptr()},
            zeros=None if self.zeros is None else self.zeros.data_ptr(),
        )


def _panels(of_groups: Tensor) -> Tensor:
    """[outputs, groups] -> [outputs / 32][groups][32], and behind it [groups][outputs % 32]."""
    whole = len(of_groups) // _PANEL * _PANEL
    panels = of_groups[:whole].view(-1, _PANEL, of_groups.shape[1]).transpose(1, 2)
    return torch.cat((panels.flatten(), of_groups[whole:].t().flatten()))


def stays_packed(program: Program) -> set[int]:
    """The operators, by their place in the program, whose weights are multiplied with as they are."""
    if _library is None:
        return set()
    return {place for places in _alike(program).values() for place in places}


def pack(program: Program, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights, of which `Words` stand for what packed products take."""
    found = dict(weights)
    for name, places in _alike(program).items():
        op = program.ops[places[0]]
        _, scales, _, _ = packed_inputs(op.op, op.inputs)
        tensors = [weights[part] if part else None for part in scales]
        found[name] = Words(weights[name], *tensors, group_size=int(str(op.attrs.get("group_size", 0))))
    return found


def _alike(program: Program) -> dict[str, list[int]]:
    """Weight -> the operators that take it, where these are products that C has, and one like the other."""
    users: dict[str, set[Key | None]] = {name: {None} for name in program.outputs}
    places: dict[str, list[int]] = {}
    for place, op in enumerate(program.ops):
        key = _key(op, program)
        for name in op.inputs:
            users.setdefault(name, set()).add(key if key and name == op.inputs[1] else None)
        if key:
            places.setdefault(op.inputs[1], []).append(place)
    return {name: found for name, found in places.items() if len(users[name]) == 1 and None not in users[name]}


def _key(op: Op, program: Program) -> Key | None:
    """What a packed weight of the operator is made of; None if it is none that C can multiply with."""
    if op.op not in _BITS or op.outputs[0].type.dtype not in ("float32", "bfloat16"):
        return None
    weight, scales, _, _ = packed_inputs(op.op, op.inputs)
    if not {weight, *filter(None, scales)} <= set(program.weights) or not program.weights[weight].size:
        return None
    inputs = int(program.weights[weight].shape[1]) * 8 // _BITS[op.op]
    group = int(str(op.attrs.get("group_size", 0)))
    if group % 8 and group < inputs or (quantizes_input(op.op, op.inputs, op.attrs) and inputs > _MOST_EXACT):
        return None
    return op.op, tuple(scales), str(group)


def _product(x: Tensor, weight: Words, bias: Tensor | None, bits: int, unit: float | None = None) -> Any:
    """linear of x, rounded by this unit, or by each row's own if that is 0; None leaves it as it is."""
    if x.dtype not in _TYPES:
        return NotImplemented
    call = weight.call
    fits = x.dim() == 2 and x.shape[1] == weight.inputs and call.bits == bits
    fits = fits and (bias is None or (bias.dtype == x.dtype and bias.shape == (weight.outputs,)))
    if not fits:
        given = ", ".join(f"{part.dtype} {list(part.shape)}" for part in (x, weight.words, bias) if part is not None)
        raise ValueError(f"linear_int{bits}: these do not belong together: {given}")
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(len(x), weight.outputs, dtype=x.dtype)
    call.type, call.rows, call.stride = _TYPES[x.dtype], len(x), x.stride(0)
    call.round, call.input_scale = unit is not None, unit or 0.0
    call.x, call.y, call.bias = x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr()
    _library.enginehouse_packed(call)
    return y


def _linear_int4(
    x: Tensor, weight: Any, scales: Any, zeros: Any = None, bias: Tensor | None = None, *, group_size: int
) -> Any:
    """The weight has scales and zeros in it."""
    del scales, zeros, group_size
    return _product(x, weight, bias, 4) if isinstance(weight, Words) else NotImplemented


def _linear_int8(
    x: Tensor,
    weight: Any,
    scales: Any,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    per_token: bool = False,
) -> Any:
    """As above."""
    del scales
    if not isinstance(weight, Words):
        return NotImplemented
    unit = None if input_scale is None else float(input_scale)
    return _product(x, weight, bias, 8, 0.0 if unit is None and per_token else unit)


OPERATORS: Iterable[Callable[..., Any]] = (_linear_int4, _linear_int8)
"""Functions named as in `native.py`, which gives what they cannot take to other implementations."""
