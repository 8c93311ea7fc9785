"""Triton kernels that work row by row: norms, activations, rotation, and products with few rows.

With PDL (programmatic dependent launch, Hopper and later) a kernel is brought onto the device while the one before it still runs,
and waits (`gdc_wait`) before it reads what that one writes.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.target import capability

HEADS = 8  # that a program rotates


@functools.cache
def pdl() -> dict[str, bool]:
    """Options of a launch: whether the device has programmatic dependent launch."""
    return {"PDL": True, "launch_pdl": True} if capability() >= 90 else {"PDL": False}


@triton.jit
def wait_before(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first line of a kernel that reads what the kernel before it has written."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _norm(x, residual, weight, y, total, size, stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    wait_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * stride + at, inside, 0.0)
    if ADD:
        value += tl.load(residual + row * size + at, inside, 0.0)  # rounded to the dtype of x, as the reference does
        tl.store(total + row * size + at, value, inside)
    wide = value.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide) / size + eps)
    scales = tl.load(weight + at, inside, 0.0)
    tl.store(y + row * size + at, (scales * wide.to(scales.dtype)).to(value.dtype), inside)


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
def _silu_mul(gate_up, y, size, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    wait_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, inside, 0.0)
    up = tl.load(gate_up + row * 2 * size + size + at, inside, 0.0)
    wide = gate.to(tl.float32)
    tl.store(y + row * size + at, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * n] -> [T, n]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    _silu_mul[(rows, triton.cdiv(size, 1024))](gate_up, y, size, BLOCK=1024, num_warps=4, **pdl())
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
def _write(k, v, slots, k_cache, v_cache, k_stride, v_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    wait_before(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    slot = tl.load(slots + token)
    tl.store(k_cache + slot * size + at, tl.load(k + token * k_stride + at, inside, 0.0), inside)
    tl.store(v_cache + slot * size + at, tl.load(v + token * v_stride + at, inside, 0.0), inside)


def write(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Keys and values [T, G * D] into the rows slots [T] of the flattened caches."""
    size = k.shape[1]
    _write[(len(k), triton.cdiv(size, 1024))](
        k, v, slots, k_cache, v_cache, k.stride(0), v.stride(0), size, BLOCK=1024, num_warps=4, **pdl()
    )


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
    k_cache,
    v_cache,
    q_stride,
    k_stride,
    v_stride,
    half,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP: tl.constexpr,
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
        target = k_cache + tl.load(slots + token) * G * D + heads[:, None] * D + at[None, :]
        tl.store(target, result, there[:, None] & (at < D)[None, :])
        if KEEP:
            target = k_out + token * G * D + heads[:, None] * D + at[None, :]
            tl.store(target, result, there[:, None] & (at < D)[None, :])
    else:
        heads = (part - queries - keys) * HEADS + mine
        inside = (heads < G)[:, None] & (at < D)[None, :]
        value = tl.load(v + token * v_stride + heads[:, None] * D + at[None, :], inside, 0.0)
        target = v_cache + tl.load(slots + token) * G * D + heads[:, None] * D + at[None, :]
        tl.store(target, value, inside)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    *, interleaved: bool, keep: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rope` of q and k and `write` of k and v in one kernel; the rotated q [T, H * D] and, to keep, k [T, G * D]."""
    groups, head_dim = k_cache.shape[-2:]
    tokens, heads = q.shape[0], q.shape[1] // head_dim
    out, k_out = q.new_empty(q.shape), k.new_empty(k.shape) if keep else k
    _rope_write[(tokens, triton.cdiv(heads, HEADS) + 2 * triton.cdiv(groups, HEADS))](
        q, k, v, cos, sin, slots, out, k_out, k_cache, v_cache, q.stride(0), k.stride(0), v.stride(0), cos.shape[-1],
        H=heads, G=groups, D=head_dim, BLOCK=triton.next_power_of_2(head_dim), HEADS=HEADS, INTERLEAVED=interleaved,
        KEEP=keep, num_warps=4, **pdl(),
    )  # fmt: skip
    return out, k_out


@triton.jit
def _gemv(
    x,
    weight,
    bias,
    y,
    columns,
    x_stride,
    rows_out,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    out = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    ours = weight + out * columns + at
    ahead = tl.load(ours, at < columns, 0.0)  # no kernel before this one writes weights
    wait_before(PDL)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        w = ahead.to(tl.float32)
        ahead = tl.load(ours + start + BLOCK, start + BLOCK + at < columns, 0.0)
        inside = start + at < columns
        values = tl.load(x + row[:, None] * x_stride + start + at[None, :], inside[None, :], 0.0).to(tl.float32)
        sums += values * w[None, :]
    result = tl.sum(sums, 1)
    if BIAS:
        result += tl.load(bias + out).to(tl.float32)
    tl.store(y + row * rows_out + out, result.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def _thin(
    x,
    weight,
    bias,
    y,
    rows,
    outputs,
    columns,
    x_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001
    out = tl.program_id(0) * N + tl.arange(0, N)
    row, at = tl.arange(0, M), tl.arange(0, K)
    ours = weight + out.to(tl.int64)[:, None] * columns + at[None, :]
    wait_before(PDL)
    sums = tl.zeros((N, M), tl.float32)
    for start in range(0, columns, K):
        inside = start + at < columns
        w = tl.load(ours + start, (out < outputs)[:, None] & inside[None, :], 0.0, eviction_policy="evict_first")
        values = tl.load(
            x + row[None, :] * x_stride + (start + at)[:, None], (row < rows)[None, :] & inside[:, None], 0.0
        )
        sums = tl.dot(w, values, sums)
    if BIAS:
        sums += tl.load(bias + out, out < outputs, 0.0).to(tl.float32)[:, None]
    there = (out < outputs)[:, None] & (row < rows)[None, :]
    tl.store(y + row.to(tl.int64)[None, :] * outputs + out[:, None], sums.to(y.dtype.element_ty), there)


def thin(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, n: int = 64, k: int = 128, stages: int = 5, warps: int = 4
) -> Tensor:
    """linear for up to 64 rows: the weight is the tall side of the product, and is read once."""
    rows, (outputs, columns) = x.shape[0], weight.shape
    y = x.new_empty(rows, outputs)
    _thin[(triton.cdiv(outputs, n),)](
        x, weight, bias, y, rows, outputs, columns, x.stride(0), M=max(16, triton.next_power_of_2(rows)), N=n, K=k,
        BIAS=bias is not None, num_stages=stages, num_warps=warps, **pdl(),
    )  # fmt: skip
    return y


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear for 1, 2 or 4 rows of x: each row of the weight is read once, at memory's speed."""
    rows, (outputs, columns) = x.shape[0], weight.shape
    y = x.new_empty(rows, outputs)
    _gemv[(outputs,)](
        x,
        weight,
        bias,
        y,
        columns,
        x.stride(0),
        outputs,
        ROWS=rows,
        BIAS=bias is not None,
        BLOCK=2048,
        num_warps=4,
        **pdl(),
    )
    return y
