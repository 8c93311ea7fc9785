"""The CPU's operators of `csrc/native.c`, which is compiled when the package is installed.

Where there was no compiler, `available` is False and torch's operators are used (`cpu.py`, the references). They also take
what these do not: float16.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.ops import Step
from engine.program import Program
from executor_svc.kernels import library, packed

KEYS_PER_BLOCK = 16  # of the KV cache, as attention reads it
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SILU, _GELU, _GELU_TANH = range(3)

_library: Any = library.load()
available = _library is not None


class Packed:
    """A weight [outputs, inputs] of a linear operator, or [E, outputs, inputs] of experts, in the panels of `csrc/native.c`."""

    def __init__(self, weight: Tensor) -> None:
        """Packs the weight where it lies: whoever else holds the tensor has panels, too."""
        self.data = weight
        self.outputs, self.inputs = weight.shape[-2:]
        for matrix in weight.view(-1, self.outputs, self.inputs):
            _library.enginehouse_pack(_TYPES[weight.dtype], matrix.data_ptr(), self.outputs, self.inputs)
        self.call = library.Linear(
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
    """The weights with those packed that linear operators, and beside them only embeddings, take; experts' in pairs.

    Beside them what `packed.py` packs.
    """
    users: dict[str, set[tuple[str, int]]] = {name: {("output", 0)} for name in program.outputs}
    for op in program.ops:
        for position, name in enumerate(op.inputs):
            users.setdefault(name, set()).add((op.op, position))
    matrix, experts = {("linear", 1), ("embedding", 1)}, {("experts", 2), ("experts", 3)}
    chosen = {
        name
        for name, weight in weights.items()
        if _packable(weight)
        and (
            (weight.dim() == 2 and ("linear", 1) in users.get(name, ()) and users[name] <= matrix)
            or (weight.dim() == 3 and users.get(name) and users[name] <= experts)
        )
    }
    for op in program.ops:
        if op.op == "experts" and not {*op.inputs[2:]} <= chosen:
            chosen -= {*op.inputs[2:]}
    found = {name: Packed(weight) if name in chosen else weight for name, weight in weights.items()}
    return packed.pack(program, found)


def _packable(weight: Tensor) -> bool:
    whole = weight.is_contiguous() and weight.data_ptr() % weight.element_size() == 0
    return weight.dtype in _TYPES and weight.numel() > 0 and whole


def _embedding(token_ids: Tensor, weight: Any) -> Any:
    return weight.rows(token_ids) if isinstance(weight, Packed) else NotImplemented


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Packed):
        return NotImplemented
    fits = _takes("linear", x) and x.shape[1] == weight.inputs and weight.data.dim() == 2
    fits = fits and (bias is None or (bias.dtype == x.dtype and bias.shape == (weight.outputs,)))
    _check(fits, "linear", x, weight.data, bias)
    x, bias = _rows(x), _whole(bias)
    y = torch.empty(len(x), weight.outputs, dtype=x.dtype)
    call = weight.call
    call.type, call.rows, call.stride = _TYPES[x.dtype], len(x), x.stride(0)
    call.x, call.y, call.bias = x.data_ptr(), y.data_ptr(), _pointer(bias)
    _library.enginehouse_linear(call)
    return y


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    *,
    layer: bool,
    pieces: int,
) -> Any:
    """(the norm of each of the pieces of a row, x + residual); NotImplemented where torch has to serve."""
    types = (x.dtype, weight.dtype)
    if not _takes("norm", x) or weight.dtype not in (x.dtype, torch.float32):
        return NotImplemented
    if (bias is not None and bias.dtype != weight.dtype) or (residual is not None and residual.dtype != x.dtype):
        return NotImplemented
    size = x.shape[1] // pieces if pieces else 0
    fits = weight.shape == (size,) and size * pieces == x.shape[1] and (bias is None or bias.shape == weight.shape)
    _check(fits and (residual is None or residual.shape == x.shape), "norm", x, weight, bias, residual)
    x, weight, bias = _rows(x), weight.contiguous(), _whole(bias)
    y = _like(x)
    call = library.Norm(
        *(_TYPES[types[0]], _TYPES[types[1]], layer, len(x), pieces, size, x.stride(0), 0, eps),
        *(x.data_ptr(), None, weight.data_ptr(), _pointer(bias), y.data_ptr()),
    )
    total = x
    if residual is not None:
        residual, total = _rows(residual), _like(x)
        call.residual, call.residual_stride, call.sum = residual.data_ptr(), residual.stride(0), total.data_ptr()
    _library.enginehouse_norm(call)
    return y, total


def _first(result: Any) -> Any:
    return result if result is NotImplemented else result[0]


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Any:
    return _first(_norm(x, weight, None, eps, layer=False, pieces=1))


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> Any:
    return _norm(x, weight, None, eps, residual, layer=False, pieces=1)


def _head_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Any:
    return _first(_norm(x, weight, None, eps, layer=False, pieces=x.shape[-1] // max(1, weight.numel())))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Any:
    return _first(_norm(x, weight, bias, eps, layer=True, pieces=1))


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Any:
    return _norm(x, weight, bias, eps, residual, layer=True, pieces=1)


def _activation(x: Tensor, kind: int, *, gated: bool) -> Any:
    if not _takes("activation", x):
        return NotImplemented
    _check(not gated or x.shape[1] % 2 == 0, "gate and up", x)
    x, size = _rows(x), x.shape[1] // (2 if gated else 1)
    y = torch.empty(len(x), size, dtype=x.dtype)
    _library.enginehouse_activation(_TYPES[x.dtype], kind, gated, x.data_ptr(), x.stride(0), len(x), size, y.data_ptr())
    return y


def _silu_mul(gate_up: Tensor) -> Any:
    return _activation(gate_up, _SILU, gated=True)


def _gelu(x: Tensor, *, tanh: bool) -> Any:
    return _activation(x, _GELU_TANH if tanh else _GELU, gated=False)


def _gelu_mul(gate_up: Tensor, *, tanh: bool) -> Any:
    return _activation(gate_up, _GELU_TANH if tanh else _GELU, gated=True)


def _experts(x: Tensor, router_logits: Tensor, gate_up: Any, down: Any, *, top_k: int, normalize: bool) -> Any:
    if not isinstance(gate_up, Packed) and not isinstance(down, Packed):
        return NotImplemented
    fits = isinstance(gate_up, Packed) and isinstance(down, Packed)
    up_weight, down_weight = (part.data if isinstance(part, Packed) else part for part in (gate_up, down))
    if fits:
        count, twice, hidden = up_weight.shape if up_weight.dim() == 3 else (0, 0, 0)
        fits = _takes("experts", x) and up_weight.dtype == down_weight.dtype and 1 <= top_k <= count
        fits = fits and x.shape == (len(x), hidden) and router_logits.shape == (len(x), count)
        fits = fits and twice % 2 == 0 and down_weight.shape == (count, hidden, twice // 2)
    _check(fits, "experts", x, router_logits, up_weight, down_weight)
    x, y = _rows(x), _like(x)
    weights, chosen = router_logits.float().softmax(-1).topk(top_k, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights, chosen = weights.contiguous(), chosen.contiguous()
    call = library.Experts(
        *(_TYPES[x.dtype], _TYPES[up_weight.dtype], len(x), count, top_k, hidden, twice // 2, x.stride(0)),
        *(x.data_ptr(), up_weight.data_ptr(), down_weight.data_ptr()),
        *(chosen.data_ptr(), weights.data_ptr(), y.data_ptr()),
    )
    _library.enginehouse_experts(call)
    return y


def _rope(x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, interleaved: bool) -> Any:
    if not _takes("rope", x):
        return NotImplemented
    fits = x.shape[1] % head_dim == 0 and cos.dim() == 2 and cos.shape == sin.shape == (len(x), cos.shape[1])
    fits = fits and 2 * cos.shape[1] <= head_dim and cos.dtype == sin.dtype == torch.float32
    _check(fits, "rope", x, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    x, y = _rows(x), _like(x)
    _library.enginehouse_rope(
        *(_TYPES[x.dtype], x.data_ptr(), x.stride(0), len(x), x.shape[1] // head_dim, head_dim),
        *(cos.data_ptr(), sin.data_ptr(), cos.shape[1], interleaved, y.data_ptr()),
    )
    return y


def _attention(
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
    **units: float,
) -> Any:
    """The caches' memory is taken as keys [blocks, G, D, 16] and values [blocks, G, 16, D]."""
    k_cache, v_cache = step.k_caches[cache], step.v_caches[cache]
    block_size, groups = k_cache.shape[1], k_cache.shape[2]
    if not _takes("attention", q) or any(units.values()) or k_cache.dtype != q.dtype or block_size != KEYS_PER_BLOCK:
        return NotImplemented
    heads, rest = divmod(q.shape[1], head_dim)
    fits = k_cache.shape[3] == head_dim and k.shape == v.shape == (len(q), groups * head_dim)
    fits = fits and k.dtype == v.dtype == q.dtype and not rest and heads > 0 and heads % groups == 0
    fits = fits and (alibi is None or (alibi.shape == (heads,) and alibi.dtype == torch.float32))
    _check(fits, "attention", q, k, v, k_cache, alibi)
    q, k, v, alibi = _rows(q), _rows(k), _rows(v), _whole(alibi)
    y = _like(q)
    starts, contexts = step.spans
    call = library.Attention(
        type=_TYPES[q.dtype],
        **{"sequences": len(contexts), "tokens": len(q), "heads": heads, "groups": groups, "dim": head_dim},
        **{"window": window, "scale": scale, "cap": soft_cap, "table_stride": step.block_tables.stride(0)},
        **{"q_stride": q.stride(0), "k_stride": k.stride(0), "v_stride": v.stride(0), "alibi": _pointer(alibi)},
        **{"q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "y": y.data_ptr()},
        **{"k_cache": k_cache.data_ptr(), "v_cache": v_cache.data_ptr(), "slots": step.slots.data_ptr()},
        **{"starts": starts.data_ptr(), "contexts": contexts.data_ptr(), "tables": step.block_tables.data_ptr()},
    )
    _library.enginehouse_attention(call)
    return y


_OPERATORS = (
    *(_embedding, _linear, _rms_norm, _add_rms_norm, _head_rms_norm, _layer_norm, _add_layer_norm),
    *(_rope, _attention, _silu_mul, _gelu, _gelu_mul, _experts),
    *packed.OPERATORS,
)


def operators(others: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The operators by name. What they cannot take goes to `others`, which have every operator."""

    def falling_back(function: Callable[..., Any]) -> Callable[..., Any]:
        other = others[function.__name__[1:]]

        @functools.wraps(function)
        def call(*tensors: Any, **attrs: Any) -> Any:
            result = function(*tensors, **attrs)
            return other(*tensors, **attrs) if result is NotImplemented else result

        return call

    return {function.__name__[1:]: falling_back(function) for function in _OPERATORS}


def _check(fits: bool, operator: str, *tensors: Tensor | None) -> None:
    """Raises ValueError where torch's operators would: a program is data, and C would read and write what is not its own."""
    if not fits:
        given = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors if tensor is not None)
        raise ValueError(f"{operator}: these do not belong together, or hold a token id that is out of range: {given}")


def _takes(operator: str, x: Tensor) -> bool:
    """Whether the library takes matrices of this type. Raises ValueError for what is no matrix."""
    _check(x.dim() == 2, operator, x)
    return x.dtype in _TYPES


def _rows(x: Tensor) -> Tensor:
    """The matrix with its rows in one piece each; they may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """A tensor of the same shape, in one piece. (torch.empty takes twice the time.)"""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
