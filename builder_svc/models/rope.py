"""Rotary frequencies from a Hugging Face config, every scaling resolved when the engine is built."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from builder_svc.models.config import RopeSpec
from builder_svc.models.fields import Fields
from engine.errors import InvalidArgument, Unimplemented


def rope_spec(config: Fields, head_dim: int) -> RopeSpec:
    """The rotary spec of a config in either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters`.

    Raises:
        InvalidArgument: a field that the scaling needs is missing.
        Unimplemented: a scaling that we do not know.
    """
    found: Mapping[str, Any] = config.get("rope_parameters", dict, {}) or config.get("rope_scaling", dict, {})
    scaling = Fields(found, f"{config.where}: rope scaling")
    theta = scaling.get("rope_theta", float, config.get("rope_theta", float, 10000.0))
    if theta <= 0:
        raise InvalidArgument(
            f"{config.where}: rope_theta is {theta}, expected more than 0", reason="CONFIG_FIELD_INVALID"
        )
    if head_dim % 2:
        raise InvalidArgument(
            f"{config.where}: head_dim is {head_dim}, rotary positions need an even one", reason="CONFIG_FIELD_INVALID"
        )
    kind = found.get("rope_type") or found.get("type") or "default"
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / theta**exponents
    if kind == "linear":
        inv_freq = inv_freq / scaling.require("factor", float)
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    elif kind != "default":
        raise Unimplemented(
            f"{config.where}: rope type {kind!r} is not supported; supported are default, linear, llama3"
        )
    return RopeSpec(tuple(inv_freq.tolist()))


def _llama3(inv_freq: torch.Tensor, scaling: Fields) -> torch.Tensor:
    """Long wavelengths slowed by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    factor = scaling.require("factor", float)
    low, high = scaling.require("low_freq_factor", float), scaling.require("high_freq_factor", float)
    original = scaling.require("original_max_position_embeddings", float)
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, between, scaled)
