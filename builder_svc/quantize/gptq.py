"""Rounding with feedback (GPTQ; Frantar et al. 2022, arXiv 2210.17323).

Columns are rounded one after another, those with the largest inputs first. What one loses, those that are still to be rounded
make up for, as far as their inputs go along with its own. Scales are found before, so that groups may be met in any order.
"""

import torch
from torch import Tensor

from builder_svc.models.packed import Int4
from builder_svc.quantize.inputs import Inputs
from builder_svc.quantize.rounding import int4_scales, pack_int4

_DAMPING = 0.01  # of the mean of squares, added to each: a sample has too few tokens to tell all channels apart
_BLOCK = 128  # columns, whose feedback is given to all behind them in one product


class Feedback:
    """How columns make up for each other.

    Args:
        products: of the channels of what a weight reads, float32 [columns, columns].
    """

    def __init__(self, products: Tensor) -> None:
        self._order = products.diagonal().argsort(descending=True)
        damped = products[self._order][:, self._order].double()
        damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp(min=1e-12))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self._factor = torch.linalg.cholesky(inverse, upper=True).float()

    def rounded(self, weight: Tensor, form: Int4, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """The matrix of codes, as numbers that they stand for, float32 [rows, columns].

        Args:
            weight: float32 [rows, columns].
            scales, zeros: as `int4_scales` gives them.
        """
        left, group = weight[:, self._order], self._order // (form.group_size or weight.shape[1])
        steps, middles = scales[:, group], torch.full_like(left, 8) if zeros is None else zeros[:, group]
        found = torch.empty_like(left)
        for start in range(0, left.shape[1], _BLOCK):
            end = min(start + _BLOCK, left.shape[1])
            lost = torch.empty_like(left[:, start:end])
            for at in range(start, end):
                codes = (left[:, at] / steps[:, at]).round_().add_(middles[:, at]).clamp_(0, 15)
                found[:, at] = codes.sub_(middles[:, at]).mul_(steps[:, at])
                lost[:, at - start] = (left[:, at] - found[:, at]) / self._factor[at, at]
                left[:, at:end] -= lost[:, at - start, None] * self._factor[at, at:end]
            left[:, end:] -= lost @ self._factor[start:end, end:]
        return torch.empty_like(found).index_copy_(1, self._order, found)


def pack(weight: Tensor, form: Int4, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of `linear_int4`, with the scales that rounding to nearest has.

    Args:
        weight: float32 [out, channels].
    """
    scales, zeros = int4_scales(weight, form)
    return pack_int4(Feedback(inputs.products).rounded(weight, form, scales, zeros), form, scales, zeros)
