"""Rotary positions (Su et al. 2021) by the native layer: tables are constants, or computed where they depend on lengths."""

from dataclasses import dataclass

import torch

from builder_svc.lower.tensorrt.lowered import TOKENS
from builder_svc.lower.tensorrt.net import ITensor, Net, Weight


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of rotation angles, float32.

    Attributes:
        name: tells it from the program's others.
        cos, sin: a row a position [positions, r / 2], as tensors; or a row a token, as tensors of the network [tokens, 1, r / 2].
        positions: of the tokens, int32 [tokens, 1], which choose rows; None where there is a row a token.
        half: r / 2.
    """

    name: str
    cos: torch.Tensor | ITensor
    sin: torch.Tensor | ITensor
    positions: ITensor | None
    half: int


def rope_table(net: Net, positions: ITensor, inv_freq: Weight, *, scale: float, capacity: int) -> RopeTable:
    """A table of all positions that a slot may have, computed here as the operator's reference does."""
    angles = torch.arange(capacity, dtype=torch.float32)[:, None] * inv_freq.tensor.float()[None, :]
    rows = net.reshape(positions, (TOKENS, 1))
    return RopeTable(net.where, angles.cos() * scale, angles.sin() * scale, rows, angles.shape[1])


def long_rope_table(
    net: Net,
    positions: ITensor,
    lengths: ITensor,
    inv_freq: Weight,
    long_inv_freq: Weight,
    *,
    original: int,
    scale: float,
    capacity: int,
) -> RopeTable:
    """Two tables behind each other: a token of a sequence longer than `original` has its row in the second one."""
    parts = [inv_freq.tensor.float(), long_inv_freq.tensor.float()]
    at = torch.arange(capacity, dtype=torch.float32)[:, None]
    angles = torch.cat([at * frequencies[None, :] for frequencies in parts])
    longer = net.elementwise(lengths, net.number(original, lengths), "GREATER")
    offset = net.select(longer, net.number(capacity, positions), net.number(0, positions))
    rows = net.reshape(net.add(positions, offset), (TOKENS, 1))
    return RopeTable(net.where, angles.cos() * scale, angles.sin() * scale, rows, angles.shape[1])


def dynamic_rope_table(
    net: Net,
    positions: ITensor,
    lengths: ITensor,
    *,
    rotary_dim: int,
    theta: float,
    factor: float,
    original: int,
) -> RopeTable:
    """Computed in the network: the base depends on the length, of which there are too many for a table."""
    at, length = (net.reshape(net.cast(value, torch.float32), (TOKENS, 1)) for value in (positions, lengths))
    longest = net.elementwise(length, net.number(original, length), "MAX")
    grown = net.divide(net.multiply(longest, net.number(factor, longest)), net.number(original, longest))
    ratio = net.elementwise(grown, net.number(factor - 1, grown), "SUB")
    power = rotary_dim / (rotary_dim - 2)
    base = net.multiply(net.elementwise(ratio, net.number(power, ratio), "POW"), net.number(theta, ratio))
    exponents = torch.arange(0, rotary_dim, 2).float()[None, :] / rotary_dim
    steps = net.constant(f"rope exponents {rotary_dim}", exponents)
    angles = net.divide(at, net.elementwise(base, steps, "POW"))
    half = rotary_dim // 2
    cos, sin = (net.reshape(net.unary(angles, function), (TOKENS, 1, half)) for function in ("COS", "SIN"))
    return RopeTable(net.where, cos, sin, None, half)


def rope(net: Net, x: ITensor, table: RopeTable, _: RopeTable, *, head_dim: int, interleaved: bool) -> ITensor:
    """[tokens, heads * D] in its own dtype: each token is a row of the layer's batch, of one position."""
    heads = x.shape[1] // head_dim
    dtype = net.torch_dtypes[x.dtype]
    tables = []
    for name, values in (("cos", table.cos), ("sin", table.sin)):
        if isinstance(values, torch.Tensor):
            tables.append(net.constant(f"{table.name} {name} {dtype}", values.to(dtype)))
        else:
            tables.append(net.cast(values, dtype))
    rows = net.reshape(x, (TOKENS, heads, 1, head_dim))
    rotary_dim = 0 if 2 * table.half == head_dim else 2 * table.half
    layer = net.network.add_rotary_embedding(rows, *tables, interleaved, rotary_dim)
    if layer is not None and table.positions is not None:
        layer.set_input(3, table.positions)
    return net.reshape(net.out(layer), (TOKENS, heads * head_dim))
