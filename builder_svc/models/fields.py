"""Reading fields of somebody else's JSON, with errors that name the file and the field."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from engine.errors import InvalidArgument

T = TypeVar("T")

# Beyond what any model has. A config that says more is damaged: it would take minutes and all memory before a tensor is missing.
_MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}
_MOST_ELSE = 2**28


class Fields:
    """A JSON object whose fields are read with their type.

    Args:
        values: the object.
        where: what to call it in an error, such as the path of its file.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def require(self, name: str, kind: type[T]) -> T:
        """The field. Raises InvalidArgument if it is missing, null or of another type; an int will do for a float."""
        if self.values.get(name) is None:
            raise InvalidArgument(
                f"{self.where} has no {name!r}: add it, or take the file that belongs to these weights",
                reason="CONFIG_FIELD_MISSING",
            )
        value = self.values[name]
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**1000 else math.inf
        if type(value) is not kind:
            raise InvalidArgument(
                f"{self.where}: {name!r} is {value!r}, expected {kind.__name__}", reason="CONFIG_FIELD_INVALID"
            )
        if isinstance(value, float) and not math.isfinite(value):  # Python's JSON has NaN and Infinity
            raise InvalidArgument(
                f"{self.where}: {name!r} is {value}, expected a finite number", reason="CONFIG_FIELD_INVALID"
            )
        return value  # type: ignore[no-any-return]

    def get(self, name: str, kind: type[T], default: T) -> T:
        """The field, or the default where it is missing or null."""
        return default if self.values.get(name) is None else self.require(name, kind)

    def size(self, name: str, default: int | None = None) -> int:
        """An int of at least 1, and no more than any model has; required unless there is a default."""
        value = self.require(name, int) if default is None else self.get(name, int, default)
        if value < 1:
            raise InvalidArgument(
                f"{self.where}: {name!r} is {value}, expected at least 1", reason="CONFIG_FIELD_INVALID"
            )
        if value > (most := _MOST.get(name, _MOST_ELSE)):
            raise InvalidArgument(
                f"{self.where}: {name!r} is {value}, expected at most {most}", reason="CONFIG_FIELD_INVALID"
            )
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A float above 0; required unless there is a default."""
        value = self.require(name, float) if default is None else self.get(name, float, default)
        if value <= 0:
            raise InvalidArgument(
                f"{self.where}: {name} is {value:g}, expected more than 0", reason="CONFIG_FIELD_INVALID"
            )
        return value

    def renamed(self, names: Mapping[str, str]) -> "Fields":
        """The same with fields under other names (theirs -> ours), unless ours is there, too."""
        theirs = {ours: self.values[name] for name, ours in names.items() if name in self.values}
        return Fields({**theirs, **self.values}, self.where)

    def filled(self, **defaults: Any) -> "Fields":
        """The same with defaults for fields that are missing or null."""
        given = {name: value for name, value in self.values.items() if value is not None or name not in defaults}
        return Fields({**defaults, **given}, self.where)
