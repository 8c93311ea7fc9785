"""Measures the tactics of products on the GPU here."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from engine.manifest import Limits
from engine.program import Program
from executor_svc.kernels import fp8, rows
from executor_svc.kernels.integers import Packed, unit
from executor_svc.kernels.tactics import (
    EIGHT,
    MOST_ROWS,
    Product,
    Table,
    Tactic,
    candidates,
    multiply,
    multiply_fp8,
    multiply_packed,
)

F8 = torch.float8_e4m3fn
_FLUSH = 400e6  # bytes of weights that a measurement goes through: more than the device's cache holds


@torch.inference_mode()
def measure(
    product: Product, tactics: Iterable[Tactic], dtype: torch.dtype, *, alone: bool = False
) -> dict[Tactic, float]:
    """us of each tactic, the fastest first; of those whose blocks find no room in shared memory, none.

    As in a step, before each product the kernel runs that makes its input: a product that leaves no room on the multiprocessors
    while it ends keeps the next kernel from being there early.

    Args:
        dtype: of the product.
        alone: whether products follow one another, with nothing between them.
    """
    small = product.kind in EIGHT
    first = _weight(product, dtype)
    size = (first.weight if isinstance(first, Packed) else first).nbytes
    weights = [first, *(_weight(product, dtype) for _ in range(max(2, int(_FLUSH / size)) - 1))]
    x = torch.randn(product.rows, product.columns, device="cuda", dtype=dtype)
    ones, scales = x.new_ones(product.columns), torch.rand(product.outputs, 1, device="cuda")

    def made() -> tuple[Tensor, Tensor]:
        """The product's input, and its scales where there are any."""
        kind = torch.int8 if product.kind == "w8a8" else F8
        return fp8.quantize(x, None, kind) if small else (rows.norm(x, None, ones, 1e-5)[0], scales)

    kept = made()

    def run(weight: Any, tactic: Tactic) -> Tensor:
        given, of_rows = kept if alone else made()
        if isinstance(weight, Packed):
            return multiply_packed(given, weight, None, tactic)
        if small:
            return multiply_fp8(given, of_rows, weight, scales, None, dtype, tactic)
        return multiply(given, weight, None, tactic, pair=product.kind == "pair")

    found = {}
    for tactic in tactics:
        try:
            found[tactic] = timed(lambda weight, tactic=tactic: run(weight, tactic), weights)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _weight(product: Product, dtype: torch.dtype) -> Any:
    """Any one of the product's kind."""
    shape, kind = (product.outputs, product.columns), product.kind
    if kind in ("dense", "pair", "fp8"):
        return torch.randn(shape, device="cuda", dtype=dtype).to(F8 if kind == "fp8" else dtype)
    codes = torch.randint(
        0, 256, (shape[0], shape[1] // (2 if kind.startswith("int4") else 1)), dtype=torch.uint8, device="cuda"
    )
    if kind == "w8a8":
        return codes.view(torch.int8)
    if kind == "int8":
        return Packed(codes.view(torch.int8), torch.rand(shape[0], device="cuda"))
    group = int(kind.removeprefix("int4/"))
    return Packed(codes, torch.rand(shape[0], -(-shape[1] // group), device="cuda").to(dtype), None, group)


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


_KINDS = {
    "linear": "dense",
    "linear_silu_mul": "pair",
    "product_fp8": "fp8",
    "product_int8": "w8a8",
    "linear_int4": "int4",
    "linear_int8": "int8",
}
_WEIGHTS = {"linear": 1, "linear_silu_mul": 1, "product_fp8": 2, "product_int8": 2, "linear_int4": 1, "linear_int8": 1}


def shapes(program: Program, limits: Limits) -> dict[Product, str]:
    """The products that there are tactics for of a program that `fuse` has been over, and the dtypes of their results."""
    found: dict[Product, str] = {}
    for op in program.ops:
        weight = program.weights.get(op.inputs[_WEIGHTS[op.op]]) if op.op in _KINDS else None
        if weight is None or weight.dtype == "float32":
            continue
        kind, dtype = _KINDS[op.op], op.outputs[0].type.dtype
        outputs, columns = map(int, weight.shape)
        if kind == "int4":
            columns *= 2
            kind = f"int4/{unit(int(op.attrs['group_size']), columns)}"  # type: ignore[arg-type]
        most = min(limits.max_num_tokens if kind in EIGHT else MOST_ROWS, limits.max_num_tokens)
        for power in range((most - 1).bit_length() + 1):
            found[Product(1 << power, outputs, columns, kind)] = dtype
    return found


def tune(program: Program, limits: Limits) -> Table:
    """The fastest tactic of each product of a program that `fuse` has been over."""
    return {
        shape: next(iter(measure(shape, candidates(shape), getattr(torch, dtype))))
        for shape, dtype in shapes(program, limits).items()
    }
