"""SmolLM3: LLaMA's layout, in which some layers have no positions; windows, if any, are in these."""

from dataclasses import replace

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names
from builder_svc.models.windows import FULL, SLIDING, with_windows
from engine.errors import InvalidArgument

ARCHITECTURES = ("SmolLM3ForCausalLM",)
CLASS_NAME = "LLaMAForCausalLM"
NAMES = Names()


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`no_rope_layers` has a 0 for a layer without positions; without it, they are every `no_rope_layer_interval`-th."""
    bias = config.get("attention_bias", bool, False)
    decoder = uniform_decoder(config, architecture, tie=True, qkv_bias=bias, out_bias=bias)
    count, interval = len(decoder.layers), config.size("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers", list, [int((index + 1) % interval != 0) for index in range(count)])[:count]
    if len(rotated) != count or not all(type(flag) is int and flag in (0, 1) for flag in rotated):
        raise InvalidArgument(
            f"{config.where}: 'no_rope_layers' {rotated!r} must have a 1 or, without positions, a 0 for each of {count} layers",
            reason="CONFIG_FIELD_INVALID",
        )
    layers = tuple(
        layer if flag else replace(layer, attention=replace(layer.attention, rope=None))
        for layer, flag in zip(decoder.layers, rotated, strict=True)
    )
    window = config.get("use_sliding_window", bool, False) and config.values.get("sliding_window") is not None
    types = [SLIDING if window and not flag else FULL for flag in rotated]
    return with_windows(config, replace(decoder, layers=layers), config.get("layer_types", list, types))
