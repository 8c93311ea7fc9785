"""Gemma: LLaMA's layout; norms whose weights lie around zero, scaled embeddings, gated GELU."""

from dataclasses import replace
from typing import Any

from builder_svc.models.config import Activation, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.families.llama import activation, uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names
from engine.errors import Unimplemented

ARCHITECTURES = ("GemmaForCausalLM",)
CLASS_NAME = "GemmaForCausalLM"
NAMES = Names()


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`hidden_activation` wins over `hidden_act`, in which the first releases called GELU's approximation "gelu"."""
    field = "hidden_activation" if config.values.get("hidden_activation") is not None else "hidden_act"
    gelu = activation(config, field, "gelu", among=("gelu", "gelu_tanh"))
    return gemma_decoder(config, architecture, gelu if field == "hidden_activation" else "gelu_tanh")


def gemma_decoder(config: Fields, architecture: str, gelu: Activation, **attention: Any) -> DecoderConfig:
    """What all generations share.

    Args:
        attention: fields of AttentionSpec.

    Raises:
        Unimplemented: attention to tokens that come later.
    """
    if config.get("use_bidirectional_attention", bool, False):
        raise Unimplemented(
            f"{config.where}: use_bidirectional_attention is true: an encoder, which makes no text; take a decoder's checkpoint",
            reason="ATTENTION_UNSUPPORTED",
        )
    config = Fields({"head_dim": 256, **config.values}, config.where)
    bias = config.get("attention_bias", bool, False)
    decoder = uniform_decoder(config, architecture, tie=True, qkv_bias=bias, out_bias=bias, **attention)
    norm = NormSpec("rms", config.positive("rms_norm_eps"), offset=1.0)
    mlp = MlpSpec(config.size("intermediate_size"), activation=gelu)
    layer = LayerSpec(decoder.layers[0].attention, mlp, norm, norm)
    return replace(
        decoder,
        layers=(layer,) * len(decoder.layers),
        final_norm=norm,
        embedding_scale=decoder.hidden_size**0.5,
    )
