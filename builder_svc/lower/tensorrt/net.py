"""A network under construction: TensorRT's layers as functions of tensors, and the memory of its constants."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.tensorrt import failed

ITensor = Any
"""A tensor of a network."""


@dataclass(frozen=True)
class Weight:
    """A weight of the program, as its handler gets it: a name, and what it holds."""

    name: str
    tensor: Tensor


class Net:
    """An INetworkDefinition and what has been made for it so far.

    Attributes:
        constants: layer name -> tensor; TensorRT keeps addresses only.
    """

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt, self.network = trt, network
        self.constants: dict[str, Tensor] = {}
        self.where = ""  # the operator that is being lowered, for errors and layers' names
        self._made: dict[Any, ITensor] = {}
        self._extents: dict[str, ITensor] = {}
        self.dtypes = {
            torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16, torch.int32: trt.int32,
            torch.int64: trt.int64, torch.int8: trt.int8, torch.float8_e4m3fn: trt.fp8, torch.bool: trt.bool,
        }  # fmt: skip
        self.torch_dtypes = {ours: dtype for dtype, ours in self.dtypes.items()}

    def out(self, layer: Any, index: int = 0) -> ITensor:
        """A result of a layer. Raises Internal, with TensorRT's reason, if there is none."""
        if layer is None:
            raise failed(self.trt, f"a layer of {self.where}")
        return layer.get_output(index)

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> ITensor:
        """An input, whose named dimensions may have any size; those of one name have the same."""
        sizes = tuple(-1 if isinstance(dim, str) else dim for dim in shape)
        tensor = self.network.add_input(name, self.dtypes[dtype], sizes)
        if tensor is None:
            raise failed(self.trt, f"input {name!r}")
        for axis, dim in enumerate(shape):
            if isinstance(dim, str):
                tensor.set_dimension_name(axis, dim)
                if dim not in self._extents:
                    self._extents[dim] = self.extent_of(tensor, axis)
        return tensor

    def output(self, name: str, tensor: ITensor) -> None:
        """Makes a tensor an output."""
        tensor.name = name
        self.network.mark_output(tensor)

    # Constants

    def constant(self, name: str, values: Tensor, shape: Sequence[int] | None = None, dtype: Any = None) -> ITensor:
        """A constant over a tensor's own memory, made once for each name, shape and dtype.

        Args:
            shape: by default the tensor's; of as many elements.
            dtype: TensorRT's, where torch has none (int4).
        """
        dims = tuple(values.shape if shape is None else shape)
        kind = self.dtypes[values.dtype] if dtype is None else dtype
        key = (name, dims, str(kind))
        if key not in self._made:
            kept = values.contiguous()
            layer = self.network.add_constant(dims, self.trt.Weights(kind, kept.data_ptr(), math.prod(dims)))
            self._made[key] = self.out(layer)
            layer.name = name if name not in self.constants else f"{name} as {list(dims)} {kind}"
            self.constants[layer.name] = kept
        return self._made[key]

    def weight(self, weight: Weight, shape: Sequence[int] | None = None) -> ITensor:
        """A weight of the program as it is."""
        return self.constant(weight.name, weight.tensor, shape)

    def number(self, value: float, like: ITensor) -> ITensor:
        """A number in a tensor's dtype, of its rank."""
        dtype = self.torch_dtypes[like.dtype]
        rank = len(like.shape)
        return self.constant(f"{value!r} {dtype} {rank}", torch.full((1,) * rank, value, dtype=dtype))

    def ints(self, *values: int, dtype: torch.dtype = torch.int64) -> ITensor:
        """[len(values)], for shapes."""
        return self.constant(f"{values} {dtype}", torch.tensor(values, dtype=dtype))

    # Shapes

    def extent(self, dim: str) -> ITensor:
        """The size of a named dimension, int64 [1]."""
        return self._extents[dim]

    def set_extent(self, dim: str, size: ITensor) -> None:
        """Says what the size of a dimension is that no input has."""
        self._extents[dim] = size

    def extent_of(self, tensor: ITensor, axis: int) -> ITensor:
        """The size of a tensor along an axis, int64 [1]."""
        shape = self.out(self.network.add_shape(tensor))
        return self.out(self.network.add_slice(shape, (axis,), (1,), (1,)))

    def shape_of(self, dims: Sequence[int | str]) -> ITensor:
        """Sizes and names of dimensions as one int64 tensor."""
        key = ("shape", tuple(dims))
        if key not in self._made:
            parts = [self.ints(dim) if isinstance(dim, int) else self.extent(dim) for dim in dims]
            layer = self.network.add_concatenation(parts)
            layer.axis = 0
            self._made[key] = self.out(layer)
        return self._made[key]

    def reshape(self, x: ITensor, dims: Sequence[int | str]) -> ITensor:
        """x in another shape: sizes (-1 once for what is left over) or, several times, names of dimensions."""
        layer = self.network.add_shuffle(x)
        named = [dim for dim in dims if isinstance(dim, str)]
        if len(named) <= 1 and -1 not in dims:  # the one that is not fixed follows from the others
            layer.reshape_dims = tuple(-1 if isinstance(dim, str) else dim for dim in dims)
        elif not named:
            layer.reshape_dims = tuple(dims)
        else:
            layer.set_input(1, self.shape_of(dims))
        return self.out(layer)

    def transpose(self, x: ITensor, axes: Sequence[int]) -> ITensor:
        """x with its axes in another order."""
        layer = self.network.add_shuffle(x)
        layer.first_transpose = tuple(axes)
        return self.out(layer)

    def columns(self, x: ITensor, start: int, size: int, rows: Sequence[int | str]) -> ITensor:
        """x[..., start : start + size]; `rows` are the other dimensions."""
        before = (0,) * len(rows)
        layer = self.network.add_slice(x, (*before, start), (*before, size), (1,) * (len(rows) + 1))
        layer.set_input(2, self.shape_of((*rows, size)))
        return self.out(layer)

    # Arithmetic

    def elementwise(self, a: ITensor, b: ITensor, operation: str) -> ITensor:
        """An ElementWiseOperation of two tensors of one rank; sizes of 1 are broadcast."""
        return self.out(self.network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation)))

    def add(self, a: ITensor, b: ITensor) -> ITensor:
        """a + b."""
        return self.elementwise(a, b, "SUM")

    def multiply(self, a: ITensor, b: ITensor) -> ITensor:
        """a * b."""
        return self.elementwise(a, b, "PROD")

    def divide(self, a: ITensor, b: ITensor) -> ITensor:
        """a / b."""
        return self.elementwise(a, b, "DIV")

    def unary(self, x: ITensor, operation: str) -> ITensor:
        """A UnaryOperation."""
        return self.out(self.network.add_unary(x, getattr(self.trt.UnaryOperation, operation)))

    def activation(self, x: ITensor, kind: str) -> ITensor:
        """An ActivationType."""
        return self.out(self.network.add_activation(x, getattr(self.trt.ActivationType, kind)))

    def reduce(self, x: ITensor, operation: str, axis: int, *, keep: bool = True) -> ITensor:
        """A ReduceOperation along one axis."""
        kind = getattr(self.trt.ReduceOperation, operation)
        return self.out(self.network.add_reduce(x, kind, 1 << axis, keep))

    def cast(self, x: ITensor, dtype: torch.dtype) -> ITensor:
        """x in a dtype."""
        kind = self.dtypes[dtype]
        return x if x.dtype == kind else self.out(self.network.add_cast(x, kind))

    def matmul(self, a: ITensor, b: ITensor, *, transposed: bool = False) -> ITensor:
        """a @ b, or a @ b^T; batch dimensions of 1 are broadcast."""
        operation = self.trt.MatrixOperation
        other = operation.TRANSPOSE if transposed else operation.NONE
        return self.out(self.network.add_matrix_multiply(a, operation.NONE, b, other))

    def gather(self, data: ITensor, indices: ITensor, axis: int = 0) -> ITensor:
        """Slices of data along an axis."""
        return self.out(self.network.add_gather(data, indices, axis))

    def select(self, condition: ITensor, a: ITensor, b: ITensor) -> ITensor:
        """a where the condition holds, else b."""
        return self.out(self.network.add_select(condition, a, b))

    def quantize(self, x: ITensor, scale: ITensor, dtype: Any, axis: int | None = None) -> ITensor:
        """x / scale in codes of a dtype of TensorRT's."""
        layer = self.network.add_quantize(x, scale, dtype)
        if axis is not None:
            layer.axis = axis
        return self.out(layer)

    def dequantize(self, codes: ITensor, scale: ITensor, dtype: torch.dtype, axis: int | None = None) -> ITensor:
        """codes * scale, one scale for all, for each index of an axis, or for blocks."""
        layer = self.network.add_dequantize(codes, scale, self.dtypes[dtype])
        if axis is not None:
            layer.axis = axis
        return self.out(layer)
