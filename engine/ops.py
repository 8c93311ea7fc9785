"""What each operator of `engine/opset.py` means: a plain PyTorch reference, which is its specification.

Executors run the references, or implementations of their own that a test holds against them.

Shapes: T tokens of a step (all sequences packed one after another), H query heads, G key/value heads, D head_dim.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.opset import FLOATS


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


class Group(Protocol):
    """The ranks that run a model together, as one of them sees them. Every rank calls the same verbs in the same order.

    The tensor-parallel group has the same layers, each rank a part of every one; a pipeline's ranks have one after another.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of what the ranks of the tensor-parallel group give, the same on all of them; it may be made in x itself."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[N, n] of each rank of the tensor-parallel group, side by side in their order: [N, n * tp_size], to all of them."""

    def send(self, x: Tensor) -> None:
        """[T, n] to the next rank of the pipeline."""

    def recv(self, columns: int, dtype: torch.dtype) -> Tensor:
        """What the rank before in the pipeline sends, [T, columns]: T is the step's, which the group is told otherwise."""


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """[T] int32, [vocab, hidden] -> [T, hidden]."""
    return F.embedding(token_ids, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, in], [out, in], [out] -> [T, out] in the dtype of x."""
    return F.linear(x, weight, bias)


def dense_int4(weight: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group_size: int) -> Tensor:
    """The matrix that linear_int4 multiplies with, float32 [out, in]: (code - zero) * scale.

    weight uint8 [out, in / 2], two codes 0 ... 15 in a byte, that of the even input in its low four bits. scales
    [out, ceil(in / group_size)], one for group_size inputs of a row (the last group may be short), in any floating point dtype:
    the one that they were chosen in, since another would move every weight of their group. zeros uint8 like scales, 8 if absent.
    """
    codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1).float()

    def of_inputs(of_groups: Tensor) -> Tensor:
        return of_groups.float().repeat_interleave(group_size, 1)[:, : codes.shape[1]]

    return (codes - (8 if zeros is None else of_inputs(zeros))) * of_inputs(scales)


def dense_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """The matrix that linear_int8 multiplies with, float32: weight int8 [out, in] times scales [out], in any dtype as above."""
    return weight.float() * scales.float()[:, None]


def dense_fp8(weight: Tensor, scales: Tensor, *, block_rows: int, block_columns: int) -> Tensor:
    """The matrix that linear_fp8 multiplies with, float32 [out, in]: each block times its scale.

    weight float8_e4m3fn [out, in]; scales float32 [ceil(out / block_rows), ceil(in / block_columns)], blocks at the end may be
    short. [1, in] is a scale for each output channel, [out, in] one for all.
    """
    rows, columns = weight.shape
    of_rows = scales.float().repeat_interleave(block_rows, 0)[:rows]
    return weight.float() * of_rows.repeat_interleave(block_columns, 1)[:, :columns]


def linear_int4(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
) -> Tensor:
    """linear with the matrix of `dense_int4`, rounded to the dtype of x: the weights are quantized, activations are not.

    Of this and the other packed products, an implementation may leave the matrix in float32 as it sums.
    """
    return F.linear(x, dense_int4(weight, scales, zeros, group_size=group_size).to(x.dtype), bias)


INT8_MAX = 127.0
"""The largest number of symmetric int8, which leaves -128 out."""


def to_int8(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale in int8, to nearest even; what is larger than 127 becomes that."""
    return (x.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def quantize_int8(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[T, n] -> (q int8 [T, n], scales float32 [T, 1]), of which q * scales is about x.

    The scale is input_scale (one number, float32), or each row's own, by which its largest number becomes 127.
    """
    scales = _row_scales(x, INT8_MAX) if input_scale is None else input_scale.reshape(1, 1).expand(len(x), 1)
    return to_int8(x, scales), scales


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    per_token: bool = False,
) -> Tensor:
    """linear with the matrix of `dense_int8`, rounded to the dtype of x.

    With an input_scale (float32 [1]), or per_token, x is quantized, too (`quantize_int8`): integers are multiplied with integers
    and summed exactly (as in int32), then scaled by row and by output in float32.
    """
    if input_scale is None and not per_token:
        return F.linear(x, dense_int8(weight, scales).to(x.dtype), bias)
    q, of_rows = quantize_int8(x, input_scale)
    sums = F.linear(q.double(), weight.double())  # exact: below 2^53, and every device has such products
    y = sums.float() * of_rows * scales.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""


def to_fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale in float8_e4m3fn, to nearest even; what is larger than its largest number becomes that."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize_fp8(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[T, n] -> (q float8_e4m3fn [T, n], scales float32 [T, 1]), of which q * scales is about x.

    The scale is input_scale (one number, float32), or each row's own, by which its largest number becomes FP8_MAX.
    """
    scales = _row_scales(x, FP8_MAX) if input_scale is None else input_scale.reshape(1, 1).expand(len(x), 1)
    return to_fp8(x, scales), scales


def _row_scales(x: Tensor, largest: float) -> Tensor:
    """[T, 1] float32: what the largest number of each row is divided by to become `largest`."""
    return x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    block_rows: int,
    block_columns: int,
    per_token: bool = False,
) -> Tensor:
    """linear with the matrix of `dense_fp8`, rounded to the dtype of x.

    With an input_scale (float32 [1]), or per_token, x is quantized, too (`quantize_fp8`), and what then stands for it is
    multiplied with the matrix in float32.
    """
    matrix = dense_fp8(weight, scales, block_rows=block_rows, block_columns=block_columns)
    if input_scale is None and not per_token:
        return F.linear(x, matrix.to(x.dtype), bias)
    q, of_rows = quantize_fp8(x, input_scale)
    return F.linear(q.float() * of_rows, matrix, None if bias is None else bias.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Each row over its root mean square, times weight (Zhang and Sennrich 2019); the statistic in float32.

    The product is in the weight's dtype: a float32 weight keeps its precision beside activations of less.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * wide.to(weight.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps=eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """Each row less its mean, over its standard deviation, times weight, plus bias (Ba et al. 2016), in float32."""
    wide = F.layer_norm(x.float(), weight.shape, weight.float(), None if bias is None else bias.float(), eps)
    return wide.to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual)."""
    total = x + residual
    return layer_norm(total, weight, bias, eps=eps), total


def head_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """rms_norm of each head of x [T, heads * D] with one weight [D]."""
    return rms_norm(x.view(x.shape[0], -1, len(weight)), weight, eps=eps).view_as(x)


def head_layer_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """layer_norm of each head of x [T, heads * D], each with a weight of its own [heads, D]."""
    heads = layer_norm(x.view(x.shape[0], *weight.shape), torch.ones_like(weight[0]), eps=eps)
    return (heads * weight).view_as(x)


def rope_table(positions: Tensor, inv_freq: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """[T] int32, [r/2] float32 -> cosine and sine [T, r/2] float32 of position * frequency, times scale."""
    angles = positions.float()[:, None] * inv_freq[None, :]
    return angles.cos() * scale, angles.sin() * scale


def long_rope_table(
    positions: Tensor, lengths: Tensor, inv_freq: Tensor, long_inv_freq: Tensor, *, original: int, scale: float
) -> tuple[Tensor, Tensor]:
    """rope_table with long_inv_freq for the tokens of sequences longer than `original` (LongRoPE, Ding et al. 2024).

    lengths [T] int32: what `engine.program.ROPE_LENGTHS` says. All keys of a sequence have to be computed again when it grows
    past `original`.
    """
    angles = positions.float()[:, None] * torch.where(lengths[:, None] > original, long_inv_freq, inv_freq)
    return angles.cos() * scale, angles.sin() * scale


def dynamic_rope_table(
    positions: Tensor, lengths: Tensor, *, rotary_dim: int, theta: float, factor: float, original: int
) -> tuple[Tensor, Tensor]:
    """rope_table whose base grows with the sequence's length past `original` ("dynamic NTK").

    lengths as above; keys stay as they were written. [T] -> cosine and sine [T, rotary_dim / 2] float32.
    """
    longest = lengths.clamp(min=original).float()[:, None]
    base = theta * (factor * longest / original - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    angles = positions.float()[:, None] * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


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
    k_scale: float = 0.0,
    v_scale: float = 0.0,
    kv_int8: bool = False,
) -> Tensor:
    """Causal attention of each sequence over its cached and new tokens; writes the new keys and values first.

    q [T, H * D], k and v [T, G * D], H a multiple of G; query head h reads key head h // (H / G). A query at position p
    sees positions max(0, p - window + 1) ... p; window 0 is unlimited. The score of position s is q.k * scale, in
    soft_cap * tanh(score / soft_cap) unless soft_cap is 0, plus alibi[h] * (s - p) (alibi [H] float32: Press et al. 2022).
    Scores and softmax in float32. -> [T, H * D].

    With k_scale and v_scale the caches are float8_e4m3fn, or int8 if kv_int8: what is written is `to_fp8` or `to_int8` of k by
    k_scale and of v by v_scale, what is read that times the scale, also of this step's own keys and values.
    """
    k_cache, v_cache = step.k_caches[cache], step.v_caches[cache]
    block_size, groups = k_cache.shape[1], k_cache.shape[2]
    rounded = to_int8 if kv_int8 else to_fp8
    k, v = (rounded(part, unit) if unit else part for part, unit in ((k, k_scale), (v, v_scale)))
    k_cache.view(-1, groups, head_dim)[step.slots] = k.view(-1, groups, head_dim)
    v_cache.view(-1, groups, head_dim)[step.slots] = v.view(-1, groups, head_dim)
    outputs, start = [], 0
    for row, (query_len, context_len) in enumerate(zip(step.query_lens, step.context_lens, strict=True)):
        blocks = step.block_tables[row, : -(-context_len // block_size)].long()
        keys = k_cache[blocks].view(-1, groups, head_dim)[:context_len].float() * (k_scale or 1)
        values = v_cache[blocks].view(-1, groups, head_dim)[:context_len].float() * (v_scale or 1)
        queries = q[start : start + query_len].view(query_len, groups, -1, head_dim).float()
        scores = torch.einsum("tgmd,sgd->gmts", queries, keys) * scale
        at = torch.arange(context_len - query_len, context_len, device=q.device)[:, None]
        seen = torch.arange(context_len, device=q.device)[None, :]
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if alibi is not None:
            scores = scores + alibi.view(groups, -1, 1, 1) * (seen - at)
        visible = (seen <= at) & ((seen > at - window) if window else True)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("gmts,sgd->tgmd", weights, values).reshape(query_len, -1).to(q.dtype))
        start += query_len
    return torch.cat(outputs)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * n], gate first -> silu(gate) * up [T, n]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu(x: Tensor, *, tanh: bool) -> Tensor:
    """x * Phi(x), or its approximation by tanh (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh" if tanh else "none")


def gelu_mul(gate_up: Tensor, *, tanh: bool) -> Tensor:
    """[T, 2 * n], gate first -> gelu(gate) * up [T, n]."""
    gate, up = gate_up.chunk(2, -1)
    return gelu(gate, tanh=tanh) * up


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """[T, n], [T, 1] -> sigmoid(gate) * x."""
    return torch.sigmoid(gate) * x


def experts(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, normalize: bool) -> Tensor:
    """Each token through its top_k of E gated feed-forward parts, weighted by the router's softmax (float32).

    x [T, hidden], router_logits [T, E], gate_up [E, 2 * n, hidden] (gate first), down [E, hidden, n]; normalize makes the chosen
    weights sum to one. -> [T, hidden].
    """
    weights, chosen = router_logits.float().softmax(-1).topk(top_k, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in set(chosen.flatten().tolist()):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        made = F.linear(silu_mul(F.linear(x[tokens], gate_up[expert])), down[expert])
        y.index_add_(0, tokens, made * weights[tokens, places, None].to(x.dtype))
    return y


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, of one shape."""
    return x + y


def scale(x: Tensor, *, factor: float) -> Tensor:
    """x * factor; the factor is rounded to the dtype of x."""
    return x * torch.tensor(factor, dtype=x.dtype).item()  # a number of the host's: x's device waits for nothing


def soft_cap(x: Tensor, *, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


def split(x: Tensor, *, sizes: list[int]) -> list[Tensor]:
    """Pieces of the last dimension, of these sizes."""
    return list(torch.split(x, sizes, -1))


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """[T, n], [m] int32 -> the rows [m, n]."""
    return x[indices]


def embedding_shard(token_ids: Tensor, weight: Tensor, first: Tensor) -> Tensor:
    """embedding with the rows first ... first + n - 1 of a larger table; the ids of other rows give zeros.

    [T] int32, [n, hidden], [1] int32 -> [T, hidden].
    """
    rows = token_ids - first
    there = (rows >= 0) & (rows < len(weight))
    return F.embedding(rows * there, weight).masked_fill(~there[:, None], 0)


def all_reduce(x: Tensor, *, group: Group) -> Tensor:
    """The sum over the tensor-parallel group, of the shape and dtype of x, which no other operator takes: it is overwritten."""
    return group.all_reduce(x)


def all_gather(x: Tensor, *, group: Group) -> Tensor:
    """[N, n] -> [N, n * tp_size]: the columns of all ranks of the tensor-parallel group, in the ranks' order."""
    return group.all_gather(x)


def send(x: Tensor, *, group: Group) -> tuple[()]:
    """[T, n] to the next rank of the pipeline, which takes it by recv."""
    group.send(x)
    return ()


def recv(*, dtype: int, size: int, group: Group) -> Tensor:
    """[T, size] from the rank before in the pipeline, of dtype `engine.opset.FLOATS[dtype]`."""
    return group.recv(size, getattr(torch, FLOATS[dtype]))


REFERENCE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        embedding, linear, linear_int4, linear_int8, linear_fp8, rms_norm, add_rms_norm, layer_norm, add_layer_norm,
        head_rms_norm, head_layer_norm,
        rope_table, long_rope_table, dynamic_rope_table, rope, attention, silu_mul, gelu, gelu_mul, sigmoid_mul, experts,
        add, scale, soft_cap, split, gather, embedding_shard, all_reduce, all_gather, send, recv,
    )
}  # fmt: skip

DENSE: dict[str, Callable[..., Tensor]] = {
    "linear_int4": dense_int4,
    "linear_int8": dense_int8,
    "linear_fp8": dense_fp8,
}
"""A packed operator -> the matrix that its inputs between x and bias stand for, with its attributes."""
