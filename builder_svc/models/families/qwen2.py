"""Qwen2 and Qwen2.5: LLaMA's layout, biases on queries, keys and values, and sliding windows in the upper layers if asked for."""

from dataclasses import replace

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import uniform_decoder, weight_names
from builder_svc.models.fields import Fields

__all__ = ["ARCHITECTURES", "decoder_config", "weight_names"]

ARCHITECTURES = ("Qwen2ForCausalLM",)


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`layer_types` tells which layers have the window; without it, those from `max_window_layers` on."""
    decoder = uniform_decoder(config, architecture, qkv_bias=True, out_bias=False)
    if not config.get("use_sliding_window", bool, False):
        return decoder
    window, count = config.size("sliding_window"), len(decoder.layers)
    first = config.get("max_window_layers", int, count)
    kinds = config.get("layer_types", list, ["full_attention"] * first + ["sliding_attention"] * (count - first))
    layers = tuple(
        replace(layer, attention=replace(layer.attention, window=window)) if kind == "sliding_attention" else layer
        for layer, kind in zip(decoder.layers, kinds, strict=True)
    )
    return replace(decoder, layers=layers)
