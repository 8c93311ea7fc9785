"""Triton kernels that work row by row: norms, activations and rotation.

With PDL (programmatic dependent launch, Hopper and later) a kernel is brought onto the device while the one before it still runs,
and waits (`gdc_wait`) before it reads what that one writes.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.target import capability

HEADS = 8  # that a program rotates
PART = 1024  # numbers of a row that a program multiplies


@functools.cache
def pdl() -> dict[str, bool]:
    """Options of a launch: whether the device has programmatic dependent launch."""
    return {"PDL": True, "launch_pdl": True} if capability() >= 90 else {"PDL": False}


@triton.jit
def wait_before(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first line of a kernel that reads what the kernel before it has written; ahead of it, what no kernel writes may be."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def to_small(value, scale, kind: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """`engine.ops.to_fp8` or `engine.ops.to_int8`, of scales of at least 2^-126; what is no number stays none in float8.

    The quotient is a product with 1 / scale, corrected by what then remains (Markstein 1990): slow instructions are for the scale
    alone. It is the nearest one; of -0 it is 0.
    """
    wide, inverse = value.to(tl.float32), 1.0 / scale
    near = tl.clamp(wide * inverse, -512.0, 512.0, propagate_nan=tl.PropagateNan.ALL)
    exact = tl.fma(tl.fma(-near, scale + tl.zeros_like(near), wide), inverse + tl.zeros_like(near), near)
    if kind == tl.int8:
        # to an integer: 1.5 * 2^23 leaves no room behind the point
        small = (tl.clamp(exact, -127.0, 127.0) + 12582912.0 - 12582912.0).to(tl.int8)
    else:
        small = tl.clamp(exact, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    return small


@triton.jit
def scaled(value, factors, size, eps):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """A whole row of `rms_norm`, whose weight is `factors`."""
    wide = value.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide) / size + eps)
    return (factors * wide.to(factors.dtype)).to(value.dtype)


@triton.jit
def normed(x, residual, factors, total, row, at, size, stride, eps, ADD: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """A row of `rms_norm`, or of `add_rms_norm`, whose sum it writes; `factors` are the weight."""
    inside = at < size
    value = tl.load(x + row * stride + at, inside, 0.0)
    if ADD:
        value += tl.load(residual + row * size + at, inside, 0.0)  # rounded to the dtype of x, as the reference does
        tl.store(total + row * size + at, value, inside)
    return scaled(value, factors, size, eps)


@triton.jit
def _norm(x, residual, weight, y, total, size, stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    factors = tl.load(weight + at, at < size, 0.0)
    wait_before(PDL)
    tl.store(y + row * size + at, normed(x, residual, factors, total, row, at, size, stride, eps, ADD), at < size)


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm of x [T, n], or of x + residual, and the sum (x itself without a residual)."""
    y = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _norm[(len(x),)](
        x, residual, weight, y, total, size, x.stride(0), eps,
        ADD=residual is not None, BLOCK=block, num_warps=max(4, min(16, block // 512)), **pdl(),
    )  # fmt: skip
    return y, total


@triton.jit
def gated(gate_up, row, at, size):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Numbers `at` of a row of `silu_mul`."""
    gate = tl.load(gate_up + row * 2 * size + at, at < size, 0.0)
    up = tl.load(gate_up + row * 2 * size + size + at, at < size, 0.0)
    wide = gate.to(tl.float32)
    return (wide * tl.sigmoid(wide)).to(gate.dtype) * up


@triton.jit
def _silu_mul(gate_up, y, highest, size, HIGHEST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    wait_before(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    value = gated(gate_up, row, at, size)
    tl.store(y + row * size + at, value, at < size)
    if HIGHEST:
        tl.store(highest + row * tl.num_programs(1) + part, tl.max(tl.abs(value.to(tl.float32))))


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * n] -> [T, n]."""
    return _gated(gate_up, None)


def silu_mul_parts(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_mul`, and the largest number, by its size, of each PART of a row, [T, ceil(n / PART)] float32."""
    highest = gate_up.new_empty(len(gate_up), triton.cdiv(gate_up.shape[1] // 2, PART), dtype=torch.float32)
    return _gated(gate_up, highest), highest


def _gated(gate_up: Tensor, highest: Tensor | None) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    _silu_mul[(rows, triton.cdiv(size, PART))](
        gate_up, y, highest, size, HIGHEST=highest is not None, BLOCK=PART, num_warps=4, **pdl()
    )
    return y


@triton.jit
def _turn(source, heads, there, cos, sin, half, D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    """Heads [HEADS] of a token at `source`, rotated, [HEADS, BLOCK]."""
    at = tl.arange(0, BLOCK)
    inside, turned = there[:, None] & (at < D)[None, :], at < 2 * half
    if INTERLEAVED:
        first = at % 2 == 0
        partner, angle = tl.where(first, at + 1, at - 1), at // 2
    else:
        first = at < half
        partner, angle = tl.where(first, at + half, at - half), tl.where(first, at, at - half)
    rows = source + heads[:, None] * D
    value = tl.load(rows + at[None, :], inside, 0.0)
    other = tl.load(rows + partner[None, :], inside & turned[None, :], 0.0).to(tl.float32)
    c, s = tl.load(cos + angle, turned, 1.0)[None, :], tl.load(sin + angle, turned, 0.0)[None, :]
    wide = value.to(tl.float32)
    return tl.where(first[None, :], wide * c - other * s, wide * c + other * s).to(value.dtype)


@triton.jit
def _rope(
    x, cos, sin, y, stride, half, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    wait_before(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    there = heads < H
    result = _turn(
        x + token * stride, heads, there, cos + token * half, sin + token * half, half, D, BLOCK, INTERLEAVED
    )
    target = y + token * H * D + heads[:, None] * D + at[None, :]
    tl.store(target, result, there[:, None] & (at < D)[None, :])


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, interleaved: bool) -> Tensor:
    """[T, heads * D], whose last dimension is contiguous, rotated by cos and sin [T, r / 2] float32."""
    heads = x.shape[1] // head_dim
    y = x.new_empty(x.shape)
    _rope[(len(x), triton.cdiv(heads, HEADS))](
        x, cos, sin, y, x.stride(0), cos.shape[-1], H=heads, D=head_dim, BLOCK=triton.next_power_of_2(head_dim), HEADS=HEADS,
        INTERLEAVED=interleaved, num_warps=4, **pdl(),
    )  # fmt: skip
    return y


@triton.jit
def _write(
    k, v, slots, k_cache, v_cache, k_stride, v_stride, k_scale, v_scale, size,
    SMALL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    wait_before(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    slot = tl.load(slots + token)
    keys, values = tl.load(k + token * k_stride + at, inside, 0.0), tl.load(v + token * v_stride + at, inside, 0.0)
    if SMALL:
        keys, values = (
            to_small(keys, k_scale, k_cache.dtype.element_ty),
            to_small(values, v_scale, v_cache.dtype.element_ty),
        )
    tl.store(k_cache + slot * size + at, keys, inside)
    tl.store(v_cache + slot * size + at, values, inside)


def write(
    k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: float, v_scale: float
) -> None:
    """Keys and values [T, G * D] into the rows slots [T] of the flattened caches; scales of 0 are those of no 8 bits."""
    size = k.shape[1]
    _write[(len(k), triton.cdiv(size, 1024))](
        k, v, slots, k_cache, v_cache, k.stride(0), v.stride(0), k_scale, v_scale, size,
        SMALL=k_scale != 0, BLOCK=1024, num_warps=4, **pdl(),
    )  # fmt: skip


@triton.jit
def _put(
    value, cache, kept, token, slot, heads, inside, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr, KEEP: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """Heads of a token into its row of the cache, and as they are there, in their own dtype, into a row of `kept`."""
    place = heads[:, None] * D + tl.arange(0, BLOCK)[None, :]
    if SMALL:
        value = to_small(value, scale, cache.dtype.element_ty)
    tl.store(cache + slot * G * D + place, value, inside)
    if KEEP:
        tl.store(kept + token * G * D + place, value.to(kept.dtype.element_ty), inside)


@triton.jit
def _rope_write(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    q_out,
    k_out,
    v_out,
    k_cache,
    v_cache,
    q_stride,
    k_stride,
    v_stride,
    k_scale,
    v_scale,
    half,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP: tl.constexpr,
    SMALL: tl.constexpr,
    PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001
    wait_before(PDL)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    queries: tl.constexpr = (H + HEADS - 1) // HEADS
    keys: tl.constexpr = (G + HEADS - 1) // HEADS
    mine, at = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    cos += token * half
    sin += token * half
    if part < queries:
        heads = part * HEADS + mine
        there = heads < H
        result = _turn(q + token * q_stride, heads, there, cos, sin, half, D, BLOCK, INTERLEAVED)
        target = q_out + token * H * D + heads[:, None] * D + at[None, :]
        tl.store(target, result, there[:, None] & (at < D)[None, :])
    elif part < queries + keys:
        heads = (part - queries) * HEADS + mine
        there = heads < G
        result = _turn(k + token * k_stride, heads, there, cos, sin, half, D, BLOCK, INTERLEAVED)
        inside = there[:, None] & (at < D)[None, :]
        _put(result, k_cache, k_out, token, tl.load(slots + token), heads, inside, k_scale, G, D, BLOCK, SMALL, KEEP)
    else:
        heads = (part - queries - keys) * HEADS + mine
        inside = (heads < G)[:, None] & (at < D)[None, :]
        value = tl.load(v + token * v_stride + heads[:, None] * D + at[None, :], inside, 0.0)
        slot = tl.load(slots + token)
        _put(value, v_cache, v_out, token, slot, heads, inside, v_scale, G, D, BLOCK, SMALL, KEEP and SMALL)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    *, interleaved: bool, k_scale: float = 0.0, v_scale: float = 0.0, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rope` of q and k and `write` of k and v in one kernel.

    Returns:
        The rotated q [T, H * D]; and where they are to be kept, k and v [T, G * D], as they were written, in the dtype of q.
    """
    groups, head_dim = k_cache.shape[-2:]
    tokens, heads = q.shape[0], q.shape[1] // head_dim
    out, k_out = q.new_empty(q.shape), k.new_empty(k.shape) if keep else k
    v_out = v.new_empty(v.shape) if keep and k_scale else v
    _rope_write[(tokens, triton.cdiv(heads, HEADS) + 2 * triton.cdiv(groups, HEADS))](
        q, k, v, cos, sin, slots, out, k_out, v_out, k_cache, v_cache, q.stride(0), k.stride(0), v.stride(0),
        k_scale, v_scale, cos.shape[-1],
        H=heads, G=groups, D=head_dim, BLOCK=triton.next_power_of_2(head_dim), HEADS=HEADS, INTERLEAVED=interleaved,
        KEEP=keep, SMALL=k_scale != 0, num_warps=4, **pdl(),
    )  # fmt: skip
    return out, k_out, v_out
