"""Activation-aware weight quantization (Lin et al. 2023, arXiv 2306.00978).

Weights whose inputs are large matter most. Before rounding, each input channel's weights are multiplied by a scale and the input
is divided by it: s = mean|x| ^ alpha, the alpha being the one of a grid by which a sample's outputs change least. Then groups are
clipped, where that makes their part of the outputs better. Queries' and keys' rows are not clipped: their products would double
the error. Beyond the paper, weights are rounded with feedback, as GPTQ does (`gptq.py`), and:

* Where a scale would not help once there is feedback, there is none: that is tried on some rows.
* Codes that change outputs least are of weights that are too small, by 1 or 2%. A layer's noise is its own, but that they shrink
  is common to all of them, and adds up. So each group's scale, and in the end each row's, is such that a sample's outputs keep
  the size that they have in the direction of the right ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from builder_svc.models.packed import Int4
from builder_svc.quantize.gptq import Feedback
from builder_svc.quantize.inputs import Inputs
from builder_svc.quantize.rounding import grouped, int4_rounded, int4_scales, pack_int4, stored
from builder_svc.quantize.sites import Rows

_ALPHAS = tuple(step / 20 for step in range(20))
_SHRUNK = tuple(1 - step / 20 for step in range(11))
_FITS = 3
_ROWS = 4096  # of a weight, that are clipped at a time
_TRIED = 1024  # rows of a weight, about, that tell whether a scale helps
_MOST = 1.25  # times as large as its codes make it a group or row becomes, or as small


def input_scale(weights: Sequence[tuple[Tensor, Int4]], inputs: Inputs, rows: Rows | None) -> Tensor:
    """The scale of each channel, float32 [channels], with which the least is lost in all of these weights together.

    Args:
        weights: float32 [out, channels] that read the input, and their forms.
        rows: what takes the scale, if inputs must share theirs for it.
    """
    mean = inputs.mean
    if rows:
        mean = rows.spread(rows.gathered(mean).mean(0))
    mean = mean.clamp(min=1e-6)
    best, least = torch.ones_like(mean), torch.tensor(float("inf"))
    for alpha in _ALPHAS:
        scale = mean**alpha
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        lost = torch.zeros(())
        for weight, form in weights:
            scaled = weight * scale
            lost = lost.to(weight.device) + inputs.loss(
                int4_rounded(scaled, form, *int4_scales(scaled, form)) - scaled, scale
            )
        if lost < least.to(lost.device):
            best, least = scale, lost
    ones = torch.ones_like(best)
    return best if _after_feedback(weights, inputs, best) < _after_feedback(weights, inputs, ones) else ones


def _after_feedback(weights: Sequence[tuple[Tensor, Int4]], inputs: Inputs, scale: Tensor) -> float:
    """The squares by which a sample's outputs of some rows change that are rounded with feedback, unclipped."""
    products, lost = inputs.scaled_products(scale), 0.0
    feedback = Feedback(products)
    for weight, form in weights:
        some = weight[:: max(1, len(weight) // _TRIED)] * scale
        error = feedback.rounded(some, form, *int4_scales(some, form)) - some
        lost += float(((error @ products) * error).sum())
    return lost


def pack_clipped(weight: Tensor, form: Int4, inputs: Inputs, scale: Tensor, kept: int = 0) -> dict[str, Tensor]:
    """The tensors of `linear_int4`, each group by the range that changes its part of the outputs least.

    Without zero points a group's scale may be negative: the code -8 then stands for its largest number, which one of 7 would
    need a larger scale for.

    Args:
        weight: float32 [out, channels], scaled.
        inputs, scale: of what it reads, unscaled, and the scale.
        kept: the first rows, which are not clipped.
    """
    whole, size = inputs.scaled_products(scale), form.group_size or weight.shape[1]
    feedback = Feedback(whole)
    products = whole.view(-1, size, len(whole) // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    pieces = []
    for start in range(0, len(weight), _ROWS):
        piece = weight[start : start + _ROWS]
        unclipped = torch.arange(start, start + len(piece), device=weight.device) < kept
        scales, zeros = _best(piece, form, products, unclipped)
        rounded = feedback.rounded(piece, form, scales, zeros)
        across = piece @ whole
        sized = stored(scales * _larger((across * piece).sum(1), (across * rounded).sum(1))[:, None], form)
        rounded = (grouped(rounded, form) * (sized / scales)[..., None]).view_as(piece)
        pieces.append(pack_int4(rounded, form, sized, zeros))
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _best(weight: Tensor, form: Int4, products: Tensor, unclipped: Tensor) -> tuple[Tensor, Tensor | None]:
    scales, zeros = int4_scales(weight, form)
    least = _lost(weight, form, products, scales, zeros)
    for shrunk in _SHRUNK:
        candidates = [int4_scales(weight, form, shrunk)]
        if not form.zeros:
            groups = grouped(weight, form)
            extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
            candidates.append((stored(extreme * (-shrunk / 8), form), None))
        for tried, middle in candidates:
            lost = _lost(weight, form, products, tried, middle)
            better = lost < least
            if shrunk < 1:
                better &= ~unclipped[:, None]
            scales, least = torch.where(better, tried, scales), torch.where(better, lost, least)
            if zeros is not None and middle is not None:
                zeros = torch.where(better, middle, zeros)
    for _ in range(_FITS):
        fitted = stored(_least_squares(weight, form, products, scales, zeros), form)
        lost = _lost(weight, form, products, fitted, zeros)
        scales, least = torch.where(lost < least, fitted, scales), torch.where(lost < least, lost, least)
    return stored(_sized(weight, form, products, scales, zeros), form), zeros


def _sized(weight: Tensor, form: Int4, products: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The scale by which each group's codes, as they are, have the weight's size in the weight's direction: [rows, groups].

    Of positive ones, as it was measured (bench/LOG.md, 2026-11-30): negative ones stay those of least squares.
    """
    groups = grouped(weight, form)
    across = torch.bmm(groups.transpose(0, 1), products).transpose(0, 1)
    along = (across * grouped(int4_rounded(weight, form, scales, zeros), form)).sum(-1)
    return torch.where(scales > 0, scales * _larger((across * groups).sum(-1), along), scales)


def _larger(wanted: Tensor, found: Tensor) -> Tensor:
    """How many times; 1 where it would be out of all proportion, as of what is nearly nothing."""
    times = wanted / found
    return torch.where((times > 1 / _MOST) & (times < _MOST), times, 1)


def _least_squares(weight: Tensor, form: Int4, products: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The scale with which each group's codes, as they are, change its part of the outputs least: [rows, groups]."""
    codes = grouped(int4_rounded(weight, form, scales, zeros), form) / scales[..., None]
    across = torch.bmm(codes.transpose(0, 1), products).transpose(0, 1)
    size = (across * codes).sum(-1)
    return torch.where(size > 0, (across * grouped(weight, form)).sum(-1) / size, scales)


def _lost(weight: Tensor, form: Int4, products: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """[rows, groups]: the squares by which each group's part of the outputs changes."""
    error = grouped(int4_rounded(weight, form, scales, zeros) - weight, form).transpose(0, 1)
    return (torch.bmm(error, products) * error).sum(-1).T
