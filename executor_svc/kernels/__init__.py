"""Implementations of operators for a device, where they are faster than the reference.

`cpu.py` and `gpu.py` hold functions named like operators, with the reference's signature; the CPU has compiled ones beside them
(`native.py`). A test holds each against the reference on random shapes. What `CudaRunner` does not take runs on the references.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from engine.ops import REFERENCE
from engine.program import Program
from executor_svc.kernels import native, packed
from executor_svc.kernels.expand import expand
from executor_svc.kernels.fuse import DEVICE_OPERATORS


def own(device: str) -> dict[str, Callable[..., Any]]:
    """The implementations over torch that "cpu" or "gpu" has of its own, by operator; others have none."""
    if importlib.util.find_spec(f"{__name__}.{device}") is None:
        return {}
    module = importlib.import_module(f"{__name__}.{device}")
    return {name: getattr(module, name) for name in (*REFERENCE, *DEVICE_OPERATORS) if getattr(module, name, None)}


def implementations(device: str) -> dict[str, Callable[..., Any]]:
    """Operator -> the function to run on "cpu", "gpu" (by Triton, for CudaRunner) or a device of torch (the references)."""
    chosen = {**REFERENCE, **own(device)}
    return {**chosen, **native.operators(chosen)} if device == "cpu" and native.available else chosen


def unpack(device: str, program: Program, weights: dict[str, Tensor]) -> tuple[Program, dict[str, Tensor]]:
    """The program and its weights with what the device has no operators for in a form that it has.

    On the CPU that is a packed product which the compiled operators do not take: linear_fp8, activations of float16, groups
    that are no multiples of 8. Its matrix is made once, in the dtype of the activations, and multiplied by linear, as fast as a
    dense engine's and from as much memory. On GPUs there are kernels, or the references make each matrix again at every step.
    """
    return expand(program, weights, packed.stays_packed(program)) if device == "cpu" else (program, weights)


def prepare(device: str, program: Program, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The weights as the device's operators take them, in the memory where they are: once, after loading."""
    return native.pack(program, weights) if device == "cpu" and native.available else weights
