"""What TensorRT takes for which GPU: looked up before a build, so that it is refused in words, not by an error deep inside."""

from dataclasses import dataclass

from builder_svc.lower.tensorrt.linears import INT4_GROUPS, int4_group
from engine.errors import Unimplemented
from engine.program import ITEM_SIZE, Op, Program
from engine.tensorrt import CAPABILITIES

LEAST = {"float16": "7.5", "float32": "8.0", "bfloat16": "8.0", "int8": "7.5", "int4": "8.0", "fp8": "8.9"}
"""Form of activations or weights -> the first compute capability that takes it."""


@dataclass(frozen=True)
class Target:
    """What a plan is for.

    Attributes:
        flavour: "tensorrt" or "tensorrt_rtx" (`engine.tensorrt.FLAVOURS`).
        capability: compute capability of the GPU, such as "12.0".
    """

    flavour: str
    capability: str

    @property
    def name(self) -> str:
        """Such as "SM120"."""
        return f"SM{self.capability.replace('.', '')}"

    def __str__(self) -> str:
        return f"{self.flavour} for {self.name}"


def attention_form(program: Program, target: Target) -> str:
    """ "packed" where TensorRT has it and no layer needs a mask, else "padded"."""
    masked = any(
        op.op == "attention" and (_alibi(op) or op.attrs["window"] or op.attrs.get("soft_cap")) for op in program.ops
    )
    return "packed" if target.flavour == "tensorrt" and not masked else "padded"


def check(program: Program, target: Target) -> None:
    """Raises Unimplemented unless the target takes every operator in the form that the program has it in.

    The message names the layer, the target and what would do.
    """
    layer = 0
    for op in program.ops:
        where = _layer(op, program) or f"layer {layer}"
        for problem, alternatives in _problems(op, program, target):
            raise Unimplemented(f"{where}: {problem}; {alternatives}", reason="TARGET_UNSUPPORTED")
        layer += op.op == "attention"


def _layer(op: Op, program: Program) -> str:
    weights = [name for name in op.inputs if name in program.weights]
    return f"{op.op} {weights[0].removesuffix('.weight')}" if weights and op.op != "attention" else ""


def _problems(op: Op, program: Program, target: Target) -> list[tuple[str, str]]:
    """(problem, alternatives) of one operator."""
    found = [_too_old(form, target) for form in _forms(op)]
    if op.op in ABSENT:
        what, alternatives = ABSENT[op.op]
        found.append((f"{target} has no {what}", alternatives))
    if op.op == "attention" and ITEM_SIZE[program.caches[int(str(op.attrs["cache"]))].dtype] == 1:
        found.append(
            (f"{target} has no KV cache of 8 bits", "build with kv_cache_dtype 'auto', or with backend 'torch'")
        )
    if op.op == "attention" and op.outputs[0].type.dtype != "float32" and int(str(op.attrs["head_dim"])) % 8:
        heads = f"{target} takes heads of a multiple of 8 in 16 bits, not of {op.attrs['head_dim']}"
        found.append((heads, "choose dtype 'float32', or backend 'torch'"))
    if op.op == "linear_int4":
        found.append(_groups(op, program, target))
    if op.op == "linear_fp8":
        found.append(_blocks(op, program, target))
    return [problem for problem in found if problem]


def _forms(op: Op) -> list[str]:
    """What a product computes with. What lies between products may be float32 everywhere."""
    if op.op != "attention" and not op.op.startswith("linear"):
        return []
    weights = {"linear_int4": "int4", "linear_int8": "int8", "linear_fp8": "fp8"}
    return [str(op.outputs[0].type.dtype), *filter(None, [weights.get(op.op)])]


_PIPELINE = "layer for ranks of a pipeline", "build with pp_size 1 and a larger tp_size, or with backend 'torch'"
ABSENT = {
    "send": _PIPELINE,
    "recv": _PIPELINE,
}
"""Operator -> what there is none of, for any target, and what would do."""


def _too_old(form: str, target: Target) -> tuple[str, str] | None:
    if _number(LEAST[form]) <= _number(target.capability):
        return None
    newer = [f"sm{known.replace('.', '')}" for known in CAPABILITIES if _number(known) >= _number(LEAST[form])]
    taken = [other for other, least in LEAST.items() if _number(least) <= _number(target.capability)]
    return (
        f"{target} takes no {form}",
        f"choose a target of {', '.join(newer)}, or one of {', '.join(taken)} in its place, or backend 'torch'",
    )


def _groups(op: Op, program: Program, target: Target) -> tuple[str, str] | None:
    size = int(str(op.attrs["group_size"]))
    columns = int(program.weights[op.inputs[1]].shape[1]) * 2
    if int4_group(size) and columns % size == 0:
        return None
    groups = ", ".join(map(str, sorted(INT4_GROUPS)))
    return (
        f"{target} takes INT4 in whole groups of {groups} inputs or multiples, not {columns} inputs in groups of {size}",
        f"quantize with groups of {groups}, or choose backend 'torch'",
    )


def _blocks(op: Op, program: Program, target: Target) -> tuple[str, str] | None:
    columns = int(program.weights[op.inputs[1]].shape[1])
    rows, wide = op.attrs["block_rows"], op.attrs["block_columns"]
    if int(str(wide)) >= columns:
        return None
    return (
        f"{target} takes FP8 with a scale a row or one for all, not one for {rows} x {wide} blocks",
        "quantize by channel or by tensor, or choose backend 'torch'",
    )


def _alibi(op: Op) -> bool:
    return len(op.inputs) > 3 and bool(op.inputs[3])


def _number(capability: str) -> float:
    return float(capability)
