"""Which kernel multiplies how: a table by the number of rows and the shape of the weight, measured where an engine is built.

Without a table, or for a shape that it has not, a rule that was right on an H100 and an H200 (bench/products.py).
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.program import Program
from executor_svc.kernels import products, rows
from executor_svc.kernels.products import Form

MOST_ROWS = 64  # with more, products take as long as their arithmetic, and cuBLAS is fastest
_FLUSH = 400e6  # bytes of weights that a measurement goes through: more than the device's cache holds


class Shape(NamedTuple):
    """A product: up to so many rows, a power of 2, with a weight [outputs, columns]; pair: and `silu_mul` of it."""

    rows: int
    outputs: int
    columns: int
    pair: bool


class Tactic(NamedTuple):
    """kernel: "cublas", "gemv" (of one row, blocks of form.k columns) or "thin"."""

    kernel: str
    form: Form = Form()


Table = dict[Shape, Tactic]
RULE: Table = {}  # no table: the rule alone
CUBLAS = Tactic("cublas")
_FORMS = tuple(Form(64, k, stages) for k, stages in ((128, 3), (128, 4), (128, 5), (256, 3), (256, 5)))


def shape_of(x: Tensor, weight: Tensor, pair: bool) -> Shape:
    """Of a product with at least one row."""
    return Shape(1 << (x.shape[0] - 1).bit_length(), *weight.shape, pair)


def choose(shape: Shape, table: Table) -> Tactic:
    """The table's, or the rule's."""
    return table.get(shape) or _rule(shape)


def _rule(shape: Shape) -> Tactic:
    elements = shape.outputs * shape.columns
    large = elements > 100_000_000
    if shape.rows == 1:
        return Tactic("gemv", Form(k=2048 if large else 1024))
    if large:
        return Tactic("thin", Form(stages=3 if elements > 400_000_000 or shape.rows > 32 else 4))
    if shape.rows <= 16:
        return Tactic("thin", Form(k=256) if shape.outputs <= 4096 else Form())
    return Tactic("thin") if shape.rows <= 32 and shape.columns <= 8192 else CUBLAS


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, tactic: Tactic, *, pair: bool) -> Tensor:
    """`linear`, and of a pair `silu_mul` of it."""
    if tactic.kernel == "gemv" and len(x) == 1:
        return products.gemv(x, weight, bias, pair=pair, block=tactic.form.k)
    if tactic.kernel == "thin":
        return products.thin(x, weight, bias, tactic.form, pair=pair)
    return rows.silu_mul(F.linear(x, weight, bias)) if pair else F.linear(x, weight, bias)


def candidates(shape: Shape) -> list[Tactic]:
    """What could be fastest."""
    gemv = [Tactic("gemv", Form(k=k)) for k in (1024, 2048)] if shape.rows == 1 else []
    return [CUBLAS, *gemv, *(Tactic("thin", form) for form in _FORMS)]


@torch.inference_mode()
def measure(shape: Shape, tactics: Iterable[Tactic], dtype: torch.dtype) -> dict[Tactic, float]:
    """us of each tactic, the fastest first; of those whose blocks find no room in shared memory, none."""
    size = shape.outputs * shape.columns * dtype.itemsize
    weights = [
        torch.randn(shape.outputs, shape.columns, device="cuda", dtype=dtype) for _ in range(max(2, int(_FLUSH / size)))
    ]
    x = torch.randn(shape.rows, shape.columns, device="cuda", dtype=dtype)
    found = {}
    for tactic in tactics:
        try:
            found[tactic] = timed(lambda w, how=tactic: multiply(x, w, None, how, pair=shape.pair), weights)
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


def shapes(program: Program, max_batch_size: int) -> dict[Shape, str]:
    """The products with few rows of a program that `fuse` has been over, and their dtypes: those of 16 bits."""
    found: dict[Shape, str] = {}
    for op in program.ops:
        if op.op in ("linear", "linear_silu_mul") and (weight := program.weights.get(op.inputs[1])):
            outputs, columns = map(int, weight.shape)
            for power in range(MOST_ROWS.bit_length()):
                if 1 << power < 2 * max_batch_size and weight.dtype != "float32":
                    found[Shape(1 << power, outputs, columns, op.op == "linear_silu_mul")] = weight.dtype
    return found


def tune(program: Program, max_batch_size: int) -> Table:
    """The fastest tactic of each product of a program that `fuse` has been over, measured on the GPU here."""
    return {
        shape: next(iter(measure(shape, candidates(shape), getattr(torch, dtype))))
        for shape, dtype in shapes(program, max_batch_size).items()
    }


def to_json(table: Table) -> bytes:
    """As an engine carries it."""
    rows_of = [[*shape, tactic.kernel, *tactic.form] for shape, tactic in sorted(table.items())]
    return json.dumps(rows_of).encode()


def from_json(data: bytes) -> Table:
    """Reads what `to_json` wrote."""
    return {Shape(*row[:4]): Tactic(row[4], Form(*row[5:])) for row in json.loads(data)}
