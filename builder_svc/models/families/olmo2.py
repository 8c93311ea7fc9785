"""OLMo 2: norms behind attention and feed-forward instead of before, and of queries and keys over all heads."""

from dataclasses import replace
from typing import Any

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names

ARCHITECTURES = ("Olmo2ForCausalLM",)
CLASS_NAME = "Olmo2ForCausalLM"
NAMES = Names(attention_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm")


def decoder_config(config: Fields, architecture: str, **attention: Any) -> DecoderConfig:
    """`attention`: other fields of AttentionSpec, for families with the same layers."""
    bias = config.get("attention_bias", bool, False)
    decoder = uniform_decoder(config, architecture, qkv_bias=bias, out_bias=bias, qk_norm="all", **attention)
    behind = {"attention_out_norm": decoder.final_norm, "mlp_out_norm": decoder.final_norm}
    layer = replace(decoder.layers[0], attention_norm=None, mlp_norm=None, **behind)
    return replace(decoder, layers=(layer,) * len(decoder.layers))
