"""What a checkpoint that was quantized here says of its weights, in its config.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from builder_svc.models.fields import Fields
from builder_svc.models.packed import Fp8, Int4, Int8, Packed
from engine.errors import InvalidArgument

_FORMS: dict[str, type[Packed]] = {form.operator: form for form in (Int4, Int8, Fp8)}


@dataclass(frozen=True)
class Quantized:
    """Forms and scales of a model's weights.

    Attributes:
        packed: a linear's name -> the form of its weight.
        kv_scales: of keys and of values, for each layer, in a KV cache of 8 bits; empty where it is not quantized.
        kv_int8: such a cache is int8, not float8_e4m3fn.
        facts: how they were made (`quantize/plan.py`).
    """

    packed: Mapping[str, Packed] = field(default_factory=dict)
    kv_scales: tuple[tuple[float, float], ...] = ()
    kv_int8: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `from_dict` makes the same."""
        forms = {name: {"operator": form.operator, **asdict(form)} for name, form in self.packed.items()}
        return {
            "packed": forms,
            "kv_scales": [list(pair) for pair in self.kv_scales],
            "kv_int8": self.kv_int8,
            "facts": dict(self.facts),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str, linears: Mapping[str, int], layers: int) -> "Quantized":
        """Raises InvalidArgument for what does not fit the decoder.

        Args:
            where: what to call it in an error.
            linears: the decoder's, name -> columns.
            layers: how many it has.
        """
        fields = Fields(values, where)
        packed = {name: _form(name, found, where, linears) for name, found in fields.get("packed", dict, {}).items()}
        scales = fields.get("kv_scales", list, [])
        right = all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, float) and one > 0 for one in pair)
            for pair in scales
        )
        if not right or len(scales) not in (0, layers):
            raise _wrong(where, f"'kv_scales' must have two numbers for each of {layers} layers")
        pairs = tuple((pair[0], pair[1]) for pair in scales)
        return Quantized(packed, pairs, fields.get("kv_int8", bool, False), fields.get("facts", dict, {}))


def _form(name: str, values: Any, where: str, linears: Mapping[str, int]) -> Packed:
    try:
        form = _FORMS[values["operator"]](**{key: value for key, value in values.items() if key != "operator"})
        form.tensors(2, linears[name])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise _wrong(
            where, f"'packed' has {name!r}: {values!r}, which is no linear of this model in a known form"
        ) from None
    return form


def _wrong(where: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{where}: {what}: quantize the model again", reason="CONFIG_FIELD_INVALID")
