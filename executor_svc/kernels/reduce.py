"""A Triton kernel for the sum over a tensor-parallel group, and the norm behind it, through memory that the ranks' GPUs share.

One shot: each rank writes its rows into a buffer of every other rank, and sums its own and what comes. Nothing is told
beside the data: a buffer is empty where it has the bits of -0.0, which are never sent (as in TensorRT-LLM's one-shot kernels and
NCCL's protocol LL), so that no fence has to wait until what was written has arrived at the other end of the link.

A buffer has two halves, which a row uses by turns, and whoever has read a row leaves its place empty. Why that is safe:

* What is read has come: each number says so by itself, in whatever order and width they arrive. Reads are volatile: they are not
  of the L1 cache, and made again at each turn of the loop.
* What is still to be read or emptied is not overwritten. A rank writes into the same half for the second time when it has
  received that row once more in between, from everybody. Who has sent that had ended its kernel of the first time, emptying
  included, for a kernel writes nothing before `wait_before`, which waits for the kernels before. So programmatic dependent
  launch changes nothing: what it brings early has yet to pass this line, in this kernel and in the next one, which may be there
  and read its weights while this one waits for its peers.
* How many rows there are may change from one sum to the next: each row has a place and a turn of its own, which lies in the
  device's memory, so that a replayed graph goes on where the last one has ended.
* It always ends. A program writes a row before it waits for that row, and a few ahead, in the order in which the same program
  of the other ranks waits for them; and there are no more programs than multiprocessors, so that all are on the device at once
  as soon as the kernels before have ended, whatever other ranks do. In a pipeline NCCL receives beside them, which four GPUs
  are needed to try.
* All ranks get the same bits: each adds the same numbers in float32, in the order of the ranks. The sum is then rounded, before
  anything is added to it, as by the operators one after another.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.fp8 import keep
from executor_svc.kernels.rows import pdl, scaled, wait_before

PER_WARP = 512  # numbers of a row, at least
AHEAD = tl.constexpr(4)  # rows that a program has sent before it waits for the first
EMPTY = {torch.bfloat16: 0x80008000, torch.float16: 0x80008000, torch.float32: 0x80000000}  # 32 bits of it, by dtype


@dataclass(frozen=True)
class Buffers:
    """Where a rank's group has its buffers, each of `size` bytes as this rank sees it.

    Attributes:
        addresses: by rank in the tensor-parallel group.
        rank: this one's place there.
        dtype, columns: of what is summed. rows: at most.
        turns: int32 [rows], zeros at first.
    """

    addresses: Sequence[int]
    rank: int
    dtype: torch.dtype
    columns: int
    rows: int
    turns: Tensor

    @staticmethod
    def size(ranks: int, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Bytes of one rank's buffer."""
        return 2 * ranks * _capacity(rows, columns) * dtype.itemsize

    def take(self, x: Tensor) -> bool:
        """Whether they hold it; the same on all ranks."""
        return x.dtype is self.dtype and x.shape[1] == self.columns and 0 < len(x) <= self.rows


@functools.cache
def _programs(device: torch.device) -> int:
    """That are on the device at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _something(values):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The same numbers, of which -0.0, which would be nothing, is 0.0."""
    return tl.where(values == 0, 0.0, values).to(values.dtype)


