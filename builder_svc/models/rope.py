"""Rotary frequencies from a Hugging Face config: everything that does not depend on a sequence is resolved here."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from builder_svc.models.config import DynamicRope, LongRope, RopeSpec
from builder_svc.models.fields import Fields
from engine.errors import InvalidArgument, Unimplemented

_ALIASES = {"su": "longrope"}


def rope_spec(
    config: Fields,
    head_dim: int,
    *,
    layer_type: str = "",
    theta: float = 10000.0,
    partial: float = 1.0,
    interleaved: bool = False,
    aliases: Mapping[str, str] = _ALIASES,
) -> RopeSpec:
    """The rotary spec of a config in either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters`.

    Args:
        layer_type: where `rope_parameters` has an entry for each type of layer, which one.
        theta, partial: base and rotated share of a head, where the config gives none.
        aliases: other names of rope types.

    Raises:
        InvalidArgument: a field that the scaling needs is missing or has no sense.
        Unimplemented: a scaling that we do not know.
    """
    scaling = scaling_fields(config, layer_type)
    if several := [name for name, value in scaling.values.items() if isinstance(value, Mapping)]:
        raise _invalid(
            config,
            f"rope_parameters has entries for {', '.join(several)}, where this model has one for "
            f"{layer_type or 'all layers, without a name'}",
        )
    theta = scaling.get("rope_theta", float, config.get("rope_theta", float, theta))
    if theta <= 0:
        raise _invalid(config, f"rope_theta is {theta}, expected more than 0")
    partial = scaling.get("partial_rotary_factor", float, config.get("partial_rotary_factor", float, partial))
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        rotated = "" if partial == 1 else f" and {partial:g} of it is rotated"
        raise _invalid(config, f"head_dim is {head_dim}{rotated}: rotary positions need an even number of dimensions")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    periods = theta**exponents
    kind = rope_type(scaling, aliases)
    if kind == "default":
        return _spec(1.0 / periods, interleaved=interleaved)
    if kind == "linear":
        return _spec(1.0 / periods / _factor(scaling), interleaved=interleaved)
    if kind == "llama3":
        return _spec(_llama3(1.0 / periods, scaling, original_length(config, scaling)), interleaved=interleaved)
    if kind == "yarn":
        return _yarn(periods, theta, config, scaling, interleaved)
    if kind == "dynamic":
        by_length = DynamicRope(theta, _factor(scaling), config.size("max_position_embeddings"))
        if rotary_dim == 2:
            raise _invalid(config, "dynamic rope scaling needs more than two rotated dimensions")
        return _spec(1.0 / periods, interleaved=interleaved, by_length=by_length)
    if kind == "longrope":
        return _longrope(periods, config, scaling, interleaved)
    raise Unimplemented(
        f"{config.where}: rope type {kind!r} is not supported; supported are default, dynamic, linear, llama3, longrope, yarn",
        reason="ROPE_UNSUPPORTED",
    )


def local_rope_spec(config: Fields, head_dim: int, layer_type: str, theta: float) -> RopeSpec:
    """The rotary spec of a type of layer that older configs leave out of `rope_theta` and `rope_scaling`, and newer ones list.

    Args:
        theta: the base, where `rope_parameters` gives none.
    """
    local = Fields({**config.values, "rope_theta": theta, "rope_scaling": None}, config.where)
    return rope_spec(local, head_dim, layer_type=layer_type)


def scaling_fields(config: Fields, layer_type: str = "") -> Fields:
    """The config's rope scaling, of one type of layer where it has several."""
    found: Mapping[str, Any] = config.get("rope_parameters", dict, {}) or config.get("rope_scaling", dict, {})
    nested = found.get(layer_type)
    return Fields(nested if isinstance(nested, Mapping) else found, f"{config.where}: rope scaling")


def rope_type(scaling: Fields, aliases: Mapping[str, str] = _ALIASES) -> str:
    """Its name in the newest spelling."""
    kind = str(scaling.values.get("rope_type") or scaling.values.get("type") or "default")
    return aliases.get(kind, kind)


def original_length(config: Fields, scaling: Fields) -> int:
    """Tokens that the model was trained for before its context was extended."""
    inner = scaling.size("original_max_position_embeddings", config.size("max_position_embeddings"))
    return config.size("original_max_position_embeddings", inner)


def longest_sequence(config: Fields, layer_type: str = "") -> int:
    """max_position_embeddings, times the factor of the scalings whose configs leave it as it was before."""
    scaling, longest = scaling_fields(config, layer_type), config.size("max_position_embeddings")
    kind, factor = rope_type(scaling), scaling.get("factor", float, 1.0)
    if kind in ("linear", "dynamic"):
        return max(longest, int(longest * factor))
    return max(longest, int(original_length(config, scaling) * factor)) if kind == "yarn" else longest


def _spec(inv_freq: Tensor, **others: Any) -> RopeSpec:
    return RopeSpec(tuple(inv_freq.tolist()), **others)


def _llama3(inv_freq: Tensor, scaling: Fields, original: int) -> Tensor:
    """Long wavelengths slowed by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    factor = _factor(scaling)
    low, high = scaling.require("low_freq_factor", float), scaling.require("high_freq_factor", float)
    if not 0 < low < high:
        raise _invalid(scaling, f"low_freq_factor {low} must be above 0 and below high_freq_factor {high}")
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, between, scaled)


def _yarn(periods: Tensor, theta: float, config: Fields, scaling: Fields, interleaved: bool) -> RopeSpec:
    """Dimensions that turn often within the original length are kept, the others slowed (Peng et al. 2023)."""
    rotary_dim, original = 2 * len(periods), original_length(config, scaling)
    if theta <= 1:
        raise _invalid(config, f"rope_theta is {theta}, expected more than 1 for yarn")
    factor = _factor(scaling, config.size("max_position_embeddings") / original)

    def dimension(turns: float) -> float:
        """The one that turns so often within the original length."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.get("beta_fast", float, 32.0)), dimension(scaling.get("beta_slow", float, 1.0))
    if scaling.get("truncate", bool, True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    slowed = ((torch.arange(len(periods)).float() - first) / ((last - first) or 0.001)).clamp(0, 1)
    kept = 1 - slowed
    inv_freq = (1.0 / (factor * periods)) * (1 - kept) + (1.0 / periods) * kept

    def magnitude(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    some, whole = scaling.get("mscale", float, 0.0), scaling.get("mscale_all_dim", float, 0.0)
    default = magnitude(some) / magnitude(whole) if some and whole else magnitude(1.0)
    scale = scaling.get("attention_factor", float, default)
    return _spec(inv_freq, scale=scale, interleaved=interleaved)


def _longrope(periods: Tensor, config: Fields, scaling: Fields, interleaved: bool) -> RopeSpec:
    """A factor for each frequency, found by search; another set of them for long sequences (Ding et al. 2024)."""
    original = original_length(config, scaling)
    if original < 2:
        raise _invalid(scaling, f"original_max_position_embeddings is {original}, expected at least 2")
    factor = _factor(scaling, config.size("max_position_embeddings") / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (_factors(scaling, name, len(periods)) for name in ("short_factor", "long_factor"))
    return _spec(
        1.0 / (short * periods),
        scale=scaling.get("attention_factor", float, default),
        interleaved=interleaved,
        by_length=LongRope(tuple((1.0 / (long * periods)).tolist()), original),
    )


def _factor(scaling: Fields, default: float | None = None) -> float:
    """By how much the context is extended; required unless there is a default."""
    factor = scaling.require("factor", float) if default is None else scaling.get("factor", float, default)
    if factor <= 0:
        raise _invalid(scaling, f"factor is {factor}, expected more than 0")
    return factor


def _factors(scaling: Fields, name: str, count: int) -> Tensor:
    values = scaling.require(name, list)
    if len(values) != count or not all(type(value) in (int, float) and value > 0 for value in values):
        raise _invalid(scaling, f"{name!r} must be {count} positive numbers, one for each rotary frequency")
    return torch.tensor(values, dtype=torch.float32)


def _invalid(fields: Fields, problem: str) -> InvalidArgument:
    return InvalidArgument(f"{fields.where}: {problem}", reason="CONFIG_FIELD_INVALID")
