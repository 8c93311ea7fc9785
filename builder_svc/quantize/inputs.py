"""What a linear's input is like over a calibration text."""

from functools import cached_property

import torch
from torch import Tensor

ROWS = 512
"""Tokens whose inputs are kept whole, of all places of all sequences."""
_SUMMED = 16384  # tokens of whose inputs the products are summed
_NARROW = 2048  # channels, up to which these products cost less than they tell


class Inputs:
    """Statistics of one input, by channel.

    Attributes:
        tokens: all that are coming.
        mean: of absolute values, float32 [channels].
        largest: absolute value, float32 [channels].
        products: of every two channels, summed over a sample of tokens, float32 [channels, channels], if they are asked for.
    """

    def __init__(self, tokens: int, with_products: bool = False) -> None:
        self.tokens = tokens
        # By chance, since sequences of one length have their first tokens, which are like no others, at one distance.
        chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))
        self._chosen = chosen[:ROWS].sort().values
        self._summed = chosen[: _SUMMED if with_products else 0].sort().values
        self.products = torch.zeros(1)
        self._seen = 0
        self._sum, self.largest = torch.zeros(1), torch.zeros(1)
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """The next [T, channels]."""
        size = x.abs()
        self._sum = self._sum.to(x.device) + size.sum(0)
        self.largest = torch.maximum(self.largest.to(x.device), size.amax(0))
        self._kept.append(self._of(self._chosen, x))
        if len(self._summed):
            some = self._of(self._summed, x)
            self.products = self.products.to(x.device) + some.T @ some
        self._seen += len(x)

    def _of(self, chosen: Tensor, x: Tensor) -> Tensor:
        here = chosen[(chosen >= self._seen) & (chosen < self._seen + len(x))]
        return x[(here - self._seen).to(x.device)]

    @property
    def mean(self) -> Tensor:
        return self._sum / self._seen

    @cached_property
    def rows(self) -> Tensor:
        """float32 [at most ROWS, channels]."""
        return torch.cat(self._kept)

    def loss(self, error: Tensor, scale: Tensor) -> Tensor:
        """The sum of squares by which a sample's outputs change with an error of the weight, a number; needs products.

        Args:
            error: [out, channels], of a weight that reads this input over the scale.
            scale: [channels].
        """
        error = error / scale
        if error.shape[1] > _NARROW:
            return (error @ self.rows.T).square().sum()
        return ((error @ self.products) * error).sum()

    def scaled_products(self, scale: Tensor) -> Tensor:
        """`products` of the input over the scale [channels]."""
        return self.products / scale / scale[:, None]
