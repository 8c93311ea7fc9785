"""Measures the tactics of products on the GPU here."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from engine.manifest import Limits
from engine.program import Program
from executor_svc.kernels.tactics import MOST_ROWS, Product, Table, Tactic, candidates, multiply, multiply_fp8

_FLUSH = 400e6  # bytes of weights that a measurement goes through: more than the device's cache holds


@torch.inference_mode()
def measure(shape: Product, tactics: Iterable[Tactic], dtype: torch.dtype) -> dict[Tactic, float]:
    """us of each tactic, the fastest first; of those whose blocks find no room in shared memory, none.

    Args:
        dtype: of the product.
    """
    sizes = shape.outputs, shape.columns
    small = shape.kind == "fp8"
    count = max(2, int(_FLUSH / (shape.outputs * shape.columns * (1 if small else dtype.itemsize))))
    kept = torch.float8_e4m3fn if small else dtype
    weights = [torch.randn(sizes, device="cuda", dtype=dtype).to(kept) for _ in range(count)]
    x = torch.randn(shape.rows, shape.columns, device="cuda", dtype=dtype).to(kept)
    x_scales, scales = (torch.rand(size, 1, device="cuda") for size in (shape.rows, shape.outputs))

    def product(weight: Tensor, tactic: Tactic) -> Tensor:
        if small:
            return multiply_fp8(x, x_scales, weight, scales, None, dtype, tactic)
        return multiply(x, weight, None, tactic, pair=shape.kind == "pair")

    found = {}
    for tactic in tactics:
        try:
            found[tactic] = timed(lambda weight, tactic=tactic: product(weight, tactic), weights)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def timed(function: Callable[[Any], Tensor], sets: list[Any]) -> float:
    """us a call: the median of 7 replays of a graph of a call with each of the sets."""
    for one in sets:
        function(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in sets:
            function(one)
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times)[3] / len(sets)


_KINDS = {"linear": "dense", "linear_silu_mul": "pair", "product_fp8": "fp8"}
_WEIGHTS = {"linear": 1, "linear_silu_mul": 1, "product_fp8": 2}


def shapes(program: Program, limits: Limits) -> dict[Product, str]:
    """The products that there are tactics for of a program that `fuse` has been over, and the dtypes of their results."""
    found: dict[Product, str] = {}
    for op in program.ops:
        weight = program.weights.get(op.inputs[_WEIGHTS[op.op]]) if op.op in _KINDS else None
        if weight is None or weight.dtype == "float32":
            continue
        kind, dtype = _KINDS[op.op], op.outputs[0].type.dtype
        most = limits.max_num_tokens if kind == "fp8" else min(MOST_ROWS, limits.max_num_tokens)
        for power in range((most - 1).bit_length() + 1):
            found[Product(1 << power, int(weight.shape[0]), int(weight.shape[1]), kind)] = dtype
    return found


def tune(program: Program, limits: Limits) -> Table:
    """The fastest tactic of each product of a program that `fuse` has been over."""
    return {
        shape: next(iter(measure(shape, candidates(shape), getattr(torch, dtype))))
        for shape, dtype in shapes(program, limits).items()
    }
