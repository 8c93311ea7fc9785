"""Triton kernels around a step: what the device keeps from one step to the next is found and put in place there.

Columns of a step lie at any multiple of 4 bytes, and counts are any: kernels are not compiled anew for those that are multiples
of 16 (here and wherever columns are read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.rows import pdl, wait_before

_CHUNK = 8192  # logits that a program looks through


@triton.jit(
    do_not_specialize=["count"], do_not_specialize_on_alignment=["tokens", "positions", "rows", "token_ids", "slots"]
)
def _stage(tokens, positions, rows, last, tables, token_ids, slots, count, width, page, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(rows + at, inside, 0)
    token = tl.load(tokens + at, inside, 0)
    token = tl.where(token < 0, tl.load(last + row, inside, 0), token)
    position = tl.load(positions + at, inside, 0)
    block = tl.load(tables + row.to(tl.int64) * width + position // page, inside, 0).to(tl.int64)
    tl.store(token_ids + at, token, inside)
    tl.store(slots + at, block * page + position % page, inside)


def stage(
    tokens: Tensor, positions: Tensor, rows: Tensor, last: Tensor, tables: Tensor, page: int
) -> tuple[Tensor, Tensor]:
    """Token ids int32 [T], of those below 0 the last one of their row; and their rows of the flattened cache, int64 [T].

    Args:
        rows: [T], the table row of each token. last: the last token by row. tables: [rows, blocks].
    """
    token_ids = torch.empty_like(tokens)
    slots = torch.empty_like(tokens, dtype=torch.int64)
    count = len(tokens)
    _stage[(triton.cdiv(count, 128),)](
        tokens, positions, rows, last, tables, token_ids, slots, count, tables.shape[1], page, BLOCK=128
    )
    return token_ids, slots


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["updates"])
def _put(tables, updates, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(updates + 2 * at, at < count, -1)
    tl.store(tables + entry, tl.load(updates + 2 * at + 1, at < count, 0), entry >= 0)


def put(tables: Tensor, updates: Tensor) -> None:
    """Writes blocks into the flattened tables: pairs of entry and block, of which an entry below 0 is none."""
    count = len(updates) // 2
    if count:
        _put[(triton.cdiv(count, 128),)](tables, updates, count, BLOCK=128)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["rows", "sampled"])
def _keep(last, rows, sampled, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(last + tl.load(rows + at, inside, 0), tl.load(sampled + at, inside, 0), inside)


def keep(last: Tensor, rows: Tensor, sampled: Tensor) -> None:
    """Keeps each row's sampled token."""
    if len(rows):
        _keep[(triton.cdiv(len(rows), 128),)](last, rows, sampled, len(rows), BLOCK=128)


@triton.jit
def _highest(logits, values, places, vocab, stride, CHUNK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    wait_before(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(logits + row.to(tl.int64) * stride + at, at < vocab, float("-inf")).to(tl.float32)
    value = tl.max(tl.where(found == found, found, float("-inf")), 0)  # and then where: less work than both at once
    place = tl.min(tl.where((found == value) & (at < vocab), at, vocab), 0)
    target = row * tl.num_programs(1) + chunk
    tl.store(values + target, value)
    tl.store(places + target, tl.where(place < vocab, place, chunk * CHUNK))  # of NaN alone the first


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _choose(values, places, rows, last, sampled, CHUNKS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    wait_before(PDL)
    row = tl.program_id(0)
    at = row * CHUNKS + tl.arange(0, WIDE)
    _, chunk = tl.max(tl.load(values + at, tl.arange(0, WIDE) < CHUNKS, float("-inf")), 0, return_indices=True)
    token = tl.load(places + row * CHUNKS + chunk)
    tl.store(sampled + row, token)
    tl.store(last + tl.load(rows + row), token)


def choose(logits: Tensor, rows: Tensor, last: Tensor) -> Tensor:
    """The most probable token of each row of logits [n, vocab], the first of equal ones, int32 [n]; kept by table row, too."""
    count, vocab = logits.shape
    sampled = torch.empty_like(rows)
    chunks = triton.cdiv(vocab, _CHUNK)
    values = logits.new_empty((count, chunks), dtype=torch.float32)
    places = torch.empty_like(values, dtype=torch.int32)
    if count:
        _highest[(count, chunks)](logits, values, places, vocab, logits.stride(0), CHUNK=_CHUNK, num_warps=8, **pdl())
        wide = triton.next_power_of_2(chunks)
        _choose[(count,)](values, places, rows, last, sampled, CHUNKS=chunks, WIDE=wide, num_warps=1, **pdl())
    return sampled
