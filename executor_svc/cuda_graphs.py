"""CUDA graphs of steps: which shapes they have, and what they and the largest step take of a device's memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.manifest import Limits
from engine.opset import PACKED
from engine.program import ITEM_SIZE, Op, Program, TensorType
from executor_svc.cuda_layout import PROMPTS, Shape

_LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Tokens of prompts in a step that a graph holds; more keep the device busy while the host starts the next.
_MIXED = 1024
_ROWS = 128  # cuBLAS takes as long for fewer
_WORKING = 1.25  # what operators take for themselves, beside their results


@dataclass
class Graph:
    """A step of a fixed shape: its columns, int32, and what it makes of them: logits, and the most probable tokens.

    Off the GPU there are no graphs, and it is computed each time.
    """

    shape: Shape
    columns: Tensor
    compute: Callable[[], tuple[Tensor, Tensor]]
    graph: Any = None
    results: tuple[Tensor, Tensor] | None = None

    def capture(self, pool: Any) -> None:
        """Compiles what is not compiled yet, then records. The results stay the graph's own, the rest is shared by the pool."""
        self.compute()
        torch.cuda.current_stream().synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # of this thread alone: in another one weights may be arriving
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.results = self.compute()

    def run(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The step with other columns, from pinned memory."""
        self.columns.copy_(columns, non_blocking=True)
        if self.graph is None or self.results is None:
            return self.compute()
        self.graph.replay()
        return self.results


def shapes(limits: Limits) -> list[tuple[int, int]]:
    """Decodes and tokens of the steps that graphs hold, the smallest first: decodes alone, then with prompts."""
    most = min(limits.max_batch_size, _LADDER[-1])
    mixed = {(0, tokens) for tokens in (128, 256, 512, 1024)}
    for decodes in {min(64, most), most}:
        first = decodes // _ROWS * _ROWS + _ROWS
        mixed |= {(decodes, tokens) for tokens in range(first, first + _MIXED, _ROWS)}
    alone = {*(size for size in _LADDER if size < most), most}
    return [
        *((size, size) for size in sorted(alone)),
        *sorted(
            {(decodes, min(tokens, limits.max_num_tokens)) for decodes, tokens in mixed} - {(most, most)},
            key=lambda pair: pair[::-1],
        ),
    ]


def memory(program: Program, limits: Limits) -> int:
    """Bytes that steps take beside weights and KV cache: all graphs, the largest step that none holds, and drawing its tokens."""
    held = shapes(limits)
    rows = sum(min(limits.max_batch_size, decodes + (PROMPTS if tokens > decodes else 0)) for decodes, tokens in held)
    logits = [value.type for op in program.ops for value in op.outputs if value.name in program.outputs]
    results = rows * sum(_size(kind, dict.fromkeys(program.dims, 1)) for kind in logits)
    drawn = 4 * limits.max_batch_size * sum(int(kind.shape[-1]) for kind in logits)
    captured = _alive(program, max(tokens for _, tokens in held), limits.max_batch_size)
    return results + drawn + int(_WORKING * (captured + _alive(program, limits.max_num_tokens, limits.max_batch_size)))


def _alive(program: Program, tokens: int, rows: int) -> int:
    """Bytes of the values that are there at once, at most, in a step of so many tokens with so many rows of logits."""
    dims = dict.fromkeys(program.dims, tokens) | {"num_logits": rows}
    last_use = {name: number for number, op in enumerate(program.ops) for name in op.inputs}
    sizes: dict[str, int] = {}
    types = {**program.inputs, **{value.name: value.type for op in program.ops for value in op.outputs}}
    most = 0
    for number, op in enumerate(program.ops):
        sizes |= {value.name: _size(value.type, dims) for value in op.outputs}
        most = max(most, sum(sizes.values()) + _inside(op, program, types, dims))
        sizes = {name: size for name, size in sizes.items() if last_use.get(name, number) > number}
    return most


def _inside(op: Op, program: Program, types: dict[str, TensorType], dims: dict[str, int]) -> int:
    """Bytes of what an operator makes on its way to a result."""
    if op.op == "linear_silu_mul":  # gate and up of many rows
        return 2 * _size(op.outputs[0].type, dims)
    if op.op == "experts":  # the same of each token's experts, and what they make
        rows = dims["num_tokens"] * int(op.attrs["top_k"])  # type: ignore[arg-type]
        wide, columns = map(int, program.weights[op.inputs[2]].shape[1:])
        return rows * (wide + wide // 2 + columns) * ITEM_SIZE[op.outputs[0].type.dtype]
    if op.op in PACKED:  # its matrix: a reference's in float32 and rounded, a kernel's rounded alone
        ours = op.op == "linear_int8" or int(op.attrs.get("group_size", 1)) % 32 == 0  # type: ignore[arg-type]
        return int(types[op.inputs[0]].shape[-1]) * int(op.outputs[0].type.shape[-1]) * (2 if ours else 6)
    return 0


def _size(kind: TensorType, dims: dict[str, int]) -> int:
    size = ITEM_SIZE[kind.dtype]
    for dim in kind.shape:
        size *= dims[dim] if isinstance(dim, str) else dim
    return size
