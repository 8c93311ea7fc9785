"""Operators that a device has beside the set's own, and programs that use them: what stands side by side is one kernel."""

import msgspec

from engine.opset import OPERATORS, Operator
from engine.program import Op, Program

DEVICE_OPERATORS = {
    "rope_attention": Operator(
        ("q", "k", "v", "cos", "sin", "alibi?"),
        attrs={**OPERATORS["attention"].attrs, "interleaved": bool},
        uses_step=True,
    )
}
"""rope_attention: `rope` of q and of k, then `attention`."""


def fuse(program: Program) -> Program:
    """The program with each attention, and the two rotations that nobody else reads, as one operator."""
    makers = {value.name: op for op in program.ops for value in op.outputs}
    readers: dict[str, int] = {}
    for op in program.ops:
        for name in op.inputs:
            readers[name] = readers.get(name, 0) + 1
    gone: set[int] = set()
    fused: dict[int, Op] = {}
    for op in program.ops:
        if op.op != "attention":
            continue
        q, k = (makers.get(name) for name in op.inputs[:2])
        if not (q and k and q.op == k.op == "rope" and q.inputs[1:] == k.inputs[1:] and q.attrs == k.attrs):
            continue
        if any(readers[name] != 1 for name in op.inputs[:2]):
            continue
        gone |= {id(q), id(k)}
        attrs = {"soft_cap": 0.0, **op.attrs, "interleaved": q.attrs["interleaved"]}
        inputs = (q.inputs[0], k.inputs[0], op.inputs[2], *q.inputs[1:], *(op.inputs[3:] or ("",)))
        fused[id(op)] = msgspec.structs.replace(op, op="rope_attention", inputs=inputs, attrs=attrs)
    ops = tuple(fused.get(id(op), op) for op in program.ops if id(op) not in gone)
    return msgspec.structs.replace(program, ops=ops)
