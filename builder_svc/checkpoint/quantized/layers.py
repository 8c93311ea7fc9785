"""A linear layer as a quantized checkpoint holds it: what tensors there are, and how they become ours.

A scheme is one way to store such a layer. Every format's module makes schemes of a few kinds:

    Integers    (code - zero) * scale, in groups of a row's inputs
    Floats      float8_e4m3fn * scale, for blocks

Our names for what a scheme gives are those of the packed operators: weight, scales, zeros.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from builder_svc.models.packed import WHOLE, Fp8, Int4, Int8, Packed

FLOATS = ("float16", "bfloat16", "float32")
Read = Callable[[str], Tensor]
"""Reads a layer's tensor by its last name, such as "qweight"."""


@dataclass(frozen=True)
class Layer:
    """A layer in a checkpoint, and the size of its weight."""

    read: Read
    rows: int
    columns: int


@dataclass(frozen=True)
class Expected:
    """What a tensor must be: one of these shapes, the first of which is the usual one, and one of these dtypes."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


NUMBER = Expected(((1,), (), (1, 1)), FLOATS)
"""A scale for all."""


class Scheme(ABC):
    """One way to store a linear layer.

    Attributes:
        marker: last name of the tensor by which such a layer is recognized.
        main: last name of the tensor that holds the weights.
        scale: last name of the tensor of scales.
    """

    marker: str
    main: str
    scale: str

    @abstractmethod
    def size(self, read: Read) -> tuple[int, int]:
        """(rows, columns) of the weight, by the main tensor, which has two dimensions."""

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> dict[str, Expected]:
        """All tensors of a layer of that size but its bias, the main one first."""

    @abstractmethod
    def form(self, columns: int, scales: str) -> Packed | str:
        """The packed form that says the same, or why there is none.

        Args:
            scales: the dtype of the checkpoint's.
        """

    def problem(self, layer: Layer) -> tuple[str, str] | None:
        """(last name of a tensor, what is wrong with its values) where they do not fit the config."""
        del layer
        return None

    @abstractmethod
    def part(self, name: str, layer: Layer) -> Tensor:
        """A tensor of the packed form."""

    @abstractmethod
    def dense(self, layer: Layer) -> Tensor:
        """The weight, float32 [rows, columns]."""


@dataclass(frozen=True)
class Integers(Scheme):
    """Codes 0 ... 2^bits - 1; a group of columns has a scale, and a zero point unless that is 2^(bits - 1) throughout.

    Attributes:
        group_size: columns that share a scale; WHOLE for all.
        symmetric: whether there are no zero points.
        act_order: whether a tensor says which group each column belongs to, as they were quantized in another order.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False

    @abstractmethod
    def codes(self, layer: Layer) -> Tensor:
        """uint8 [rows, columns]."""

    @abstractmethod
    def scales(self, layer: Layer) -> Tensor:
        """[rows, groups], in the checkpoint's dtype."""

    @abstractmethod
    def zeros(self, layer: Layer) -> Tensor:
        """uint8 [rows, groups], unless it is symmetric."""

    def group_of(self, layer: Layer) -> Tensor:
        """The group of each column, int64 [columns]."""
        return torch.arange(layer.columns) // (self.group_size or layer.columns)

    def groups(self, columns: int) -> int:
        """How many there are in a row."""
        return -(-columns // (self.group_size or columns))

    def form(self, columns: int, scales: str) -> Packed | str:
        group_size = self.group_size if self.groups(columns) > 1 else WHOLE
        if self.act_order and group_size:
            return "act-order"
        if self.bits == 4 and columns % 2 == 0:
            return Int4(group_size, not self.symmetric, scales)
        if self.bits == 8 and self.symmetric and not group_size:
            return Int8(scales)
        return (
            f"{self.bits} bits {'in groups' if group_size else 'a row'}{'' if self.symmetric else ' with zero points'}"
        )

    def part(self, name: str, layer: Layer) -> Tensor:
        if name == "zeros":
            return self.zeros(layer)
        if name == "scales":
            scales = self.scales(layer)
            return scales if self.bits == 4 else scales[:, 0]
        codes = self.codes(layer)
        if self.bits == 4:
            return codes[:, 0::2] | codes[:, 1::2] << 4
        return (codes ^ 128).view(torch.int8)  # less 128

    def dense(self, layer: Layer) -> Tensor:
        group = self.group_of(layer)
        matrix = self.codes(layer).float()
        if self.symmetric:
            matrix -= 2 ** (self.bits - 1)
        else:
            matrix -= self.zeros(layer).float()[:, group]
        return matrix.mul_(self.scales(layer).float()[:, group])


@dataclass(frozen=True)
class Floats(Scheme):
    """float8_e4m3fn; the product with its scale is the weight.

    Attributes:
        blocks: rows and columns that share a scale; "channel" is a scale for each row, "tensor" one for all.
        scale: last name of the scales, which not all writers call alike.
        activations: as they are quantized where the operator can (`Fp8`); "tensor" has a tensor "input_scale".
    """

    blocks: tuple[int, int] | str
    scale: str = "weight_scale"
    activations: str = ""
    main = "weight"

    @property
    def marker(self) -> str:  # type: ignore[override]
        return self.scale

    def size(self, read: Read) -> tuple[int, int]:
        rows, columns = read("weight").shape
        return rows, columns

    def tensors(self, rows: int, columns: int) -> dict[str, Expected]:
        if isinstance(self.blocks, tuple):
            scales: tuple[tuple[int, ...], ...] = ((-(-rows // self.blocks[0]), -(-columns // self.blocks[1])),)
        else:
            scales = ((rows, 1), (rows,)) if self.blocks == "channel" else ((), (1,), (1, 1))
        return {
            "weight": Expected(((rows, columns),), ("float8_e4m3fn",)),
            self.scale: Expected(scales, (*FLOATS, "float8_e8m0fnu")),
        }

    def form(self, columns: int, scales: str) -> Packed | str:
        del columns, scales
        return Fp8(*self.blocks) if isinstance(self.blocks, tuple) else Fp8(activations=self.activations)

    def part(self, name: str, layer: Layer) -> Tensor:
        if name != "scales":
            return layer.read(name)
        scales = layer.read(self.scale).float()
        return scales if isinstance(self.blocks, tuple) else scales.view(-1, 1).expand(layer.rows, 1)

    def dense(self, layer: Layer) -> Tensor:
        scales = self.part("scales", layer)
        if isinstance(self.blocks, tuple):
            of_rows = scales.repeat_interleave(self.blocks[0], 0)[: layer.rows]
            scales = of_rows.repeat_interleave(self.blocks[1], 1)[:, : layer.columns]
        return layer.read("weight").float() * scales


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of so many bits, one after another from the lowest bit on: int32 [n, words] -> uint8 [n, count].

    They may lie across two words. Eight of them take as many bytes as they have bits.
    """
    data = words.contiguous().view(torch.uint8)
    data = F.pad(data, (0, -data.shape[1] % bits)).view(len(data), -1, bits)
    values = []
    for number in range(8):
        byte, offset = divmod(number * bits, 8)
        value = data[..., byte] >> offset
        if offset + bits > 8:
            value = value | data[..., byte + 1] << 8 - offset
        values.append(value & 2**bits - 1)
    return torch.stack(values, -1).flatten(1)[:, :count]
