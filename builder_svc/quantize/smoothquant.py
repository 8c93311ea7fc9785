"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): channels whose activations reach far hand a part of that to their weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from builder_svc.quantize.inputs import Inputs
from builder_svc.quantize.sites import Rows


def input_scale(weights: Sequence[Tensor], inputs: Inputs, strength: float, rows: Rows | None) -> Tensor:
    """s = max|x| ^ strength / max|w| ^ (1 - strength) of each channel, float32 [channels]; activations are divided by it.

    Args:
        weights: float32 [out, channels] that read the input.
        rows: what takes the scale, if inputs must share theirs for it.
    """
    reach = inputs.largest
    size = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    if rows:
        reach, size = (rows.spread(rows.gathered(part).amax(0)) for part in (reach, size))
    scale = reach.clamp(min=1e-5) ** strength / size.clamp(min=1e-5) ** (1 - strength)
    return torch.where(reach > 0, scale.clamp(1e-5, 1e5), torch.ones_like(scale))
