"""What a linear's input is like over a calibration text."""

from functools import cached_property

import torch
from torch import Tensor

ROWS = 512
"""Tokens whose inputs are kept whole, spread over the text: what a search measures its candidates by."""


class Inputs:
    """Statistics of one input, by channel.

    Attributes:
        tokens: all that are coming.
        mean: of absolute values, float32 [channels].
        largest: absolute value, float32 [channels].
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._every, self._seen = -(-tokens // ROWS), 0
        self._sum, self.largest = torch.zeros(1), torch.zeros(1)
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """The next [T, channels]."""
        size = x.abs()
        self._sum = self._sum.to(x.device) + size.sum(0)
        self.largest = torch.maximum(self.largest.to(x.device), size.amax(0))
        self._kept.append(x[-self._seen % self._every :: self._every].clone())
        self._seen += len(x)

    @property
    def mean(self) -> Tensor:
        return self._sum / self._seen

    @cached_property
    def rows(self) -> Tensor:
        """float32 [at most ROWS, channels]."""
        return torch.cat(self._kept)

    @cached_property
    def _products(self) -> Tensor:
        return self.rows.T @ self.rows

    def loss(self, error: Tensor, scale: Tensor) -> Tensor:
        """The sum of squares by which outputs change with an error of the weight, a number.

        Args:
            error: [out, channels], of a weight that reads this input over the scale.
            scale: [channels].
        """
        error = error / scale
        if len(self.rows) < error.shape[1]:
            return (error @ self.rows.T).square().sum()
        return ((error @ self._products) * error).sum()

    def group_products(self, size: int, scale: Tensor) -> Tensor:
        """The products of channels within each group of the scaled input, float32 [groups, size, size]."""
        rows = (self.rows / scale).view(len(self.rows), -1, size).transpose(0, 1)
        return rows.transpose(1, 2) @ rows
