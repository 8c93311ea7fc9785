"""The CPU's operators of `csrc/native.c`, which is compiled when the package is installed.

Where there was no compiler, `available` is False and torch's operators of `cpu.py` are used. They also take what these do
not: float16.
"""

import ctypes
import importlib.machinery
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.ops import Step
from engine.program import Program

KEYS_PER_BLOCK = 16  # of the KV cache, as attention reads it
_TYPES = {torch.float32: 0, torch.bfloat16: 1}

log = logging.getLogger(__name__)


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("type", "weight_type")),
        *((name, ctypes.c_long) for name in ("rows", "inputs", "outputs", "stride")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("rows", "size", "stride", "residual_stride")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "y", "sum")),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("sequences", "tokens", "heads", "groups", "dim", "window")),
        *((name, ctypes.c_long) for name in ("table_stride", "q_stride", "k_stride", "v_stride")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_cache", "v_cache", "y")),
        *((name, ctypes.c_void_p) for name in ("starts", "contexts", "slots", "tables")),
    ]


def _load() -> ctypes.CDLL | None:
    """The library, whose OpenMP is the one that torch has brought. $ENGINEHOUSE_NATIVE=0 leaves it out."""
    if os.environ.get("ENGINEHOUSE_NATIVE") == "0":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                return _declared(ctypes.CDLL(str(path)))
            except OSError as error:
                log.warning("%s cannot be loaded, torch's operators are used: %s", path.name, error)
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    signatures = {
        "pack": [integer, pointer, number, number],
        "rows": [integer, pointer, number, number, pointer, number, pointer],
        "linear": [ctypes.POINTER(_Linear)],
        "norm": [ctypes.POINTER(_Norm)],
        "silu_mul": [integer, pointer, number, number, number, pointer],
        "rope": [integer, pointer, *[number] * 4, pointer, pointer, number, integer, pointer],
        "attention": [ctypes.POINTER(_Attention)],
    }
    for name, types in signatures.items():
        function = getattr(library, f"enginehouse_{name}")
        function.argtypes, function.restype = types, None
    return library


_library: Any = _load()
available = _library is not None


class Packed:
    """A weight [outputs, inputs] of a linear operator, whose memory is in the panels that `csrc/native.c` describes."""

    def __init__(self, weight: Tensor) -> None:
        """Packs the weight where it lies: whoever else holds the tensor has panels, too."""
        self.data = weight
        self.outputs, self.inputs = weight.shape
        _library.enginehouse_pack(_TYPES[weight.dtype], weight.data_ptr(), self.outputs, self.inputs)
        self.call = _Linear(
            weight_type=_TYPES[weight.dtype], inputs=self.inputs, outputs=self.outputs, weight=weight.data_ptr()
        )

    def rows(self, token_ids: Tensor) -> Tensor:
        """[T] int32 -> rows of the weight [T, inputs]."""
        found = torch.empty(len(token_ids), self.inputs, dtype=self.data.dtype)
        ids = token_ids.to(torch.int32).contiguous()
        if len(ids):
            lowest, highest = ids.aminmax()
            _check(int(lowest) >= 0 and int(highest) < self.outputs, "embedding", ids, self.data)
        _library.enginehouse_rows(
            *(_TYPES[found.dtype], self.data.data_ptr(), self.outputs, self.inputs),
            *(ids.data_ptr(), len(ids), found.data_ptr()),
        )
        return found


