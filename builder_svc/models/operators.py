"""The operator set as functions that a module is written over: they know shapes, and tell a recorder what was applied.

Or, while `computed` says so, they compute.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from engine.opset import FLOATS, OPERATORS, Operator

SIZES = {"num_tokens": 1_000_003, "num_logits": 1_000_033}
"""What the named dimensions measure while a module runs: no size of a model's own."""

Recorder = Callable[[str, tuple[Any, ...], list[Tensor]], None]
"""Called with (operator, its inputs and then its attributes in the table's order, its results)."""

Computer = Callable[[str, Sequence[Tensor | None], dict[str, Any]], Any]
"""Called with (operator, its inputs, its attributes) for its results."""

_computer: ContextVar[Computer | None] = ContextVar("computer", default=None)
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)
_ranks: ContextVar[int] = ContextVar("ranks", default=1)


class Operators:
    """`op.linear(x, weight, bias)`: every operator, its attributes after its inputs, on tensors of the meta device."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in OPERATORS:
            raise AttributeError(f"{name} is no operator of the set: {', '.join(OPERATORS)}")
        return _shapes(name, OPERATORS[name])


op = Operators()


@contextmanager
def recorded(recorder: Recorder, ranks: int = 1) -> Iterator[None]:
    """While it lasts, the recorder is told of every operator that is applied.

    Args:
        ranks: of the tensor-parallel group that the module is for.
    """
    tokens = _recorder.set(recorder), _ranks.set(ranks)
    try:
        yield
    finally:
        _recorder.reset(tokens[0])
        _ranks.reset(tokens[1])


@contextmanager
def computed(computer: Computer) -> Iterator[None]:
    """While it lasts, in this thread, operators give what the computer makes of tensors that have values."""
    token = _computer.set(computer)
    try:
        yield
    finally:
        _computer.reset(token)


def _shapes(name: str, spec: Operator) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        tensors, attrs = args[: len(spec.inputs)], args[len(spec.inputs) :]
        if computer := _computer.get():
            return computer(name, tensors, dict(zip(spec.attrs, attrs, strict=True)))
        types = result_types(name, tensors, dict(zip(spec.attrs, attrs, strict=True)))
        results = [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in types]
        if recorder := _recorder.get():
            recorder(name, args, results)
        return results[0] if len(results) == 1 and not spec.variadic else results

    return apply


def result_types(
    name: str, tensors: Sequence[Tensor | None], attrs: dict[str, Any]
) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each result. By rule: to run the references on shapes takes as long as importing torch's compiler."""
    if name == "send":
        return []
    if name == "recv":
        return [(getattr(torch, FLOATS[attrs["dtype"]]), (SIZES["num_tokens"], attrs["size"]))]
    x, *others = (tensor for tensor in tensors if tensor is not None)
    rows = x.shape[0]
    match name:
        case "embedding" | "embedding_shard":
            return [(others[0].dtype, (rows, others[0].shape[1]))]
        case "linear" | "linear_int4" | "linear_int8" | "linear_fp8":
            return [(x.dtype, (rows, others[0].shape[0]))]
        case "add_rms_norm" | "add_layer_norm":
            return [(x.dtype, tuple(x.shape))] * 2
        case "rope_table":
            return [(torch.float32, (rows, len(others[0])))] * 2
        case "long_rope_table":
            return [(torch.float32, (rows, len(others[1])))] * 2
        case "dynamic_rope_table":
            return [(torch.float32, (rows, attrs["rotary_dim"] // 2))] * 2
        case "silu_mul" | "gelu_mul":
            return [(x.dtype, (rows, x.shape[1] // 2))]
        case "split":
            return [(x.dtype, (rows, size)) for size in attrs["sizes"]]
        case "gather":
            return [(x.dtype, (len(others[0]), x.shape[1]))]
        case "all_gather":
            return [(x.dtype, (rows, x.shape[1] * _ranks.get()))]
    return [(x.dtype, tuple(x.shape))]
