"""Gemma 2 and 3: norms before and behind each part, windows in most layers; caps in 2, norms of queries and keys in 3."""

from dataclasses import replace
from typing import Any

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.gemma import gemma_decoder
from builder_svc.models.families.llama import activation
from builder_svc.models.fields import Fields
from builder_svc.models.rope import local_rope_spec, rope_spec
from builder_svc.models.sources import Names
from builder_svc.models.windows import FULL, SLIDING, with_windows
from engine.errors import Unimplemented

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
CLASS_NAME = "GemmaForCausalLM"
NAMES = Names(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
    "Gemma3ForCausalLM": {"rope_theta": 1000000.0, "sliding_window_pattern": 6},
}


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """Without `layer_types`, every `sliding_window_pattern`-th layer sees everything; a cap that is null is none."""
    config = Fields({**_DEFAULTS[architecture], **config.values}, config.where)
    scalar = config.positive("query_pre_attn_scalar", 256.0)
    attention: dict[str, Any] = {"scale": scalar**-0.5, "soft_cap": _cap(config, "attn_logit_softcapping")}
    sliding: dict[str, Any] = {}
    if architecture == "Gemma3ForCausalLM":
        if attention["soft_cap"]:
            raise Unimplemented(
                f"{config.where}: attn_logit_softcapping {attention['soft_cap']:g} is Gemma 2's: Gemma 3 takes null",
                reason="SOFT_CAP_UNSUPPORTED",
            )
        head_dim = config.size("head_dim", 256)
        attention |= {"qk_norm": "head", "qk_norm_offset": 1.0, "rope": rope_spec(config, head_dim, layer_type=FULL)}
        theta = config.get("rope_local_base_freq", float, 10000.0)
        sliding["rope"] = local_rope_spec(config, head_dim, SLIDING, theta)
    gelu = activation(config, "hidden_activation", "gelu_pytorch_tanh", among=("gelu", "gelu_tanh"))
    decoder = gemma_decoder(config, architecture, gelu, **attention)
    layer = replace(decoder.layers[0], attention_out_norm=decoder.final_norm, mlp_out_norm=decoder.final_norm)
    count, every = len(decoder.layers), config.size("sliding_window_pattern")
    decoder = replace(
        decoder,
        layers=(layer,) * count,
        max_position_embeddings=config.size("max_position_embeddings"),  # which a scaling has already lengthened
        logit_soft_cap=_cap(config, "final_logit_softcapping"),
    )
    types = [SLIDING if (index + 1) % every else FULL for index in range(count)]
    return with_windows(config, decoder, config.get("layer_types", list, types), **sliding)


def _cap(config: Fields, name: str) -> float:
    return 0.0 if config.values.get(name) is None else config.positive(name)
