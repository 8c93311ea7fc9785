"""What a quantization_config says, and the fields that several formats share."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from builder_svc.checkpoint.quantized.layers import Integers, Scheme
from builder_svc.models.fields import Fields
from engine.errors import InvalidArgument, Unimplemented

GROUP_SIZES = "-1 (a scale a row) or a positive number"


@dataclass(frozen=True)
class Method:
    """A quantization config that has been understood.

    Attributes:
        name: quant_method.
        facts: what the engine's identity says of it.
        scheme: a module's name -> how its linear is stored where it is quantized; None where the config names none.
        markers: last names of tensors that tell a quantized layer.
        excluded: modules that are not quantized, as the config names them: in whole, by their first or last names, or with *.
        files: what was read beside config.json.
    """

    name: str
    facts: dict[str, Any]
    scheme: Callable[[str], Scheme | None]
    markers: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def planned(self, module: str) -> Scheme | None:
        """How a module is stored as far as the config alone tells. The tensors of a checkpoint know better."""
        return None if any(names_module(pattern, module) for pattern in self.excluded) else self.scheme(module)


def compiled(config: Fields, pattern: str) -> re.Pattern[str]:
    """A regular expression of a config. Raises InvalidArgument for what is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InvalidArgument(
            f"{config.where}: {pattern!r} is no regular expression ({error}): take the file that belongs to these weights",
            reason="CONFIG_FIELD_INVALID",
        ) from None


def texts(config: Fields, field: str) -> list[str]:
    """A list of texts, by default empty. Raises InvalidArgument for one of anything else."""
    found = config.get(field, list, [])
    if not all(isinstance(text, str) for text in found):
        raise InvalidArgument(
            f"{config.where}: {field!r} is {found!r}, expected names of modules", reason="CONFIG_FIELD_INVALID"
        )
    return found


def names_module(pattern: str, module: str) -> bool:
    """Whether a config means a module by this: in whole, by its first or last names, or with *."""
    return f".{pattern}." in f".{module}." or fnmatchcase(module, pattern)


def said(layer: Integers) -> dict[str, Any]:
    """The usual facts."""
    return {"bits": layer.bits, "group_size": layer.group_size or -1, "symmetric": layer.symmetric}


def one_of(config: Fields, field: str, supported: tuple[Any, ...], default: Any = None) -> Any:
    """A field whose value must be one of these; required without a default.

    Raises:
        Unimplemented: another value; the message says it, and what is supported.
        InvalidArgument: none, or one of another type.
    """
    if default is None or config.values.get(field) is not None:
        value = config.require(field, type(supported[0]))
    else:
        value = default
    if value not in supported:
        raise unsupported(config, f"{field} {value!r}", supported)
    return value


def unsupported(config: Fields, what: str, supported: tuple[Any, ...] | str) -> Unimplemented:
    """What is to be raised of a value that we do not read."""
    listed = supported if isinstance(supported, str) else ", ".join(map(str, supported))
    return Unimplemented(
        f"{config.where}: {what} is not supported; supported: {listed}", reason="QUANTIZATION_UNSUPPORTED"
    )


def group_size(config: Fields, default: int | None = None) -> int:
    """The field of that name; 0 where a row is one group, which configs write as -1."""
    value = config.require("group_size", int) if default is None else config.get("group_size", int, default)
    if value != -1 and value < 1:
        raise unsupported(config, f"group_size {value}", GROUP_SIZES)
    return max(value, 0)
