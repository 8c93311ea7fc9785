"""Runs a module on the meta device, where tensors are shapes, and writes down the operators that it applies as our program."""

from typing import Any

import torch
from torch import Tensor, nn

from builder_svc.models.operators import SIZES, recorded
from engine.errors import Internal
from engine.opset import OPERATORS, version_of
from engine.program import ROPE_LENGTHS, DType, KVCache, Op, Program, TensorType, Value


def lower(module: nn.Module, *, max_num_tokens: int, rope_lengths: bool = False, ranks: int = 1) -> Program:
    """The program of a module over the operator set (`builder_svc/models/operators.py`).

    Args:
        module: on the meta device; takes token_ids int32 [num_tokens], positions int32 [num_tokens] and logit_indices
            int32 [num_logits], and returns logits, or None if it sends what it makes to another rank. What it does depends
            neither on values nor on those sizes.
        max_num_tokens: the largest step.
        rope_lengths: whether the module takes a fourth tensor, `engine.program.ROPE_LENGTHS`.
        ranks: of the tensor-parallel group that the module is one rank's of.

    Raises:
        Internal: the module does something that is no operator of ours; the message names the operator that takes its result.
    """
    dims = {"token_ids": "num_tokens", "positions": "num_tokens", "logit_indices": "num_logits"}
    if rope_lengths:
        dims[ROPE_LENGTHS] = "num_tokens"
    inputs = {name: torch.empty(SIZES[dim], dtype=torch.int32, device="meta") for name, dim in dims.items()}
    recording = _Recording(inputs, {**dict(module.named_parameters()), **dict(module.named_buffers())})
    with torch.no_grad(), recorded(recording.add, ranks):
        logits = module(*inputs.values())
    program = recording.program(dict.fromkeys(SIZES, max_num_tokens), logits)
    program.validate()
    return program


class _Recording:
    """The operators so far. `values` keeps each tensor that has a name alive, so that no other one gets its id."""

    def __init__(self, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        self.inputs, self.weights = inputs, weights
        self.values = {id(tensor): (name, tensor) for name, tensor in {**inputs, **weights}.items()}
        self.caches: dict[int, KVCache] = {}
        self.ops: list[Op] = []

    def add(self, name: str, args: tuple[Any, ...], results: list[Tensor]) -> None:
        spec = OPERATORS[name]
        tensors, values = list(args[: len(spec.inputs)]), args[len(spec.inputs) :]
        while tensors and tensors[-1] is None and spec.inputs[len(tensors) - 1].rstrip("?") in spec.later:
            tensors.pop()
        inputs = tuple("" if tensor is None else self._name(tensor, name) for tensor in tensors)
        attrs = {
            attr: list(value) if kind is list else value
            for (attr, kind), value in zip(spec.attrs.items(), values, strict=True)
            if attr not in spec.later or value != spec.later[attr][1]
        }
        if "cache" in attrs:
            heads = tensors[1].shape[1] // attrs["head_dim"]
            small: DType = "int8" if "kv_int8" in attrs else "float8_e4m3fn"
            dtype = small if "k_scale" in attrs else _type(tensors[1]).dtype
            self.caches[attrs["cache"]] = KVCache(heads, attrs["head_dim"], dtype)
        outputs = []
        for index, tensor in enumerate(results):
            single = len(results) == 1 and not spec.variadic
            outputs.append(Value(f"v{len(self.ops)}" if single else f"v{len(self.ops)}.{index}", _type(tensor)))
            self.values[id(tensor)] = (outputs[-1].name, tensor)
        self.ops.append(Op(name, inputs, tuple(outputs), attrs))

    def program(self, dims: dict[str, int], logits: Tensor | None) -> Program:
        used = {name for op in self.ops for name in op.inputs}
        return Program(
            dims,
            {name: _type(tensor) for name, tensor in self.inputs.items()},
            {name: _type(tensor) for name, tensor in self.weights.items() if name in used},
            tuple(self.caches[index] for index in sorted(self.caches)),
            tuple(self.ops),
            () if logits is None else (self._name(logits, "the program's output"),),
            opset_version=max(version_of(op.op, op.inputs, op.attrs) for op in self.ops),
        )

    def _name(self, tensor: Tensor, user: str) -> str:
        if id(tensor) not in self.values:
            raise Internal(f"{user} takes what no operator of ours has made", reason="OPERATOR_UNKNOWN")
        return self.values[id(tensor)][0]


def _type(tensor: Tensor) -> TensorType:
    named = {size: dim for dim, size in SIZES.items()}
    shape = tuple(named.get(size, size) for size in tensor.shape)
    return TensorType(str(tensor.dtype).removeprefix("torch."), shape)  # type: ignore[arg-type]
