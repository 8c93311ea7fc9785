"""Granite: LLaMA's layout, with a factor on the embeddings, the scores, each part's result and the logits."""

from dataclasses import replace

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names

ARCHITECTURES = ("GraniteForCausalLM",)
CLASS_NAME = "LLaMAForCausalLM"
NAMES = Names()


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """Raises InvalidArgument if logits are to be divided by zero."""
    divisor = config.positive("logits_scaling", 1.0)
    bias, scale = config.get("attention_bias", bool, False), config.get("attention_multiplier", float, 1.0)
    decoder = uniform_decoder(config, architecture, qkv_bias=bias, out_bias=bias, scale=scale)
    layer = replace(decoder.layers[0], residual_scale=config.get("residual_multiplier", float, 1.0))
    return replace(
        decoder,
        layers=(layer,) * len(decoder.layers),
        embedding_scale=config.get("embedding_multiplier", float, 1.0),
        logit_scale=1 / divisor,
    )
