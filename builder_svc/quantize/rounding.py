"""Rounds a matrix to nearest: what stands in a packed form, and the matrix that it stands for."""

import torch
from torch import Tensor

from builder_svc.models.packed import Fp8, Int4, Int8, Packed
from engine.ops import DENSE, FP8_MAX, INT8_MAX

_SMALLEST = 1e-7  # scale, which float16 still has: groups of zeros keep codes of zeros


def grouped(weight: Tensor, form: Int4) -> Tensor:
    """[rows, columns] -> [rows, groups, group_size], a view."""
    return weight.view(weight.shape[0], -1, form.group_size or weight.shape[1])


def int4_scales(weight: Tensor, form: Int4, shrunk: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group.

    Args:
        weight: float32 [rows, columns].
        shrunk: share of the group's range that codes are for; what is beyond is clipped.

    Returns:
        float32 [rows, groups], as the form's dtype has them, and float32 [rows, groups] from 0 to 15 where the form has zeros:
        codes are (weight / scale) + zero.
    """
    groups = grouped(weight, form)
    if not form.zeros:
        return stored(groups.abs().amax(-1) * shrunk / 7.5, form), None  # between the reach of 7 and of -8
    low, high = groups.amin(-1).clamp(max=0) * shrunk, groups.amax(-1).clamp(min=0) * shrunk
    scales = stored((high - low) / 15, form)
    return scales, (-low / scales).round().clamp(0, 15)


def stored(scales: Tensor, form: Int4) -> Tensor:
    """As the form's dtype has them, and never 0."""
    found = scales.to(getattr(torch, form.scales)).float()
    return torch.where(found.abs() < _SMALLEST, torch.full_like(found, _SMALLEST).copysign(found), found)


def int4_codes(weight: Tensor, form: Int4, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """0 ... 15, float32 [rows, groups, group_size]."""
    middle = 8 if zeros is None else zeros[..., None]
    return (grouped(weight, form) / scales[..., None]).round_().add_(middle).clamp_(0, 15)


def int4_rounded(weight: Tensor, form: Int4, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The matrix that the codes stand for, float32 [rows, columns]."""
    middle = 8 if zeros is None else zeros[..., None]
    return int4_codes(weight, form, scales, zeros).sub_(middle).mul_(scales[..., None]).view_as(weight)


def pack_int4(weight: Tensor, form: Int4, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
    """The tensors of `linear_int4`."""
    codes = int4_codes(weight, form, scales, zeros).to(torch.uint8).flatten(1)
    found = {"weight": codes[:, 0::2] | codes[:, 1::2] << 4, "scales": scales.to(getattr(torch, form.scales))}
    return found | ({} if zeros is None else {"zeros": zeros.to(torch.uint8)})


def pack(weight: Tensor, form: Packed) -> dict[str, Tensor]:
    """The tensors of any packed form but the scale of its input.

    Args:
        weight: float32 [rows, columns].
    """
    if isinstance(form, Int4):
        return pack_int4(weight, form, *int4_scales(weight, form))
    largest = INT8_MAX if isinstance(form, Int8) else FP8_MAX
    scales = (weight.abs().amax(1) / largest).clamp(min=1e-12)
    codes = weight / scales[:, None]
    if isinstance(form, Int8):
        return {"weight": codes.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), "scales": scales}
    return {"weight": codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), "scales": scales[:, None]}


def unpacked(tensors: dict[str, Tensor], form: Packed, columns: int) -> Tensor:
    """The matrix that a packed form's tensors stand for, float32 [rows, columns]."""
    parts = [tensors[name] for name in form.inputs if name in tensors and name != "input_scale"]
    attrs = {name: value for name, value in form.attrs(columns).items() if name != "per_token"}
    return DENSE[form.operator](*parts, **attrs)


def largest_code(form: Int8 | Fp8) -> float:
    """What the largest activation becomes."""
    return INT8_MAX if isinstance(form, Int8) else FP8_MAX
