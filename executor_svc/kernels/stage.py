"""Triton kernels around a step: what the device keeps from one step to the next is found and put in place there.

Columns of a step lie at any multiple of 4 bytes, and counts are any: kernels are not compiled anew for those that are multiples
of 16 (here and wherever columns are read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["tokens", "positions", "rows"])
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
