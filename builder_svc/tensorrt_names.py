"""Names of TensorRT-LLM's options that have no counterpart here, so that scripts which give them run, or learn why they can't."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from engine.errors import Unimplemented

Type = TypeVar("Type", bound=type)


def also_takes(
    ignored: Collection[str] = (), off: Mapping[str, Any] | None = None, aliases: Mapping[str, str] | None = None
) -> Callable[[Type], Type]:
    """A class decorator: the constructor takes further keywords, and a dataclass that is not frozen these attributes.

    Args:
        ignored: options that change no result, whose values are not looked at.
        off: options that would change the result -> the value that means that they are not used, or a tuple of such values;
            None is one, too. Any other raises Unimplemented (a NotImplementedError).
        aliases: another name of an attribute -> the attribute.
    """
    unused, other = {name: _values(value) for name, value in (off or {}).items()}, aliases or {}

    def decorate(cls: Type) -> Type:
        construct: Any = cls.__init__  # type: ignore[misc]

        def check(name: str, value: object) -> None:
            if name in unused and value not in unused[name]:
                raise Unimplemented(
                    f"{cls.__name__}: {name} is {value!r}, which this release does not have: leave it out",
                    reason="OPTION_UNSUPPORTED",
                    metadata={"option": name},
                )

        @functools.wraps(construct)
        def __init__(self: Any, *args: Any, **options: Any) -> None:
            for name in [name for name in options if name in ignored or name in unused]:
                check(name, options.pop(name))
            for alias, name in other.items():
                if alias in options:
                    options.setdefault(name, options.pop(alias))
            construct(self, *args, **options)

        cls.__init__ = __init__  # type: ignore[misc]
        for alias, name in other.items():
            setattr(cls, alias, _alias(name))
        if dataclasses.is_dataclass(cls) and not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            _guard(cls, frozenset(ignored) | frozenset(unused), check)
        cls.IGNORED, cls.OFF = frozenset(ignored), dict(off or {})  # type: ignore[attr-defined]
        return cls

    return decorate


def _guard(cls: type, taken: frozenset[str], check: Callable[[str, object], None]) -> None:
    """Attributes may be set and read like the constructor's keywords, and no others."""

    def __setattr__(self: Any, name: str, value: object) -> None:
        if name in taken:
            check(name, value)
        elif name in cls.__dataclass_fields__ or isinstance(getattr(cls, name, None), property):  # type: ignore[attr-defined]
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"{cls.__name__} has no {name!r}")

    def __getattr__(_self: Any, name: str) -> Any:
        if name in taken:
            return None
        raise AttributeError(f"{cls.__name__} has no {name!r}")

    cls.__setattr__, cls.__getattr__ = __setattr__, __getattr__  # type: ignore[assignment,method-assign,attr-defined]


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


def _values(value: object) -> tuple[object, ...]:
    return (None, *(value if isinstance(value, tuple) else (value,)))


class PluginConfig:
    """TensorRT's plugins: any setting is taken, and none has an effect.

    Example:
        >>> from enginehouse import BuildConfig
        >>> BuildConfig().plugin_config.gemm_plugin = "auto"
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Takes it."""

    def __getattr__(self, name: str) -> None:
        """None: it was not kept."""
        if name.startswith("__"):  # what Python itself asks for, such as to copy it
            raise AttributeError(name)