def pack(program: Program, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The weights with those packed that linear operators, and beside them only embeddings, take."""
    users: dict[str, set[str]] = {}
    for op in program.ops:
        for position, name in enumerate(op.inputs):
            users.setdefault(name, set()).add(op.op if position == 1 else "")
    return {
        name: Packed(weight)
        if "linear" in users.get(name, ()) <= {"linear", "embedding"} and weight.dtype in _TYPES and _whole(weight)
        else weight
        for name, weight in weights.items()
    }


def _whole(weight: Tensor) -> bool:
    return weight.is_contiguous() and weight.data_ptr() % weight.element_size() == 0


def operators(others: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The operators by name. What they cannot take goes to `others`, which have every operator."""

    def embedding(token_ids: Tensor, weight: Any) -> Tensor:
        return weight.rows(token_ids) if isinstance(weight, Packed) else others["embedding"](token_ids, weight)

    def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Packed):
            result: Tensor = others["linear"](x, weight, bias)
            return result
        fits = x.shape[1] == weight.inputs and x.dtype in _TYPES
        fits = fits and (bias is None or (bias.dtype == x.dtype and bias.shape == (weight.outputs,)))
        _check(fits, "linear", x, weight.data, bias)
        x = _rows(x)
        y = torch.empty(len(x), weight.outputs, dtype=x.dtype)
        call = weight.call
        call.type, call.rows, call.stride = _TYPES[x.dtype], len(x), x.stride(0)
        call.x, call.y, call.bias = x.data_ptr(), y.data_ptr(), bias.data_ptr() if bias is not None else None
        _library.enginehouse_linear(call)
        return y

    def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        if x.dtype not in _TYPES or weight.dtype != x.dtype:
            result: Tensor = others["rms_norm"](x, weight, eps=eps)
            return result
        return _norm(x, None, weight, eps)[0]

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
        if x.dtype not in _TYPES or not x.dtype == residual.dtype == weight.dtype:
            result: tuple[Tensor, Tensor] = others["add_rms_norm"](x, residual, weight, eps=eps)
            return result
        return _norm(x, residual, weight, eps)

    def rope(x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, interleaved: bool) -> Tensor:
        if x.dtype not in _TYPES:
            result: Tensor = others["rope"](x, cos, sin, head_dim=head_dim, interleaved=interleaved)
            return result
        fits = x.shape[1] % head_dim == 0 and cos.shape == sin.shape == (len(x), cos.shape[1])
        fits = fits and 2 * cos.shape[1] <= head_dim and cos.dtype == sin.dtype == torch.float32
        _check(fits, "rope", x, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        x, y = _rows(x), torch.empty(x.shape, dtype=x.dtype)
        _library.enginehouse_rope(
            *(_TYPES[x.dtype], x.data_ptr(), x.stride(0), len(x), x.shape[1] // head_dim, head_dim),
            *(cos.data_ptr(), sin.data_ptr(), cos.shape[1], interleaved, y.data_ptr()),
        )
        return y

    def silu_mul(gate_up: Tensor) -> Tensor:
        if gate_up.dtype not in _TYPES:
            result: Tensor = others["silu_mul"](gate_up)
            return result
        x, size = _rows(gate_up), gate_up.shape[1] // 2
        y = torch.empty(len(x), size, dtype=x.dtype)
        _library.enginehouse_silu_mul(_TYPES[x.dtype], x.data_ptr(), x.stride(0), len(x), size, y.data_ptr())
        return y

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi: Tensor | None = None,
        *,
        step: Step,
        cache: int,
        head_dim: int,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """The caches' memory is taken as keys [blocks, G, D, 16] and values [blocks, G, 16, D]."""
        k_cache, v_cache = step.k_caches[cache], step.v_caches[cache]
        block_size, groups = k_cache.shape[1], k_cache.shape[2]
        if (
            q.dtype not in _TYPES
            or k_cache.dtype != q.dtype
            or block_size != KEYS_PER_BLOCK
            or alibi is not None
            or soft_cap
        ):
            settings = {"cache": cache, "head_dim": head_dim, "scale": scale, "window": window, "soft_cap": soft_cap}
            result: Tensor = others["attention"](q, k, v, alibi, step=step, **settings)
            return result
        heads, rest = divmod(q.shape[1], head_dim)
        fits = k_cache.shape[3] == head_dim and k.shape == v.shape == (len(q), groups * head_dim)
        fits = fits and k.dtype == v.dtype == q.dtype and not rest and heads > 0 and heads % groups == 0
        _check(fits, "attention", q, k, v, k_cache)
        q, k, v = _rows(q), _rows(k), _rows(v)
        y = torch.empty(q.shape, dtype=q.dtype)
        starts, contexts = step.spans
        call = _Attention(
            type=_TYPES[q.dtype],
            **{"sequences": len(contexts), "tokens": len(q), "heads": heads, "groups": groups},
            **{"dim": head_dim, "window": window, "scale": scale, "table_stride": step.block_tables.stride(0)},
            **{"q_stride": q.stride(0), "k_stride": k.stride(0), "v_stride": v.stride(0)},
            **{"q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "y": y.data_ptr()},
            **{"k_cache": k_cache.data_ptr(), "v_cache": v_cache.data_ptr(), "slots": step.slots.data_ptr()},
            **{"starts": starts.data_ptr(), "contexts": contexts.data_ptr(), "tables": step.block_tables.data_ptr()},
        )
        _library.enginehouse_attention(call)
        return y

    own = (embedding, linear, rms_norm, add_rms_norm, rope, silu_mul, attention)
    return {function.__name__: function for function in own}


def _check(fits: bool, operator: str, *tensors: Tensor | None) -> None:
    """Raises ValueError where torch's operators would: a program is data, and C would read and write what is not its own."""
    if not fits:
        given = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors if tensor is not None)
        raise ValueError(f"{operator}: these do not belong together, or hold a token id that is out of range: {given}")


def _rows(x: Tensor) -> Tensor:
    """The matrix with its rows in one piece each; they may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    fits = weight.shape == x.shape[1:] and (residual is None or residual.shape == x.shape)
    _check(fits, "norm", x, residual, weight)
    x, y = _rows(x), torch.empty(x.shape, dtype=x.dtype)
    call = _Norm(
        _TYPES[x.dtype], len(x), x.shape[1], x.stride(0), 0, eps, x.data_ptr(), None, weight.data_ptr(), y.data_ptr()
    )
    total = x
    if residual is not None:
        residual, total = _rows(residual), torch.empty(x.shape, dtype=x.dtype)
        call.residual, call.residual_stride, call.sum = residual.data_ptr(), residual.stride(0), total.data_ptr()
    _library.enginehouse_norm(call)
    return y, total
