"""The operator set as data: what a program may say. No torch here; `engine/ops.py` gives each operator its meaning.

A program that validates against this table runs on every executor with at least its `opset_version`.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

OPSET_VERSION = 5

FLOATS = ("float32", "bfloat16", "float16")
"""The dtypes of activations, by the number that attribute `dtype` of recv is."""


@dataclass(frozen=True)
class Operator:
    """The signature of one operator.

    Attributes:
        inputs: names of the tensor inputs in order; a trailing "?" marks an optional one, which a program leaves out
            by the empty name "".
        outputs: names of the results; ("*",) for a list with a result for each entry of attribute "sizes".
        since: the version of the set that the operator came with. Additions raise OPSET_VERSION and old programs stay valid.
        later: attribute, or optional input at the end, that came after the operator: the version of the set that brought it, and
            the value that a program means which leaves it out.
        uses_step: whether it takes the runner's view of the step (`engine.ops.Step`) as keyword `step`.
        uses_group: whether it takes the ranks that run the model together (`engine.ops.Group`) as keyword `group`: the same
            ones for every step, so that an executor binds them when it chooses its implementations.
        attrs: attribute name -> its type; int, float, bool or list (of int). All are given but those of `later`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("y",)
    attrs: dict[str, type] = field(default_factory=dict)
    uses_step: bool = False
    uses_group: bool = False
    since: int = 1
    later: dict[str, tuple[int, Any]] = field(default_factory=dict)

    @property
    def variadic(self) -> bool:
        """Whether it makes a list of results."""
        return self.outputs == ("*",)


OPERATORS: dict[str, Operator] = {
    "embedding": Operator(("token_ids", "weight")),
    "linear": Operator(("x", "weight", "bias?")),
    "linear_int4": Operator(("x", "weight", "scales", "zeros?", "bias?"), attrs={"group_size": int}, since=2),
    "linear_int8": Operator(
        ("x", "weight", "scales", "bias?", "input_scale?"),
        attrs={"per_token": bool},
        since=2,
        later={"input_scale": (5, ""), "per_token": (5, False)},
    ),
    "linear_fp8": Operator(
        ("x", "weight", "scales", "bias?", "input_scale?"),
        attrs={"block_rows": int, "block_columns": int, "per_token": bool},
        since=2,
        later={"input_scale": (3, ""), "per_token": (3, False)},
    ),
    "rms_norm": Operator(("x", "weight"), attrs={"eps": float}),
    "add_rms_norm": Operator(("x", "residual", "weight"), ("y", "sum"), {"eps": float}),
    "layer_norm": Operator(("x", "weight", "bias?"), attrs={"eps": float}, since=2),
    "add_layer_norm": Operator(("x", "residual", "weight", "bias?"), ("y", "sum"), {"eps": float}, since=2),
    "head_rms_norm": Operator(("x", "weight"), attrs={"eps": float}, since=2),
    "head_layer_norm": Operator(("x", "weight"), attrs={"eps": float}, since=2),
    "rope_table": Operator(("positions", "inv_freq"), ("cos", "sin"), {"scale": float}),
    "long_rope_table": Operator(
        ("positions", "lengths", "inv_freq", "long_inv_freq"),
        ("cos", "sin"),
        {"original": int, "scale": float},
        since=2,
    ),
    "dynamic_rope_table": Operator(
        ("positions", "lengths"),
        ("cos", "sin"),
        {"rotary_dim": int, "theta": float, "factor": float, "original": int},
        since=2,
    ),
    "rope": Operator(("x", "cos", "sin"), attrs={"head_dim": int, "interleaved": bool}),
    "attention": Operator(
        ("q", "k", "v", "alibi?"),
        attrs={
            "cache": int,
            "head_dim": int,
            "scale": float,
            "window": int,
            "soft_cap": float,
            "k_scale": float,
            "v_scale": float,
            "kv_int8": bool,
        },
        uses_step=True,
        later={
            "alibi": (2, ""),
            "soft_cap": (2, 0.0),
            "k_scale": (3, 0.0),
            "v_scale": (3, 0.0),
            "kv_int8": (5, False),
        },
    ),
    "silu_mul": Operator(("gate_up",)),
    "gelu": Operator(("x",), attrs={"tanh": bool}, since=2),
    "gelu_mul": Operator(("gate_up",), attrs={"tanh": bool}, since=2),
    "sigmoid_mul": Operator(("x", "gate"), since=2),
    "experts": Operator(("x", "router_logits", "gate_up", "down"), attrs={"top_k": int, "normalize": bool}, since=2),
    "add": Operator(("x", "y"), since=2),
    "scale": Operator(("x",), attrs={"factor": float}, since=2),
    "soft_cap": Operator(("x",), attrs={"cap": float}, since=2),
    "split": Operator(("x",), ("*",), {"sizes": list}),
    "gather": Operator(("x", "indices")),
    "embedding_shard": Operator(("token_ids", "weight", "first"), since=4),
    "all_reduce": Operator(("x",), uses_group=True, since=4),
    "all_gather": Operator(("x",), uses_group=True, since=4),
    "send": Operator(("x",), (), uses_group=True, since=4),
    "recv": Operator((), attrs={"dtype": int, "size": int}, uses_group=True, since=4),
}

PACKED = {"linear_int4": 2, "linear_int8": 1, "linear_fp8": 1}
"""The operators whose weight is quantized: parameters in each of its elements. The inputs between it and the bias scale it."""


def packed_inputs(op: str, inputs: tuple[str, ...]) -> tuple[str, list[str], str, str]:
    """The weight of a packed operator, what scales it ("" where one is left out), its bias and its input's scale, or ""."""
    named = dict(zip((slot.rstrip("?") for slot in OPERATORS[op].inputs), inputs, strict=False))
    del named["x"]
    bias, input_scale = named.pop("bias"), named.pop("input_scale", "")
    return named.pop("weight"), list(named.values()), bias, input_scale


def quantizes_input(op: str, inputs: tuple[str, ...], attrs: dict[str, Any]) -> bool:
    """Whether a packed operator rounds its input, too: then it is no `linear` with another matrix."""
    return bool(packed_inputs(op, inputs)[3] or attrs.get("per_token"))


def version_of(op: str, inputs: tuple[str, ...], attrs: Collection[str]) -> int:
    """The first operator set that has what this application of an operator uses.

    Args:
        inputs: by position, the names of values; a name that is left out or empty is not used.
        attrs: names of the attributes that are given.
    """
    spec = OPERATORS[op]
    given = {slot.rstrip("?") for slot, name in zip(spec.inputs, inputs, strict=False) if name} | set(attrs)
    return max([spec.since, *(version for name, (version, _) in spec.later.items() if name in given)])


def attr_problem(op: str, name: str, value: Any) -> str | None:
    """What is wrong with an attribute's value, or None. A bool is no int here, an int is no float."""
    kind = OPERATORS[op].attrs[name]
    right = type(value) is kind and (not isinstance(value, list) or all(type(item) is int for item in value))
    return None if right else f"attribute {name!r} of {op} must be {kind.__name__}, not {value!r}"
