"""A program becomes a network: operator after operator, each by its handler."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from builder_svc.lower.tensorrt import linears, operators, rope
from builder_svc.lower.tensorrt.attention import Packed, Padded
from builder_svc.lower.tensorrt.lowered import (
    BATCH,
    BORDERS,
    LOGITS,
    SEQ,
    TOKENS,
    IoSpec,
    LoweredNetwork,
    Port,
    Profile,
)
from builder_svc.lower.tensorrt.net import Net, Weight
from builder_svc.lower.tensorrt.targets import Target, attention_form, check
from engine.errors import Internal
from engine.manifest import Limits
from engine.program import Op, Program
from engine.tensorrt import PROMPT_ROWS, failed, logger
from engine.tensorrt import capacity as slot_capacity

HANDLERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        operators.embedding, operators.embedding_shard, operators.rms_norm, operators.add_rms_norm, operators.head_rms_norm,
        operators.layer_norm, operators.add_layer_norm, operators.head_layer_norm, operators.silu_mul, operators.gelu,
        operators.gelu_mul, operators.sigmoid_mul, operators.experts, operators.add, operators.scale, operators.soft_cap,
        operators.split, operators.gather, operators.all_reduce, operators.all_gather, linears.linear, linears.linear_int4,
        linears.linear_int8, linears.linear_fp8, rope.rope_table, rope.long_rope_table, rope.dynamic_rope_table, rope.rope,
    )
}  # fmt: skip
"""Operator -> its handler, which takes what the operator's reference takes, of a Net. `attention` is its AttentionIO's."""


def lower(
    program: Program, constants: Mapping[str, Tensor], trt: Any, target: Target, limits: Limits, ranks: int = 1
) -> LoweredNetwork:
    """The program as a network of TensorRT's native layers.

    Args:
        constants: the program's weights by name. Their memory is the network's: nothing is copied that can stay as it is.
        trt: the module of the target's flavour (`engine.tensorrt.load`).
        limits: of a step and a sequence.
        ranks: of the tensor-parallel group that the program is one rank's of.

    Raises:
        Unimplemented: the target does not take a form that the program has (`targets.check`).
        Internal: TensorRT refuses a layer that the table takes.
    """
    check(program, target)
    builder = trt.Builder(logger(trt))
    network = builder.create_network(0)
    if network is None:
        raise failed(trt, "to make a network")
    net = Net(trt, network)
    capacity = slot_capacity(limits.max_seq_len)
    form = attention_form(program, target)
    attention = (Packed if form == "packed" else Padded)(program, capacity)
    handlers = HANDLERS | {
        "attention": attention.attend,
        "all_reduce": partial(operators.all_reduce, ranks=ranks),
        "all_gather": partial(operators.all_gather, ranks=ranks),
        "rope_table": partial(rope.rope_table, capacity=capacity),
        "long_rope_table": partial(rope.long_rope_table, capacity=capacity),
    }
    values: dict[str, Any] = {name: Weight(name, constants[name]) for name in program.weights}
    values |= attention.inputs(net)
    for number, op in enumerate(program.ops):
        net.where = f"ops.{number} {op.op}"
        results = _applied(net, handlers[op.op], op, values)
        for value, result in zip(op.outputs, results, strict=True):
            _check_type(net, value.type.dtype, result)
            values[value.name] = result
    outputs = []
    for name in program.outputs:
        made = net.cast(values[name], torch.float32)
        net.output("logits", made)
        outputs.append(Port("logits", "float32", (LOGITS, int(made.shape[1]))))
    caches = tuple(attention.cache_ports)
    news = [Port(f"{port.name}.new", port.dtype, port.shape) for port in caches]
    spec = IoSpec(form, capacity, attention.ports + caches, (*outputs, *news))
    return LoweredNetwork(network, net.constants, spec, attention.aliases, _profiles(form, limits), builder)


def _applied(net: Net, handler: Callable[..., Any], op: Op, values: Mapping[str, Any]) -> tuple[Any, ...]:
    inputs = [values[name] if name else None for name in op.inputs]
    made = handler(net, *inputs, **op.attrs)
    if isinstance(made, rope.RopeTable):  # in place of both results
        return made, made
    return made if isinstance(made, tuple) else (made,)


def _check_type(net: Net, dtype: str, result: Any) -> None:
    """What a handler makes has the dtype that the program says."""
    if not isinstance(result, rope.RopeTable) and net.torch_dtypes[result.dtype] != getattr(torch, dtype):
        raise Internal(f"{net.where} makes {result.dtype}, the program says {dtype}", reason="LOWERING_WRONG")


def _profiles(form: str, limits: Limits) -> tuple[Profile, ...]:
    """Prompts, one row of many tokens; and decodes, many rows of one, at least 2: fixed at 1 they bring the weights again."""
    rows, tokens = max(2, limits.max_batch_size), limits.max_num_tokens
    longest = min(tokens, limits.max_seq_len)
    usual = max(1, rows // 4)

    def dims(batch: tuple[int, int, int], seq: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
        sums = tuple(min(max(tokens, rows), few * many) for few, many in zip(batch, seq, strict=True))
        logits = (1, batch[1], batch[2] + min(tokens, PROMPT_ROWS))
        found: dict[str, Any] = {BATCH: batch, LOGITS: logits}
        if form == "padded":
            return found | {SEQ: seq}
        return found | {TOKENS: sums, BORDERS: tuple(size + 1 for size in batch)}

    prefill = (1, 1, 1) if form == "padded" else (1, usual, rows)
    decode = (1, usual, rows)
    return (
        Profile("prefill", dims(prefill, (1, max(1, longest // 4), longest))),
        Profile("decode", dims(decode, (1, 1, 1))),
    )
