"""Operators that a device has beside the set's own, and programs that use them: what stands side by side is one kernel."""

from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from engine.opset import FLOATS, OPERATORS, Operator, packed_inputs, quantizes_input
from engine.program import DType, Op, Program, TensorType, Value

_Pattern = Callable[[Op, dict[str, Op]], tuple[tuple[Op, ...], Op]]

QUANTIZED = ("q", "scales")

DEVICE_OPERATORS = {
    "rope_attention": Operator(
        ("q", "k", "v", "cos", "sin", "alibi?"),
        attrs={**OPERATORS["attention"].attrs, "interleaved": bool},
        uses_step=True,
    ),
    "linear_silu_mul": Operator(OPERATORS["linear"].inputs),
    "all_reduce_add_rms_norm": OPERATORS["add_rms_norm"],
}
for _kind in ("fp8", "int8"):
    DEVICE_OPERATORS |= {
        f"quantize_{_kind}": Operator(("x", "input_scale?"), QUANTIZED),
        f"rms_norm_{_kind}": Operator(("x", "weight", "input_scale?"), QUANTIZED, {"eps": float}),
        **dict.fromkeys(
            (f"add_rms_norm_{_kind}", f"all_reduce_add_rms_norm_{_kind}"),
            Operator(("x", "residual", "weight", "input_scale?"), (*QUANTIZED, "sum"), {"eps": float}),
        ),
        f"silu_mul_{_kind}": Operator(("gate_up", "input_scale?"), QUANTIZED),
        f"product_{_kind}": Operator(("q", "q_scales", "weight", "scales", "bias?"), attrs={"dtype": int}),
    }
"""rope_attention: `rope` of q and of k, then `attention`. linear_silu_mul: `linear`, then `silu_mul`.
all_reduce_add_rms_norm: `all_reduce`, then `add_rms_norm` of the sum and the residual. product_fp8: `linear_fp8`
of what `quantize_fp8` has made of its input, in dtype FLOATS[dtype]; another operator X, as X_fp8, leaves the quantized form of
its first result alone. X_int8 likewise."""


def fuse(program: Program, *, sums: bool = False) -> Program:
    """The program in the device's operators, where it has what they stand for.

    Args:
        sums: whether there are those that sum over the tensor-parallel group.
    """
    return _quantize_where_made(_draw_in(program, _SUMS if sums else _PATTERNS))


def _draw_in(program: Program, patterns: Mapping[str, _Pattern]) -> Program:
    """Operators whose results nobody else reads, drawn into the one that does."""
    readers = Counter(name for op in program.ops for name in op.inputs)
    readers.update(program.outputs)
    makers = {value.name: op for op in program.ops for value in op.outputs if readers[value.name] == 1}
    gone: set[int] = set()
    ops = []
    for op in program.ops:
        drawn_in, fused = patterns.get(op.op, _as_it_is)(op, makers)
        gone |= {id(one) for one in drawn_in}
        ops.append((op, fused))
    return msgspec.structs.replace(program, ops=tuple(fused for op, fused in ops if id(op) not in gone))


def _as_it_is(op: Op, makers: dict[str, Op]) -> tuple[tuple[Op, ...], Op]:  # noqa: ARG001  (a pattern's)
    return (), op


def _rope_attention(op: Op, makers: dict[str, Op]) -> tuple[tuple[Op, ...], Op]:
    q, k = (makers.get(name) for name in op.inputs[:2])
    if not (q and k and q.op == k.op == "rope" and q.inputs[1:] == k.inputs[1:] and q.attrs == k.attrs):
        return (), op
    attrs = {**op.attrs, "interleaved": q.attrs["interleaved"]}
    inputs = (q.inputs[0], k.inputs[0], op.inputs[2], *q.inputs[1:], *(op.inputs[3:] or ("",)))
    return (q, k), msgspec.structs.replace(op, op="rope_attention", inputs=inputs, attrs=attrs)


def _linear_silu_mul(op: Op, makers: dict[str, Op]) -> tuple[tuple[Op, ...], Op]:
    product = makers.get(op.inputs[0])
    if product is None or product.op != "linear":
        return (), op
    return (product,), msgspec.structs.replace(op, op="linear_silu_mul", inputs=product.inputs)


