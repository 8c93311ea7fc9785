"""Triton's interpreter, less what it does again for each function that a kernel calls."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


def patch_once(interpreter: ModuleType) -> None:
    """A launch patches `triton.language` once for the functions of a module, not at each of their calls."""
    patch, languages = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
    patched: set[frozenset[int]] = set()  # by the launch that runs

    @functools.cache
    def seen(function: Callable[..., Any]) -> frozenset[int]:
        return frozenset(
            at for at, one in enumerate(languages) if any(one is it for it in function.__globals__.values())
        )

    def patch_if_needed(function: Callable[..., Any]) -> Any:
        if seen(function) in patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        if not patched:  # the launch's own, the only one that is undone
            restore = scope.restore
            scope.restore = lambda: (restore(), patched.clear())
        patched.add(seen(function))
        return scope

    interpreter._patch_lang = patch_if_needed
