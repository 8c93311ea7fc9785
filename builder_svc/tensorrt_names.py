"""Names of TensorRT-LLM's options that have no counterpart here, so that scripts which give them run, or learn why they can't."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from engine.errors import Unimplemented

Type = TypeVar("Type", bound=type)


def also_takes(
    ignored: Collection[str] = (), off: Mapping[str, Any] | None = None, aliases: Mapping[str, str] | None = None
) -> Callable[[Type], Type]:
    """A class decorator: the constructor takes further keywords.

    Args:
        ignored: options that change no result, whose values are not looked at.
        off: options that would change the result -> the value that means that they are not used, which is taken like None;
            any other raises Unimplemented (a NotImplementedError).
        aliases: another name of an attribute -> the attribute.
    """
    unused, other = off or {}, aliases or {}

    def decorate(cls: Type) -> Type:
        construct: Any = cls.__init__  # type: ignore[misc]

        @functools.wraps(construct)
        def __init__(self: Any, *args: Any, **options: Any) -> None:
            for name in [name for name in options if name in ignored or name in unused]:
                value = options.pop(name)
                if name in unused and value is not None and value != unused[name]:
                    raise Unimplemented(
                        f"{cls.__name__}: {name} is {value!r}, which this release does not have: leave it out",
                        reason="OPTION_UNSUPPORTED",
                        metadata={"option": name},
                    )
            for alias, name in other.items():
                if alias in options:
                    options.setdefault(name, options.pop(alias))
            construct(self, *args, **options)

        cls.__init__ = __init__  # type: ignore[misc]
        for alias, name in other.items():
            setattr(cls, alias, _alias(name))
        cls.IGNORED, cls.OFF = frozenset(ignored), dict(unused)  # type: ignore[attr-defined]
        return cls

    return decorate


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


class PluginConfig:
    """TensorRT's plugins: any setting is taken, and none has an effect.

    Example:
        >>> from enginehouse import BuildConfig
        >>> BuildConfig().plugin_config.gemm_plugin = "auto"
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Takes it."""