@triton.jit
def _send(x, buffers, turns, row, rank, size, capacity, at, inside, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Writes a row to all other ranks."""
    place = tl.load(turns + row, volatile=True) * WORLD * capacity + row * size
    mine = _something(tl.load(x + row * size + at, inside, 0.0))
    for peer in tl.static_range(WORLD):
        theirs = tl.multiple_of(buffers[peer].to(tl.pointer_type(x.dtype.element_ty)), 16)
        tl.store(theirs + (place + rank * capacity) + at, mine, inside & (peer != rank))


@triton.jit(do_not_specialize=["rows", "rank"], do_not_specialize_on_alignment=["input_scale"])
def _reduce(
    x, buffers, own, turns, rows, rank, residual, weight, input_scale, y, scales, total, size, capacity, eps,
    WORLD: tl.constexpr, ADD: tl.constexpr, SMALL: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    """capacity: numbers that a rank has room for in a half."""
    first, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < size
    KIND: tl.constexpr = x.dtype.element_ty
    BITS: tl.constexpr = tl.int32 if KIND.primitive_bitwidth == 32 else tl.int16
    NOTHING: tl.constexpr = -2147483648 if KIND.primitive_bitwidth == 32 else -32768  # the least of all integers
    factors = tl.load(weight + at, inside, 0.0) if ADD else 0
    wait_before(PDL)
    ahead = AHEAD * tl.num_programs(0)
    for row in range(first, tl.minimum(rows, ahead), tl.num_programs(0)):
        _send(x, buffers, turns, row, rank, size, capacity, at, inside, WORLD)
    for row in range(first, rows, tl.num_programs(0)):
        turn, there = tl.load(turns + row, volatile=True), row * size + at
        mine = _something(tl.load(x + there, inside, 0.0))
        before = tl.load(residual + there, inside, 0.0) if ADD else 0
        ours = tl.multiple_of(own.to(tl.pointer_type(KIND)), 16) + (turn * WORLD * capacity + row * size) + at
        sums, least = tl.zeros((BLOCK,), tl.float32), NOTHING
        while least == NOTHING:
            if WORLD == 2:  # whose sum does not depend on the order
                part = tl.load(ours + (1 - rank) * capacity, inside, 0.0, volatile=True)
                bits, sums = part.to(BITS, bitcast=True), mine.to(tl.float32) + part.to(tl.float32)
            else:
                sums, bits = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), BITS)
                for peer in tl.static_range(WORLD):
                    part = tl.load(ours + peer * capacity, inside & (peer != rank), 0.0, volatile=True)
                    part = tl.where(peer == rank, mine, part)
                    bits = tl.minimum(bits, part.to(BITS, bitcast=True))
                    sums += part.to(tl.float32)
            least = tl.min(bits).to(tl.int32)
        value = sums.to(KIND)
        if ADD:
            value += before
            tl.store(total + there, value, inside)
            value = scaled(value, factors, size, eps)
        if SMALL:
            keep(value, tl.max(tl.abs(value.to(tl.float32))), input_scale, y, scales, row, at, size, STATIC)
        else:
            tl.store(y + there, value, inside)
        for peer in tl.static_range(WORLD):
            nothing = tl.full((BLOCK,), NOTHING, BITS).to(KIND, bitcast=True)
            tl.store(ours + peer * capacity, nothing, inside & (peer != rank))
        tl.store(turns + row, 1 - turn)
        if row + ahead < rows:
            _send(x, buffers, turns, row + ahead, rank, size, capacity, at, inside, WORLD)


def _launch(
    x: Tensor, buffers: Buffers, y: Tensor, residual: Tensor | None = None, weight: Tensor | None = None,
    input_scale: Tensor | None = None, scales: Tensor | None = None, total: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    size, addresses = buffers.columns, tuple(buffers.addresses)
    block = triton.next_power_of_2(size)
    _reduce[(min(len(x), _programs(x.device)),)](
        x.contiguous(), addresses, addresses[buffers.rank], buffers.turns, len(x), buffers.rank, residual, weight, input_scale,
        y, scales, total, size, _capacity(buffers.rows, size), eps,
        WORLD=len(addresses), ADD=residual is not None, SMALL=scales is not None, STATIC=input_scale is not None, BLOCK=block,
        num_warps=max(4, min(16, block // PER_WARP)), **pdl(),
    )  # fmt: skip


def _capacity(rows: int, columns: int) -> int:
    """Numbers of a rank in a half, a multiple of 16: then kernels are the same for any number of rows."""
    return -(-rows * columns // 16) * 16


def all_reduce(x: Tensor, buffers: Buffers) -> Tensor:
    """The sum over the group of x [T, n], which `buffers` take."""
    y = x.new_empty(x.shape)
    _launch(x, buffers, y)
    return y


def all_reduce_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """`rows.norm` of the sum over the group: the norm, and the sum with the residual."""
    y, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, buffers, y, residual, weight, total=total, eps=eps)
    return y, total


def all_reduce_norm_small(
    x: Tensor, residual: Tensor, weight: Tensor, input_scale: Tensor | None, eps: float, kind: torch.dtype, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fp8.norm` of the sum over the group."""
    q, total = x.new_empty(x.shape, dtype=kind), x.new_empty(x.shape)
    scales = x.new_empty(len(x), 1, dtype=torch.float32)
    _launch(x, buffers, q, residual, weight, input_scale, scales, total, eps)
    return q, scales, total
