"""Qwen3: Qwen2 with a norm of each query and key head in place of biases."""

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.families.qwen2 import with_upper_windows
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names

ARCHITECTURES = ("Qwen3ForCausalLM",)
CLASS_NAME = "QWenForCausalLM"
NAMES = Names()


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`head_dim` does not follow from the hidden size."""
    bias = config.get("attention_bias", bool, False)
    decoder = uniform_decoder(config.filled(head_dim=128), architecture, qkv_bias=bias, out_bias=bias, qk_norm="head")
    return with_upper_windows(config, decoder)