def _all_reduce_add_rms_norm(op: Op, makers: dict[str, Op]) -> tuple[tuple[Op, ...], Op]:
    total = makers.get(op.inputs[0])
    if total is None or total.op != "all_reduce":
        return (), op
    inputs = (*total.inputs, *op.inputs[1:])
    return (total,), msgspec.structs.replace(op, op="all_reduce_add_rms_norm", inputs=inputs)


_PATTERNS: dict[str, _Pattern] = {"attention": _rope_attention, "silu_mul": _linear_silu_mul}
_SUMS: dict[str, _Pattern] = {**_PATTERNS, "add_rms_norm": _all_reduce_add_rms_norm}


def rounds_to(op: Op | None, program: Program) -> str:
    """Of a product that rounds its input and has a scale for each row of its weight, to what: "fp8" or "int8"; else ""."""
    if op is None or op.op not in ("linear_fp8", "linear_int8") or not quantizes_input(op.op, op.inputs, op.attrs):
        return ""
    if op.op == "linear_int8":
        return "int8"
    blocks = (op.attrs["block_rows"], op.attrs["block_columns"])
    return "fp8" if blocks == (1, program.weights[op.inputs[1]].shape[1]) else ""


def _quantize_where_made(program: Program) -> Program:
    """Each such product as one of 8 bits, whose input is quantized once, by the operator that makes it where it can."""
    readers = _readers(program)
    types = {value.name: value.type for op in program.ops for value in op.outputs}
    ops: list[Op] = []
    made: set[tuple[str, str, str]] = set()  # values that are there in 8 bits, of which kind, and by which scale
    for op in program.ops:
        if kind := rounds_to(op, program):
            weight, scales, bias, by = packed_inputs(op.op, op.inputs)
            x = op.inputs[0]
            if (x, kind, by) not in made:
                made.add((x, kind, by))
                ops.append(Op(f"quantize_{kind}", (x, by), _quantized(x, kind, by, types[x])))
            q, q_scales = _names(x, kind, by)
            attrs: dict[str, int | float | bool | list[int]] = {"dtype": FLOATS.index(op.outputs[0].type.dtype)}
            ops.append(Op(f"product_{kind}", (q, q_scales, weight, *scales, bias), op.outputs, attrs))
            continue
        if not op.outputs:  # it sends to another rank
            ops.append(op)
            continue
        y = op.outputs[0]
        wanted = {
            (kind, _scale(reader)) if reader and (kind := rounds_to(reader, program)) else ("", "")
            for reader in readers.get(y.name, [])
        }
        kind, by = wanted.pop() if len(wanted) == 1 else ("", "")
        if kind and f"{op.op}_{kind}" in DEVICE_OPERATORS:
            made.add((y.name, kind, by))
            outputs = (*_quantized(y.name, kind, by, y.type), *op.outputs[1:])
            op = Op(f"{op.op}_{kind}", (*op.inputs, by), outputs, op.attrs)
        ops.append(op)
    return msgspec.structs.replace(program, ops=tuple(ops))


def _scale(product: Op) -> str:
    return packed_inputs(product.op, product.inputs)[3]


def _names(x: str, kind: str, by: str) -> tuple[str, str]:
    return f"{x} in {kind} {by}", f"{x} {kind} scales {by}"


def _quantized(x: str, kind: str, by: str, whole: TensorType) -> tuple[Value, Value]:
    q, scales = _names(x, kind, by)
    dtype: DType = "int8" if kind == "int8" else "float8_e4m3fn"
    return Value(q, TensorType(dtype, whole.shape)), Value(scales, TensorType("float32", (whole.shape[0], 1)))


def _readers(program: Program) -> dict[str, list[Op | None]]:
    """Value -> the operators that read it, each as often as it does; None for the program's output."""
    found: dict[str, list[Op | None]] = {name: [None] for name in program.outputs}
    for op in program.ops:
        for name in op.inputs:
            found.setdefault(name, []).append(op)
    return found
