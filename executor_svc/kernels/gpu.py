"""Operators on CUDA: Triton kernels for what reads memory once, the libraries behind torch for matrix products.

`attention` takes a `DeviceStep`, whose tensors are all on the device: nothing here waits for it, so that a CUDA graph can hold
a step.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.ops import REFERENCE, Step
from engine.ops import rms_norm as reference_rms_norm
from executor_svc.kernels import decodes, ends, paged, prompt, rounded, rows, tactics
from executor_svc.kernels.grouped import experts
from executor_svc.kernels.integers import Packed, takes
from executor_svc.kernels.tactics import RULE, Product, Table

__all__ = [
    "DeviceStep",
    "add_rms_norm",
    "attention",
    "add_rms_norm_fp8",
    "add_rms_norm_int8",
    "embedding",
    "embedding_shard",
    "experts",
    "gather",
    "linear",
    "linear_int4",
    "linear_int8",
    "linear_silu_mul",
    "product_fp8",
    "product_int8",
    "quantize_fp8",
    "quantize_int8",
    "rms_norm",
    "rms_norm_fp8",
    "rms_norm_int8",
    "rope",
    "rope_attention",
    "rope_table",
    "silu_mul",
    "silu_mul_fp8",
    "silu_mul_int8",
]

Tiles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DeviceStep(Step):
    """A step as the device sees it: first sequences with one token each, then the others, in tiles.

    Attributes:
        num_decodes: the first so many sequences, and rows of the batch.
        rows: int32 [num_seqs], each sequence's row of block_tables.
        lengths: int32 [num_seqs], context_lens.
        starts: int32, the rows of the batch at which the other sequences begin, and the last one's end.
        tiles: int32 [n] twice, as `paged.prefill` takes them.
        arrived: int32 zeros, a number for each decode and key head: `decodes.decode` counts there.
        fresh, cached: the tiles of sequences that begin in this step, and the rest; None where that is not known.
    """

    num_decodes: int
    rows: Tensor
    lengths: Tensor
    arrived: Tensor
    starts: Tensor | None = None
    tiles: Tiles | None = None
    fresh: Tiles | None = None
    cached: Tiles | None = None

    @staticmethod
    def of(step: Step) -> "DeviceStep":
        """The same step, with what the kernels need beside it."""
        if isinstance(step, DeviceStep):
            return step
        device, lens = step.slots.device, step.query_lens
        count = next((row for row, length in enumerate(lens) if length > 1), len(lens))
        starts = [0, *itertools.accumulate(lens)][count:]
        at = [(row, first) for row, length in enumerate(lens[count:]) for first in range(0, length, paged.TILE)]
        begins = [length == context for length, context in zip(lens[count:], step.context_lens[count:], strict=True)]

        def tiles(chosen: list[tuple[int, int]]) -> Tiles | None:
            if not chosen:
                return None
            of, first = (torch.tensor(part, dtype=torch.int32, device=device) for part in zip(*chosen, strict=True))
            return of, first

        return DeviceStep(
            **{name: getattr(step, name) for name in Step.__dataclass_fields__},
            num_decodes=count,
            rows=torch.arange(len(lens), dtype=torch.int32, device=device),
            lengths=torch.tensor(step.context_lens, dtype=torch.int32, device=device),
            arrived=torch.zeros(count * max(k.shape[2] for k in step.k_caches), dtype=torch.int32, device=device),
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            tiles=tiles(at),
            fresh=tiles([tile for tile in at if begins[tile[0]]]),
            cached=tiles([tile for tile in at if not begins[tile[0]]]),
        )


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """One kernel."""
    return ends.take(weight, token_ids)


def embedding_shard(token_ids: Tensor, weight: Tensor, first: Tensor) -> Tensor:
    """One kernel."""
    return ends.take(weight, token_ids, first)


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """One kernel."""
    return ends.take(x, indices)


def rope_table(positions: Tensor, inv_freq: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """One kernel."""
    return ends.rope_table(positions, inv_freq, scale=scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, table: Table = RULE) -> Tensor:
    """With few rows, where the time goes into reading the weight, by the tactic of its shape; else cuBLAS."""
    return _multiply(x, weight, bias, table, "dense")


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, table: Table = RULE) -> Tensor:
    """`silu_mul` of `linear`: one kernel where the weight's reading takes the time."""
    return _multiply(x, weight, bias, table, "pair")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, table: Table, kind: str) -> Tensor:
    few = 0 < len(x) <= tactics.MOST_ROWS and x.dtype is not torch.float32
    if few and weight.is_contiguous() and x.stride(-1) == 1:
        how = tactics.choose(tactics.shape_of(x, weight, kind), table)
    else:
        how = tactics.LIBRARY
    return tactics.multiply(x, weight, bias, how, pair=kind == "pair")


