"""Sliding windows, which configs give by type of layer."""

from dataclasses import replace
from typing import Any

from builder_svc.models.config import DecoderConfig, LayerSpec
from builder_svc.models.fields import Fields
from engine.errors import InvalidArgument

FULL, SLIDING = "full_attention", "sliding_attention"


def with_windows(config: Fields, decoder: DecoderConfig, types: list[Any], **changes: Any) -> DecoderConfig:
    """The decoder with the config's `sliding_window` in the layers of type SLIDING.

    Args:
        changes: what else is different in the attention of these layers: fields of AttentionSpec.

    Raises:
        InvalidArgument: not a type for each layer, or another one than SLIDING and FULL.
    """
    _check_types(config, types, len(decoder.layers))
    layers = tuple(
        _windowed(layer, window=config.size("sliding_window"), **changes) if kind == SLIDING else layer
        for layer, kind in zip(decoder.layers, types, strict=True)
    )
    return replace(decoder, layers=layers)


def _check_types(config: Fields, types: list[Any], count: int) -> None:
    """Raises InvalidArgument unless there are `count`, each SLIDING or FULL."""
    if len(types) != count or not set(map(str, types)) <= {FULL, SLIDING}:
        raise InvalidArgument(
            f"{config.where}: 'layer_types' {types!r} must name {FULL!r} or {SLIDING!r} for each of {count} layers",
            reason="CONFIG_FIELD_INVALID",
        )


def _windowed(layer: LayerSpec, **changes: Any) -> LayerSpec:
    return replace(layer, attention=replace(layer.attention, **changes))
