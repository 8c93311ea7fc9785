"""Tokens of logits, the most probable or drawn, and logits of forbidden tokens, by `csrc/choose.h` where it serves.

A mask is the address of a bit a token, from the lowest of its first byte on, in whole words of 32 bits; 0 allows every token.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from executor_svc.kernels import library

_library: Any = library.load()
_NONE: Mapping[int, float] = {}


def serves(logits: Tensor) -> bool:
    """Whether `tokens` and `forbid` take these logits [N, vocab]."""
    return _library is not None and logits.is_cpu and logits.dtype is torch.float32 and logits.stride(1) == 1


def tokens(
    logits: Tensor, masks: list[int], bits: int = 0, temperatures: Mapping[int, float] = _NONE, numbers: ArrayLike = ()
) -> Tensor:
    """A token of each row, int64 [N], of those that its mask allows. What is found of a row does not depend on the others.

    It is the most probable one, the first of equal ones, where a NaN counts as infinite; in rows that have a temperature, the
    first in the order of the vocabulary at which the sum of probabilities exceeds a number.

    Args:
        masks: one a row.
        bits: that each of them has.
        temperatures: above 0, by row. numbers: float64 in [0, 1), one for each of these rows, in their order.

    Raises:
        ValueError: fewer bits than tokens.
    """
    addresses, found = _addresses(logits, masks, bits), np.empty(len(logits), dtype=np.int64)
    heat, shares = np.zeros(len(logits), dtype=np.float32), np.zeros(len(logits))
    if temperatures:
        rows = list(temperatures)
        heat[rows], shares[rows] = list(temperatures.values()), numbers
    _library.enginehouse_choose(
        *(logits.data_ptr(), logits.stride(0), *logits.shape),
        *(addresses.ctypes.data, heat.ctypes.data, shares.ctypes.data, found.ctypes.data),
    )
    return torch.from_numpy(found)


def forbid(logits: Tensor, masks: list[int], bits: int) -> None:
    """Sets logits of tokens that a row's mask does not allow to -inf, in place. Masks, bits and errors as above."""
    addresses = _addresses(logits, masks, bits)
    _library.enginehouse_forbid(logits.data_ptr(), logits.stride(0), *logits.shape, addresses.ctypes.data)


def _addresses(logits: Tensor, masks: list[int], bits: int) -> np.ndarray:
    addresses = np.array(masks, dtype=np.uint64)
    if len(addresses) != len(logits) or (bits < logits.shape[1] and addresses.any()):
        raise ValueError(f"{len(masks)} masks of {bits} tokens do not belong to logits {list(logits.shape)}")
    return addresses
