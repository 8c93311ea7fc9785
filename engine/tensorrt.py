"""TensorRT: its packages, imported when they are used, and what whoever builds a plan and whoever runs it agree upon.

A plan's inputs are token_ids, positions (and what else the program takes), write_index and kv_lengths, one a row, and
logit_indices, all int32, and the caches [rows, heads, capacity, head_dim]; its outputs are logits float32, and the caches again,
in place. With query_lengths [rows + 1] the tokens of all rows stand one after another; without it they are [rows, tokens].
"""

import importlib
import importlib.util
import logging
import re
from typing import Any

from engine.errors import FailedPrecondition, Internal, InvalidArgument

FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""What plans are made with, by the backend's name: TensorRT for the GPU that is here, TensorRT for RTX for one that is named."""

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of GPUs for which TensorRT for RTX builds, without having one."""

PREFILL, DECODE = 0, 1
"""Profiles of a plan, in their order: one row of many tokens (packed: any), and many rows of one."""

PROMPT_ROWS = 256
"""Logits of a step, beside one a row: of prompts whose log-probabilities are wanted."""

PACKAGES = ("tensorrt-cu13", "tensorrt-rtx-cu13-bindings")

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_LIBRARIES = {"tensorrt_rtx_bindings": "tensorrt_rtx_libs"}
_NO_GPU = "cudaError 35", "CUDA initialization failure with error: 35"

log = logging.getLogger(__name__)


def capability_of(text: str) -> str:
    """The compute capability that "sm120" or "12.0" means. Raises InvalidArgument."""
    if found := re.fullmatch(r"(?i:sm_?)([0-9]{1,2})([0-9])|([0-9]{1,2})\.([0-9])", text):
        return ".".join(part for part in found.groups() if part is not None)
    raise InvalidArgument(f"target {text!r}: write it like sm120, or as a compute capability like 12.0")


def check_target(flavour: str, capability: str | None) -> None:
    """Raises InvalidArgument, listing those that there are, unless a flavour builds for a compute capability."""
    if flavour != "tensorrt_rtx" or capability in CAPABILITIES:
        return
    fitting = ", ".join(f"sm{known.replace('.', '')}" for known in CAPABILITIES)
    what = "needs a target" if capability is None else f"does not build for compute capability {capability}"
    raise InvalidArgument(
        f"backend 'tensorrt_rtx' {what}: choose one of {fitting} (--target, or compute_capability='12.0')",
        reason="TARGET_UNSUPPORTED",
    )


def load(flavour: str) -> Any:
    """The module of a flavour.

    Raises:
        FailedPrecondition: it is not installed, or cannot be loaded; the message names the extra.
    """
    extra = flavour.replace("_", "-")
    for name in _MODULES[flavour]:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            if name in _LIBRARIES:
                importlib.import_module(_LIBRARIES[name])  # finds the shared libraries
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise FailedPrecondition(
                f"{name} is installed, but cannot be loaded: {error}. Install it again: pip install --force-reinstall "
                f"'enginehouse[{extra}]'",
                reason="TENSORRT_BROKEN",
            ) from None
    raise FailedPrecondition(
        f"backend {flavour!r} needs {flavour}, which is not installed here: pip install 'enginehouse[{extra}]'",
        reason="EXTRA_MISSING",
    )


def installed() -> list[str]:
    """The flavours that are here, perhaps broken ones; imports nothing."""
    return [flavour for flavour, names in _MODULES.items() if any(map(importlib.util.find_spec, names))]


def capacity(max_seq_len: int) -> int:
    """Tokens of a slot of the caches: rows that have no token in a step still write one behind their last."""
    return max_seq_len + 1


def version(trt: Any) -> str:
    """The version of a flavour's module, such as "1.7.1.116": plans fit no other one."""
    return str(trt.__version__)


_loggers: dict[str, Any] = {}


def logger(trt: Any) -> Any:
    """The ILogger of a module, which keeps errors until `take_errors`; one for the process, as TensorRT has it."""
    found = _loggers.get(trt.__name__)
    if found is not None:
        return found

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if any(text in message for text in _NO_GPU):
                return  # a builder on a machine without a GPU says so each time
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())
            elif severity <= trt.ILogger.Severity.WARNING:
                log.info("%s: %s", trt.__name__, message.strip())

    _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]


def take_errors(trt: Any) -> str:
    """What TensorRT said was wrong since the last time."""
    errors = logger(trt).errors
    text = "; ".join(errors[-3:])
    errors.clear()
    return text or "it gave no reason"


def failed(trt: Any, what: str) -> Internal:
    """An error of the builder's that no table of ours foresaw, with TensorRT's own words."""
    return Internal(f"TensorRT refused {what}: {take_errors(trt)}", reason="TENSORRT_REFUSED")
