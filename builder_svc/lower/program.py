"""Traces a module on the meta device with torch.export and writes its graph down as our program."""

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from engine.errors import Internal
from engine.opset import OPERATORS, version_of
from engine.program import ROPE_LENGTHS, KVCache, Op, Program, TensorType, Value

# Sizes for the trace, all different and none 0 or 1, which torch.export would take for constants.
_NUM_TOKENS, _NUM_LOGITS = 7, 5


def lower(module: nn.Module, *, max_num_tokens: int, rope_lengths: bool = False) -> Program:
    """The program of a module over the operator set.

    Args:
        module: on the meta device; takes token_ids int32 [num_tokens], positions int32 [num_tokens] and logit_indices
            int32 [num_logits], and returns logits.
        max_num_tokens: the largest step.
        rope_lengths: whether the module takes a fourth tensor, `engine.program.ROPE_LENGTHS`.

    Raises:
        Internal: the module does something that is no operator of ours; the message names it.
    """
    dims = {"num_tokens": max_num_tokens, "num_logits": max_num_tokens}
    symbols = {name: torch.export.Dim(name, min=2, max=max(size, 8)) for name, size in dims.items()}
    inputs = {"token_ids": "num_tokens", "positions": "num_tokens", "logit_indices": "num_logits"}
    if rope_lengths:
        inputs[ROPE_LENGTHS] = "num_tokens"
    sizes = {"num_tokens": _NUM_TOKENS, "num_logits": _NUM_LOGITS}
    example = tuple(torch.empty(sizes[dim], dtype=torch.int32, device="meta") for dim in inputs.values())
    with torch.no_grad():
        exported = torch.export.export(
            module, example, dynamic_shapes=tuple({0: symbols[dim]} for dim in inputs.values())
        )
    signature = exported.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return _Translation(dims, inputs, weights).program(exported.graph)


class _Translation:
    """One pass over the graph; `names` maps its nodes to our value names, or to a list of them for several results."""

    def __init__(self, dims: dict[str, int], inputs: dict[str, str], weights: dict[str, str]) -> None:
        self.dims, self.input_dims, self.weight_names = dims, inputs, weights
        self.names: dict[Node, Any] = {}
        self.symbols: dict[str, str] = {}  # the trace's symbol -> our dimension
        self.inputs: dict[str, TensorType] = {}
        self.weights: dict[str, TensorType] = {}
        self.caches: dict[int, KVCache] = {}
        self.ops: list[Op] = []

    def program(self, graph: torch.fx.Graph) -> Program:
        outputs: tuple[str, ...] = ()
        for node in graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                outputs = tuple(self.names[result] for result in node.args[0])
            elif node.target is operator.getitem:
                self.names[node] = self.names[node.args[0]][node.args[1]]
            else:
                self._operator(node)
        caches = tuple(self.caches[index] for index in sorted(self.caches))
        since = max(version_of(op.op, op.inputs, op.attrs) for op in self.ops)
        program = Program(self.dims, self.inputs, self.weights, caches, tuple(self.ops), outputs, opset_version=since)
        program.validate()
        return program

    def _placeholder(self, node: Node) -> None:
        if node.name in self.weight_names:
            name = self.weight_names[node.name]
            self.weights[name] = self._type(node.meta["val"])
        else:
            name = node.name
            self.symbols[str(node.meta["val"].shape[0])] = self.input_dims[name]
            self.inputs[name] = self._type(node.meta["val"])
        self.names[node] = name

    def _operator(self, node: Node) -> None:
        namespace, _, name = (
            node.target._schema.name.partition("::") if hasattr(node.target, "_schema") else ("", "", "")
        )
        spec = OPERATORS.get(name) if namespace == "enginehouse" else None
        if spec is None:
            raise Internal(f"the decoder uses {node.target}, which is no operator of ours", reason="OPERATOR_UNKNOWN")
        tensors, values = node.args[: len(spec.inputs)], node.args[len(spec.inputs) :]
        attrs: dict[str, Any] = {
            attr: list(value) if kind is list else value  # type: ignore[arg-type]
            for (attr, kind), value in zip(spec.attrs.items(), values, strict=True)
            if attr not in spec.later or value != spec.later[attr][1]
        }
        while spec.inputs[len(tensors) - 1].rstrip("?") in spec.later and tensors[-1] is None:
            tensors = tensors[:-1]
        results = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
        single = len(results) == 1 and not spec.variadic
        names = [f"v{len(self.ops)}" if single else f"v{len(self.ops)}.{index}" for index in range(len(results))]
        self.names[node] = names[0] if single else names
        if "cache" in spec.attrs:
            keys = tensors[1].meta["val"]  # type: ignore[union-attr]
            heads = keys.shape[1] // attrs["head_dim"]
            self.caches[attrs["cache"]] = KVCache(heads, attrs["head_dim"], self._type(keys).dtype)
        self.ops.append(
            Op(
                name,
                tuple("" if tensor is None else self.names[tensor] for tensor in tensors),  # type: ignore[index]
                tuple(Value(made, self._type(result)) for made, result in zip(names, results, strict=True)),
                attrs,
            )
        )

    def _type(self, value: torch.Tensor) -> TensorType:
        shape = tuple(int(size) if isinstance(size, int) else self.symbols[str(size)] for size in value.shape)
        return TensorType(str(value.dtype).removeprefix("torch."), shape)  # type: ignore[arg-type]
