"""`program.json`: a model's computation as a typed, flat list of operators in single-assignment form.

It is data. Nothing in it is evaluated, and reading it needs no torch. A value is named once: as an input, a weight or the
output of one operator; operators stand in an order in which every name is defined before it is used.
"""

import math
from typing import Literal

import msgspec

from engine.errors import InvalidArgument
from engine.opset import OPERATORS, OPSET_VERSION, PACKED, attr_problem, packed_inputs, version_of

SCHEMA_VERSION = 1

ROPE_LENGTHS = "rope_lengths"
"""The input of programs whose rotary frequencies depend on how long a sequence is, int32 [num_tokens].

For each token how long its sequence was or will be when its key is written: the prompt, or up to this token where that is more.
Where a longer sequence needs other keys (`long_rope_table`), every length beyond `original` once it has that many tokens, because
its keys are computed again then.
"""

DType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int64", "int8", "uint8"]

ITEM_SIZE: dict[str, int] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4, "int64": 8, "int8": 1, "uint8": 1,
}  # fmt: skip


class TensorType(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dtype and a shape, whose dimensions are numbers or names of `Program.dims`."""

    dtype: DType
    shape: tuple[int | str, ...]

    @property
    def size(self) -> int:
        """Elements of a tensor whose dimensions are all numbers."""
        return math.prod(int(dim) for dim in self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor whose dimensions are all numbers."""
        return self.size * ITEM_SIZE[self.dtype]


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor that an operator makes."""

    name: str
    type: TensorType


class KVCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one attention operator keeps of a token: K and V of shape [num_kv_heads, head_dim] each.

    They have the dtype of its keys, or float8_e4m3fn, or int8 with its attribute kv_int8, in units of k_scale and v_scale.
    """

    num_kv_heads: int
    head_dim: int
    dtype: DType

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V together."""
        return 2 * self.num_kv_heads * self.head_dim * ITEM_SIZE[self.dtype]


class Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One application of an operator; an optional input that is left out is the empty name."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, int | float | bool | list[int]] = {}


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The computation of one step on one rank.

    Attributes:
        dims: named dimension -> its largest value.
        inputs: the tensors that a runner gives: token_ids int32 [num_tokens], positions int32 [num_tokens],
            logit_indices int32 [num_logits], the rows whose logits are wanted, and ROPE_LENGTHS where it is used. Attention's
            view of the batch (which token belongs to which sequence, where its keys lie) is the runner's and has no name in
            the program.
        weights: name -> type; the engine's safetensors files hold them under the same names.
        caches: the KV caches; attribute "cache" of an attention operator is an index into them.
        outputs: names of the results; the first is the logits [num_logits, vocab_size]. A rank that is not the last of a pipeline
            sends what it makes, and has none.
        opset_version: the first operator set that has all the operators; any later one will do.
    """

    dims: dict[str, int]
    inputs: dict[str, TensorType]
    weights: dict[str, TensorType]
    caches: tuple[KVCache, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION
    opset_version: int = OPSET_VERSION

    def parameters(self) -> dict[str, int]:
        """How many of the model's parameters each weight holds: its elements, or what is packed in them; a scale is none."""
        counts = {name: declared.size for name, declared in self.weights.items()}
        for op in self.ops:
            if op.op in PACKED:
                weight, scales, _, input_scale = packed_inputs(op.op, op.inputs)
                counts[weight] = self.weights[weight].size * PACKED[op.op]
                counts |= dict.fromkeys(filter(None, [*scales, input_scale]), 0)
        return counts

    def to_json(self) -> bytes:
        """Deterministic, readable JSON."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1)

    @staticmethod
    def from_json(data: bytes) -> "Program":
        """Reads and validates.

        Raises:
            InvalidArgument: not a program of this schema, or one that does not hold together; the message says where.
        """
        try:
            program = msgspec.json.decode(data, type=Program)
        except msgspec.MsgspecError as error:
            raise InvalidArgument(f"program.json: {error}", reason="PROGRAM_INVALID") from None
        program.validate()
        return program

    def validate(self) -> None:
        """Raises InvalidArgument unless every name is defined once before its use and every operator fits the set."""
        if self.schema_version != SCHEMA_VERSION or self.opset_version > OPSET_VERSION:
            raise _invalid(
                "versions",
                f"schema {self.schema_version} and operator set {self.opset_version}; "
                f"this release reads schema {SCHEMA_VERSION} and operator sets up to {OPSET_VERSION}",
            )
        types = {**self.inputs, **self.weights}
        if len(types) != len(self.inputs) + len(self.weights):
            raise _invalid("weights", f"{sorted(set(self.inputs) & set(self.weights))} are inputs too")
        for name, declared in types.items():
            self._check_type(name, declared)
        if "" in types:
            raise _invalid("inputs and weights", "the empty name stands for an optional input that is left out")
        defined = set(types)
        for number, op in enumerate(self.ops):
            where = f"ops[{number}] ({op.op})"
            spec = OPERATORS.get(op.op)
            if spec is None or spec.since > self.opset_version:
                known = sorted(name for name, operator in OPERATORS.items() if operator.since <= self.opset_version)
                raise _invalid(where, f"unknown operator; operator set {self.opset_version} has {', '.join(known)}")
            needed = [slot for slot in spec.inputs if slot.rstrip("?") not in spec.later]
            if not len(needed) <= len(op.inputs) <= len(spec.inputs):
                raise _invalid(where, f"{len(op.inputs)} inputs, expected {len(spec.inputs)}: {', '.join(spec.inputs)}")
            for name, slot in zip(op.inputs, spec.inputs, strict=False):
                if name not in defined and not (name == "" and slot.endswith("?")):
                    raise _invalid(where, f"input {slot.rstrip('?')!r} is {name!r}, which is not defined before")
            if not set(spec.attrs) - set(spec.later) <= set(op.attrs) <= set(spec.attrs):
                raise _invalid(where, f"attributes {sorted(op.attrs)}, expected {sorted(spec.attrs)}")
            if (version := version_of(op.op, op.inputs, op.attrs)) > self.opset_version:
                raise _invalid(where, f"used as in operator set {version}, the program says {self.opset_version}")
            for name, value in op.attrs.items():
                if problem := attr_problem(op.op, name, value):
                    raise _invalid(where, problem)
            if spec.variadic and len(op.outputs) != len(op.attrs["sizes"]):  # type: ignore[arg-type]
                raise _invalid(where, f"{len(op.outputs)} outputs, but sizes {op.attrs['sizes']}")
            if not spec.variadic and len(op.outputs) != len(spec.outputs):
                raise _invalid(
                    where, f"{len(op.outputs)} outputs, expected {len(spec.outputs)}: {', '.join(spec.outputs)}"
                )
            if spec.uses_step and not 0 <= int(str(op.attrs["cache"])) < len(self.caches):
                raise _invalid(where, f"cache {op.attrs['cache']}, but there are {len(self.caches)}")
            if spec.uses_step:
                self._check_scales(where, op)
            for made in op.outputs:
                if not made.name or made.name in defined:
                    raise _invalid(where, f"output {made.name!r} is empty or defined twice")
                self._check_type(made.name, made.type)
                defined.add(made.name)
        if not self.outputs and not any(op.op == "send" for op in self.ops):
            raise _invalid("outputs", "there are none")
        for name in self.outputs:
            if name not in defined:
                raise _invalid("outputs", f"{name!r} is not defined")

    def _check_scales(self, where: str, op: Op) -> None:
        """A cache of 8 bits, and no other one, holds keys and values in units of their scales."""
        dtype = self.caches[int(str(op.attrs["cache"]))].dtype
        scales = [float(str(op.attrs.get(name, 0.0))) for name in ("k_scale", "v_scale")]
        small = dtype in ("float8_e4m3fn", "int8")
        if not (all(0 < scale < math.inf for scale in scales) if small else scales == [0, 0]):
            raise _invalid(where, f"k_scale and v_scale are {scales} for a cache of {dtype}")
        if bool(op.attrs.get("kv_int8", False)) != (dtype == "int8"):
            raise _invalid(where, f"kv_int8 is {op.attrs.get('kv_int8', False)} for a cache of {dtype}")

    def _check_type(self, name: str, declared: TensorType) -> None:
        for dim in declared.shape:
            if (isinstance(dim, str) and dim not in self.dims) or (isinstance(dim, int) and dim < 0):
                raise _invalid(name, f"dimension {dim!r} is neither a size nor one of {sorted(self.dims)}")


def _invalid(where: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"program.json: {where}: {problem}", reason="PROGRAM_INVALID")
