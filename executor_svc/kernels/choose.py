"""The most probable tokens of logits, and logits of forbidden tokens, by `csrc/choose.h` where it serves.

A mask is the address of a bit a token, from the lowest of its first byte on, in whole words of 32 bits; 0 allows every token.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor_svc.kernels import library

_library: Any = library.load()


def serves(logits: Tensor) -> bool:
    """Whether `best` and `forbid` take these logits [N, vocab]."""
    return _library is not None and logits.is_cpu and logits.dtype is torch.float32 and logits.stride(1) == 1


def best(logits: Tensor, masks: list[int], bits: int = 0) -> Tensor:
    """Each row's most probable token of those that its mask allows, int64 [N]: the first of equal ones; a NaN counts as infinite.

    Args:
        masks: one a row.
        bits: that each of them has.

    Raises:
        ValueError: fewer than tokens.
    """
    addresses, tokens = _addresses(logits, masks, bits), np.empty(len(logits), dtype=np.int64)
    _library.enginehouse_best(
        *(logits.data_ptr(), logits.stride(0), *logits.shape),
        *(addresses.ctypes.data, tokens.ctypes.data),
    )
    return torch.from_numpy(tokens)


def forbid(logits: Tensor, masks: list[int], bits: int) -> None:
    """Sets logits of tokens that a row's mask does not allow to -inf, in place. Arguments and errors as above."""
    addresses = _addresses(logits, masks, bits)
    _library.enginehouse_forbid(logits.data_ptr(), logits.stride(0), *logits.shape, addresses.ctypes.data)


def _addresses(logits: Tensor, masks: list[int], bits: int) -> np.ndarray:
    addresses = np.array(masks, dtype=np.uint64)
    if len(addresses) != len(logits) or (bits < logits.shape[1] and addresses.any()):
        raise ValueError(f"{len(masks)} masks of {bits} tokens do not belong to logits {list(logits.shape)}")
    return addresses
