"""Operators that a device has beside the set's own, and programs that use them: what stands side by side is one kernel."""

from collections import Counter

import msgspec

from engine.opset import OPERATORS, Operator
from engine.program import Op, Program

DEVICE_OPERATORS = {
    "rope_attention": Operator(
        ("q", "k", "v", "cos", "sin", "alibi?"),
        attrs={**OPERATORS["attention"].attrs, "interleaved": bool},
        uses_step=True,
    ),
    "linear_silu_mul": Operator(OPERATORS["linear"].inputs),
}
"""rope_attention: `rope` of q and of k, then `attention`. linear_silu_mul: `linear`, then `silu_mul`."""


def fuse(program: Program) -> Program:
    """The program with operators whose results nobody else reads drawn into the one that does."""
    readers = Counter(name for op in program.ops for name in op.inputs)
    readers.update(program.outputs)
    makers = {value.name: op for op in program.ops for value in op.outputs if readers[value.name] == 1}
    gone: set[int] = set()
    ops = []
    for op in program.ops:
        drawn_in, fused = _PATTERNS.get(op.op, _as_it_is)(op, makers)
        gone |= {id(one) for one in drawn_in}
        ops.append((op, fused))
    return msgspec.structs.replace(program, ops=tuple(fused for op, fused in ops if id(op) not in gone))


def _as_it_is(op: Op, makers: dict[str, Op]) -> tuple[tuple[Op, ...], Op]:  # noqa: ARG001  (a pattern's)
    return (), op


def _rope_attention(op: Op, makers: dict[str, Op]) -> tuple[tuple[Op, ...], Op]:
    q, k = (makers.get(name) for name in op.inputs[:2])
    if not (q and k and q.op == k.op == "rope" and q.inputs[1:] == k.inputs[1:] and q.attrs == k.attrs):
        return (), op
    attrs = {"soft_cap": 0.0, **op.attrs, "interleaved": q.attrs["interleaved"]}
    inputs = (q.inputs[0], k.inputs[0], op.inputs[2], *q.inputs[1:], *(op.inputs[3:] or ("",)))
    return (q, k), msgspec.structs.replace(op, op="rope_attention", inputs=inputs, attrs=attrs)


def _linear_silu_mul(op: Op, makers: dict[str, Op]) -> tuple[tuple[Op, ...], Op]:
    product = makers.get(op.inputs[0])
    if product is None or product.op != "linear":
        return (), op
    return (product,), msgspec.structs.replace(op, op="linear_silu_mul", inputs=product.inputs)


_PATTERNS = {"attention": _rope_attention, "silu_mul": _linear_silu_mul}
