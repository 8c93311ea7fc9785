"""The library that `csrc/native.c` is compiled to, and the structures that its functions take.

It is not linked with OpenMP, and uses the one that torch has brought: import torch first. $ENGINEHOUSE_NATIVE=0 leaves it out.
"""

import ctypes
import functools
import importlib.machinery
import logging
import os
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (brings OpenMP)

log = logging.getLogger(__name__)

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Linear(ctypes.Structure):
    """`struct linear`."""

    _fields_ = [
        *_fields(_INT, "type weight_type"),
        *_fields(_LONG, "rows inputs outputs stride"),
        *_fields(_POINTER, "x weight bias y order"),
    ]


class Packed(ctypes.Structure):
    """`struct packed`."""

    _fields_ = [
        *_fields(_INT, "type bits scale_type round"),
        *_fields(_LONG, "rows inputs depth outputs stride group"),
        *_fields(_FLOAT, "input_scale"),
        *_fields(_POINTER, "x scales bias weight zeros y"),
    ]


class Norm(ctypes.Structure):
    """`struct norm`."""

    _fields_ = [
        *_fields(_INT, "type weight_type layer"),
        *_fields(_LONG, "rows pieces size stride residual_stride"),
        *_fields(_FLOAT, "eps"),
        *_fields(_POINTER, "x residual weight bias y sum"),
    ]


class Experts(ctypes.Structure):
    """`struct experts`."""

    _fields_ = [
        *_fields(_INT, "type weight_type"),
        *_fields(_LONG, "tokens count top_k hidden size stride"),
        *_fields(_POINTER, "x gate_up down chosen weights y"),
    ]


class Attention(ctypes.Structure):
    """`struct attention`."""

    _fields_ = [
        *_fields(_INT, "type"),
        *_fields(_LONG, "sequences tokens heads groups dim window table_stride q_stride k_stride v_stride"),
        *_fields(_FLOAT, "scale cap"),
        *_fields(_POINTER, "q k v alibi k_cache v_cache y starts contexts slots tables"),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "pack": [_INT, _POINTER, _LONG, _LONG],
    "rows": [_INT, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER],
    "linear": [ctypes.POINTER(Linear)],
    "packed": [ctypes.POINTER(Packed)],
    "norm": [ctypes.POINTER(Norm)],
    "activation": [_INT, _INT, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER],
    "experts": [ctypes.POINTER(Experts)],
    "rope": [_INT, _POINTER, *[_LONG] * 4, _POINTER, _POINTER, _LONG, _INT, _POINTER],
    "choose": [_POINTER, *[_LONG] * 3, *[_POINTER] * 4],
    "forbid": [_POINTER, *[_LONG] * 3, _POINTER],
    "attention": [ctypes.POINTER(Attention)],
}


@functools.cache
def load() -> Any:
    """The library with its functions declared, or None."""
    if os.environ.get("ENGINEHOUSE_NATIVE") == "0":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                for name, types in _SIGNATURES.items():
                    function = getattr(library, f"enginehouse_{name}")
                    function.argtypes, function.restype = types, None
            except (OSError, AttributeError) as error:  # AttributeError: compiled from other sources than these
                log.warning("%s cannot be used, torch's operators are: install again (%s)", path.name, error)
            else:
                return library
    return None