def linear_int4(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    table: Table = RULE,
) -> Tensor:
    """By the tactic of its shape; groups that are no multiples of 32 are the reference's."""
    packed = Packed(weight, scales, zeros, group_size)
    if not takes(packed, x):
        return REFERENCE["linear_int4"](x, weight, scales, zeros, bias, group_size=group_size)
    return _multiply_packed(x, packed, bias, table)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    per_token: bool = False,
    table: Table = RULE,
) -> Tensor:
    """By the tactic of its shape; `fuse` makes another operator of products that round their input."""
    packed = Packed(weight, scales)
    if input_scale is not None or per_token or not takes(packed, x):
        return REFERENCE["linear_int8"](x, weight, scales, bias, input_scale, per_token=per_token)
    return _multiply_packed(x, packed, bias, table)


def _multiply_packed(x: Tensor, packed: Packed, bias: Tensor | None, table: Table) -> Tensor:
    if not len(x):
        return x.new_empty(0, len(packed.weight))
    shape = Product(tactics.power(len(x)), len(packed.weight), packed.columns, packed.kind)
    return tactics.multiply_packed(x.contiguous(), packed, bias, tactics.choose(shape, table))


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """One kernel; a weight of another dtype is the reference's."""
    if weight.dtype != x.dtype:
        return reference_rms_norm(x, weight, eps=eps)
    return rows.norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm, in one kernel."""
    if weight.dtype != x.dtype:
        total = x + residual
        return reference_rms_norm(total, weight, eps=eps), total
    return rows.norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """One kernel."""
    return rows.silu_mul(gate_up)


quantize_fp8, rms_norm_fp8, add_rms_norm_fp8, silu_mul_fp8, product_fp8 = rounded.operators(torch.float8_e4m3fn, "fp8")
quantize_int8, rms_norm_int8, add_rms_norm_int8, silu_mul_int8, product_int8 = rounded.operators(torch.int8, "w8a8")


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, interleaved: bool) -> Tensor:
    """One kernel."""
    return rows.rope(x, cos, sin, head_dim=head_dim, interleaved=interleaved)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi: Tensor | None = None,
    *,
    step: Step,
    cache: int,
    head_dim: int,  # noqa: ARG001  (the cache has it)
    scale: float,
    window: int,
    soft_cap: float = 0.0,
    k_scale: float = 0.0,
    v_scale: float = 0.0,
    kv_int8: bool = False,  # noqa: ARG001  (the cache has it, too)
) -> Tensor:
    """Writes keys and values, then reads them: prompts in tiles, decodes split over the context."""
    here = DeviceStep.of(step)
    rows.write(k, v, here.slots, here.k_caches[cache], here.v_caches[cache], k_scale, v_scale)
    if k_scale:  # what counts is what was written
        here = replace(here, fresh=None)
    settings = {"scale": scale * (k_scale or 1), "v_scale": v_scale or 1.0, "window": window, "soft_cap": soft_cap}
    return _attend(q.contiguous(), k, v, alibi, here, cache, **settings)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    alibi: Tensor | None = None,
    *,
    step: Step,
    cache: int,
    head_dim: int,  # noqa: ARG001  (the cache has it)
    scale: float,
    window: int,
    interleaved: bool,
    soft_cap: float = 0.0,
    k_scale: float = 0.0,
    v_scale: float = 0.0,
    kv_int8: bool = False,  # noqa: ARG001
) -> Tensor:
    """`rope` of q and k, and `attention`: what is rotated goes straight into the cache."""
    here = DeviceStep.of(step)
    k_cache, v_cache = here.k_caches[cache], here.v_caches[cache]
    settings = {"scale": scale * (k_scale or 1), "v_scale": v_scale or 1.0, "window": window, "soft_cap": soft_cap}
    form = {"interleaved": interleaved, "k_scale": k_scale, "v_scale": v_scale, "keep": here.fresh is not None}
    q, k, v = rows.rope_write(q, k, v, cos, sin, here.slots, k_cache, v_cache, **form)
    return _attend(q, k, v, alibi, here, cache, **settings)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None, step: DeviceStep, cache: int,
    *, scale: float, v_scale: float, window: int, soft_cap: float,
) -> Tensor:  # fmt: skip
    """Attention of what the cache holds already, and k and v with it."""
    k_cache, v_cache, tables = step.k_caches[cache], step.v_caches[cache], step.block_tables
    settings = {"scale": scale, "v_scale": v_scale, "window": window, "soft_cap": soft_cap}
    # Rows that only fill a step up are of no sequence, and keep what lies there; numbers that overflow would be told of on a CPU.
    made = torch.empty if q.is_cuda else torch.zeros
    out, count = made(q.shape, dtype=q.dtype, device=q.device), step.num_decodes
    if count:
        decodes.decode(
            q[:count], k_cache, v_cache, alibi, tables, step.rows[:count], step.lengths[:count], step.arrived, out[:count],
            **settings,
        )  # fmt: skip
    if step.starts is None:
        return out
    tiles, head_dim = step.tiles, k_cache.shape[-1]
    if step.fresh and alibi is None and not (window or soft_cap) and prompt.takes(q, k, v, head_dim):
        prompt.prompt(q, k, v, step.starts, step.fresh, out, head_dim=head_dim, scale=scale, v_scale=v_scale)
        tiles = step.cached
    if tiles:
        rest = (step.rows[count:], step.starts, step.lengths[count:], tiles)
        paged.prefill(q, k_cache, v_cache, alibi, tables, *rest, out, **settings)
    return out
