"""Implementations of operators for a device, where they are faster than the reference.

A module here named like a device kind holds functions named like operators, with the reference's signature. A test holds
each against the reference on random shapes.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from engine.ops import REFERENCE


def own(device: str) -> dict[str, Callable[..., Any]]:
    """The implementations that a device kind has of its own, by operator."""
    if importlib.util.find_spec(f"{__name__}.{device}") is None:
        return {}
    module = importlib.import_module(f"{__name__}.{device}")
    return {name: getattr(module, name) for name in REFERENCE if getattr(module, name, None)}


def implementations(device: str) -> dict[str, Callable[..., Any]]:
    """Operator -> the function to run on a device kind."""
    return {**REFERENCE, **own(device)}
