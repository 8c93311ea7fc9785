"""Qwen2 and Qwen2.5: LLaMA's layout, biases on queries, keys and values, and sliding windows in the upper layers if asked for."""

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names
from builder_svc.models.windows import with_windows

ARCHITECTURES = ("Qwen2ForCausalLM",)
CLASS_NAME = "QWenForCausalLM"
NAMES = Names()


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`layer_types` tells which layers have the window; without it, those from `max_window_layers` on."""
    decoder = uniform_decoder(config, architecture, qkv_bias=True)
    return with_upper_windows(config, decoder)


def with_upper_windows(config: Fields, decoder: DecoderConfig) -> DecoderConfig:
    """The window of Qwen's configs."""
    if not config.get("use_sliding_window", bool, False):
        return decoder
    count = len(decoder.layers)
    first = config.get("max_window_layers", int, count)
    kinds = ["full_attention"] * first + ["sliding_attention"] * (count - first)
    return with_windows(config, decoder, config.get("layer_types", list, kinds))
