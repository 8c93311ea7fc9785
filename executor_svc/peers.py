"""Sums over a tensor-parallel group of GPUs of one machine by our own kernel, which `kernels/reduce.py` explains.

$ENGINEHOUSE_ALL_REDUCE_BYTES says up to how many bytes of a message, and 0 that none goes this way (`peer_memory.py`). Larger
ones are NCCL's, as are all where ranks cannot write to each other's memory.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.program import Program
from executor_svc.group import Group
from executor_svc.kernels import fp8, gpu
from executor_svc.kernels.reduce import EMPTY, Buffers, all_reduce, all_reduce_norm, all_reduce_norm_small

log = logging.getLogger(__name__)


def open_buffers(program: Program, group: Group, rows: int, device: torch.device) -> Buffers | None:
    """Buffers for what a program sums of up to so many rows at once, or of as many as go this way; None where NCCL is to do it.

    Every rank calls it, and all find the same.
    """
    if not (most := group.most_shared()):
        return None
    summed = next((op.outputs[0].type for op in program.ops if op.op == "all_reduce"), None)
    columns = int(summed.shape[-1]) if summed else 1
    dtype = getattr(torch, summed.dtype) if summed else torch.float32
    return make_buffers(group, min(rows, most // (columns * dtype.itemsize)), columns, dtype, device)


def make_buffers(group: Group, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Buffers | None:
    """Buffers for up to so many rows; None where they are none, or the ranks cannot reach each other's memory."""
    addresses = rows and group.share(Buffers.size(group.tp_size, rows, columns, dtype), EMPTY[dtype])
    if not addresses:
        return None
    log.info("sums over %d ranks of up to %d rows go through memory that they share", group.tp_size, rows)
    turns = torch.zeros(rows, dtype=torch.int32, device=device)
    return Buffers(addresses, group.rank % group.tp_size, dtype, columns, rows, turns)


def summing(buffers: Buffers, group: Group) -> dict[str, Callable[..., Any]]:
    """`all_reduce`, and what `fuse` makes of it and the norm behind it."""
    bound: dict[str, Any] = {"buffers": buffers, "group": group}
    return {
        "all_reduce": partial(_all_reduce, **bound),
        "all_reduce_add_rms_norm": partial(_norm, **bound),
        "all_reduce_add_rms_norm_fp8": partial(_norm_small, small=fp8.F8, otherwise=gpu.add_rms_norm_fp8, **bound),
        "all_reduce_add_rms_norm_int8": partial(
            _norm_small, small=torch.int8, otherwise=gpu.add_rms_norm_int8, **bound
        ),
    }


def _all_reduce(x: Tensor, *, buffers: Buffers, group: Group) -> Tensor:
    return all_reduce(x, buffers) if buffers.take(x) else group.all_reduce(x)


def _norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, buffers: Buffers, group: Group
) -> tuple[Tensor, Tensor]:
    """A weight of another dtype is the reference's."""
    if buffers.take(x) and weight.dtype is x.dtype:
        return all_reduce_norm(x, residual, weight, eps, buffers)
    return gpu.add_rms_norm(_all_reduce(x, buffers=buffers, group=group), residual, weight, eps=eps)


def _norm_small(
    x: Tensor, residual: Tensor, weight: Tensor, input_scale: Tensor | None = None,
    *, eps: float, small: torch.dtype, otherwise: Callable[..., Any], buffers: Buffers, group: Group,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if buffers.take(x) and weight.dtype is x.dtype:
        return all_reduce_norm_small(x, residual, weight, input_scale, eps, small, buffers)
    made: tuple[Tensor, Tensor, Tensor] = otherwise(
        _all_reduce(x, buffers=buffers, group=group), residual, weight, input_scale, eps=eps
    )
    return made
