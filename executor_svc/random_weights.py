"""Dummy weights: what an engine has in no file is made at random, so that everything but the text is as with real weights."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.opset import OPERATORS
from engine.program import Op, Program
from executor_svc import memory

_ALIGNMENT = 64  # bytes, as in a file of weights
_SPREAD = 1 / math.sqrt(3)  # standard deviation of numbers that are uniform from -1 to 1
_INPUT_SCALE = 1 / 32  # of activations whose size is about 1: float8_e4m3fn then reaches to 14
_SMALL = 0.02  # standard deviation of biases, and of what norms' weights differ from 1


def make(
    program: Program, names: list[str], seed: int, device: str, made: Callable[[int], None] = lambda _: None
) -> dict[str, Tensor]:
    """Random weights on a device, in one buffer: the same ones for a seed on one kind of device.

    Matrices are normal with a variance of 1 / columns, so that activations keep their size from layer to layer; norms' weights
    are around 1; packed weights are any bits where they are integers, and their scales such that the product is like a matrix of
    that kind.

    Args:
        names: weights of the program; those that no operator uses are left out.
        device: a device of torch.
        made: called with the bytes of each weight.
    """
    uses = _uses(program)
    offsets, size = {}, 0
    for name in filter(uses.__contains__, names):
        offsets[name] = size
        size += -(-program.weights[name].nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = memory.zeros(size) if device == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
    generator = torch.Generator(device)
    weights = {}
    for name, offset in offsets.items():
        declared = program.weights[name]
        shape = tuple(int(dim) for dim in declared.shape)
        part = buffer[offset : offset + declared.nbytes]
        weights[name] = part.view(getattr(torch, declared.dtype)).view(shape)
        generator.manual_seed(_seed(seed, name))
        _fill(weights[name], *uses[name], program, generator)
        made(declared.nbytes)
    return weights


def _uses(program: Program) -> dict[str, tuple[Op, str]]:
    """Weight -> the operator that uses it first, and its name among that one's inputs."""
    found: dict[str, tuple[Op, str]] = {}
    for op in program.ops:
        for name, slot in zip(op.inputs, OPERATORS[op.op].inputs, strict=False):
            found.setdefault(name, (op, slot.rstrip("?")))
    return found


def _seed(seed: int, name: str) -> int:
    """A weight's own seed: its values do not depend on which others there are."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()) >> 1


def _fill(weight: Tensor, op: Op, slot: str, program: Program, generator: torch.Generator) -> None:
    if not weight.dtype.is_floating_point:
        bits = weight.view(-1).view(torch.uint8)
        low, high = (7, 10) if slot == "zeros" else (0, 256)  # zero points are in the middle of four bits
        bits.random_(low, high, generator=generator)
        return
    mean, std = 0.0, 1 / math.sqrt(weight.shape[-1]) if weight.shape else 1.0
    if slot == "input_scale":
        mean, std = _INPUT_SCALE, 0.0
    elif "scale" in slot:
        mean, std = _scale(op, program), 0.0
    elif "norm" in op.op and slot == "weight":
        mean, std = 1.0, _SMALL
    elif weight.dim() < 2:
        std = _SMALL
    if weight.element_size() > 1:
        weight.normal_(mean, std, generator=generator)
    else:  # float8, which has no generator, and a scale that makes it small
        std = _SPREAD
        for row in weight.view(-1, weight.shape[-1]).split(4096):
            row.copy_(torch.empty(row.shape, device=row.device).normal_(mean, std, generator=generator))


def _scale(op: Op, program: Program) -> float:
    """Of packed weights: what gives their values a variance of 1 / columns of the operator's input."""
    types = {value.name: value.type for made in program.ops for value in made.outputs}
    columns = int(types[op.inputs[0]].shape[-1])
    packed = [program.weights[name].dtype for name in op.inputs if name in program.weights]
    largest = 127 if "int8" in packed else 8 if "uint8" in packed else 1
    return 1 / math.sqrt(columns) / (_SPREAD * largest)
