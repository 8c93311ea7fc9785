"""What each operator of `engine/opset.py` means: a plain PyTorch reference, which is its specification.

Also registers the operators with torch as `torch.ops.enginehouse.*`, by shape only, so that torch.export can trace a module
that is written over them. Executors run the references, or implementations of their own that a test holds against them.

Shapes: T tokens of a step (all sequences packed one after another), H query heads, G key/value heads, D head_dim.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.opset import OPERATORS, Operator


@dataclass(frozen=True)
class Step:
    """Attention's view of a step: which rows of the packed batch belong to which sequence, and where its keys lie.

    Attributes:
        query_lens: tokens of each sequence in this step; their sum is T.
        context_lens: tokens of each sequence whose keys are visible to its last query, this step's included.
        block_tables: int32 [num_seqs, max_blocks]; entry j of row i is the cache block of positions
            j * block_size ... of sequence i.
        slots: int64 [T]; token t's key and value go to row slots[t] of the flattened cache.
        k_caches, v_caches: one per attention operator, [num_blocks, block_size, G, D]. Only attention reads and writes them: an
            implementation may lay out the inner three dimensions of its own.
    """

    query_lens: list[int]
    context_lens: list[int]
    block_tables: Tensor
    slots: Tensor
    k_caches: list[Tensor]
    v_caches: list[Tensor]

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor]:
        """int64 [num_seqs + 1], the rows at which the sequences begin, and the last one's end; int64 [num_seqs], context_lens."""
        return torch.tensor([0, *itertools.accumulate(self.query_lens)]), torch.tensor(self.context_lens)


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """[T] int32, [vocab, hidden] -> [T, hidden]."""
    return F.embedding(token_ids, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, in], [out, in], [out] -> [T, out] in the dtype of x."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Each row over its root mean square, times weight (Zhang and Sennrich 2019); the statistic in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps=eps), total


def rope_table(positions: Tensor, inv_freq: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """[T] int32, [r/2] float32 -> cosine and sine [T, r/2] float32 of position * frequency, times scale."""
    angles = positions.float()[:, None] * inv_freq[None, :]
    return angles.cos() * scale, angles.sin() * scale


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, interleaved: bool) -> Tensor:
    """Rotates the first r dimensions of each head of x [T, heads * D] by position (Su et al. 2021).

    The pairs are (i, i + r/2), or (2i, 2i + 1) if interleaved. Computed in float32.
    """
    half = cos.shape[-1]
    heads = x.view(x.shape[0], -1, head_dim)
    turned, kept = heads[..., : 2 * half].float(), heads[..., 2 * half :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    cos, sin = cos[:, None, :], sin[:, None, :]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), kept), -1).view_as(x)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, step: Step, cache: int, head_dim: int, scale: float, window: int
) -> Tensor:
    """Causal attention of each sequence over its cached and new tokens; writes the new keys and values first.

    q [T, H * D], k and v [T, G * D], H a multiple of G; query head h reads key head h // (H / G). A query at position p
    sees positions max(0, p - window + 1) ... p; window 0 is unlimited. Scores and softmax in float32. -> [T, H * D].
    """
    k_cache, v_cache = step.k_caches[cache], step.v_caches[cache]
    block_size, groups = k_cache.shape[1], k_cache.shape[2]
    k_cache.view(-1, groups, head_dim)[step.slots] = k.view(-1, groups, head_dim)
    v_cache.view(-1, groups, head_dim)[step.slots] = v.view(-1, groups, head_dim)
    outputs, start = [], 0
    for row, (query_len, context_len) in enumerate(zip(step.query_lens, step.context_lens, strict=True)):
        blocks = step.block_tables[row, : -(-context_len // block_size)].long()
        keys = k_cache[blocks].view(-1, groups, head_dim)[:context_len].float()
        values = v_cache[blocks].view(-1, groups, head_dim)[:context_len].float()
        queries = q[start : start + query_len].view(query_len, groups, -1, head_dim).float()
        scores = torch.einsum("tgmd,sgd->gmts", queries, keys) * scale
        at = torch.arange(context_len - query_len, context_len, device=q.device)[:, None]
        seen = torch.arange(context_len, device=q.device)[None, :]
        visible = (seen <= at) & ((seen > at - window) if window else True)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("gmts,sgd->tgmd", weights, values).reshape(query_len, -1).to(q.dtype))
        start += query_len
    return torch.cat(outputs)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * n], gate first -> silu(gate) * up [T, n]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def split(x: Tensor, *, sizes: list[int]) -> list[Tensor]:
    """Pieces of the last dimension, of these sizes."""
    return list(torch.split(x, sizes, -1))


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """[T, n], [m] int32 -> the rows [m, n]."""
    return x[indices]


REFERENCE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        embedding, linear, rms_norm, add_rms_norm, rope_table, rope, attention, silu_mul, split, gather,
    )
}  # fmt: skip


def _schema(name: str, operator: Operator) -> str:
    kinds = {int: "int", float: "float", bool: "bool", list: "int[]"}
    tensors = [f"Tensor? {slot[:-1]}" if slot.endswith("?") else f"Tensor {slot}" for slot in operator.inputs]
    attrs = [f"{kinds[kind]} {attr}" for attr, kind in operator.attrs.items()]
    if operator.variadic:
        result = "Tensor[]"
    else:
        result = f"({', '.join('Tensor' for _ in operator.outputs)})"
    return f"{name}({', '.join(tensors + attrs)}) -> {result}"


def _shapes(name: str, operator: Operator) -> Callable[..., Any]:
    """The reference under torch's fake tensors, which compute shapes only."""

    def fake(*args: Any) -> Any:
        tensors, attrs = args[: len(operator.inputs)], args[len(operator.inputs) :]
        if operator.uses_step:  # it needs the step's caches, which a trace has not; the result is like the first input
            return torch.empty_like(tensors[0])
        result = REFERENCE[name](*tensors, **dict(zip(operator.attrs, attrs, strict=True)))
        return [part.clone() for part in result] if isinstance(result, list) else result

    return fake


_library: Any = torch.library.Library("enginehouse", "DEF")  # type: ignore[no-untyped-call]
for _name, _operator in OPERATORS.items():
    _library.define(_schema(_name, _operator))
    torch.library.register_fake(f"enginehouse::{_name}", _shapes(_name, _operator), lib=_library)
