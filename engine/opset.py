"""The operator set as data: what a program may say. No torch here; `engine/ops.py` gives each operator its meaning.

A program that validates against this table runs on every executor with at least its `opset_version`.
"""

from dataclasses import dataclass, field
from typing import Any

OPSET_VERSION = 1


@dataclass(frozen=True)
class Operator:
    """The signature of one operator.

    Attributes:
        inputs: names of the tensor inputs in order; a trailing "?" marks an optional one, which a program leaves out
            by the empty name "".
        outputs: names of the results; ("*",) for a list with a result for each entry of attribute "sizes".
        since: the version of the set that the operator came with. Additions raise OPSET_VERSION and old programs stay valid.
        uses_step: whether it takes the runner's view of the step (`engine.ops.Step`) as keyword `step`.
        attrs: attribute name -> its type; int, float, bool or list (of int). Every attribute is given, none is implied.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("y",)
    attrs: dict[str, type] = field(default_factory=dict)
    uses_step: bool = False
    since: int = 1

    @property
    def variadic(self) -> bool:
        """Whether it makes a list of results."""
        return self.outputs == ("*",)


OPERATORS: dict[str, Operator] = {
    "embedding": Operator(("token_ids", "weight")),
    "linear": Operator(("x", "weight", "bias?")),
    "rms_norm": Operator(("x", "weight"), attrs={"eps": float}),
    "add_rms_norm": Operator(("x", "residual", "weight"), ("y", "sum"), {"eps": float}),
    "rope_table": Operator(("positions", "inv_freq"), ("cos", "sin"), {"scale": float}),
    "rope": Operator(("x", "cos", "sin"), attrs={"head_dim": int, "interleaved": bool}),
    "attention": Operator(
        ("q", "k", "v"), attrs={"cache": int, "head_dim": int, "scale": float, "window": int}, uses_step=True
    ),
    "silu_mul": Operator(("gate_up",)),
    "split": Operator(("x",), ("*",), {"sizes": list}),
    "gather": Operator(("x", "indices")),
}


def attr_problem(op: str, name: str, value: Any) -> str | None:
    """What is wrong with an attribute's value, or None. A bool is no int here, an int is no float."""
    kind = OPERATORS[op].attrs[name]
    right = type(value) is kind and (not isinstance(value, list) or all(type(item) is int for item in value))
    return None if right else f"attribute {name!r} of {op} must be {kind.__name__}, not {value!r}"
