"""Phi-3, 3.5 and 4: LLaMA's layout with fused projections, LongRoPE and a window in all layers."""

from dataclasses import replace

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import head_dim, uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.rope import rope_spec
from builder_svc.models.sources import Names

ARCHITECTURES = ("Phi3ForCausalLM",)
CLASS_NAME = "Phi3ForCausalLM"
NAMES = Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

# What the first configs call longrope; their "yarn" is not the YaRN of other families.
_ALIASES = {"su": "longrope", "yarn": "longrope"}


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """The longest sequence is `max_position_embeddings`, whatever the scaling."""
    config = config.filled(original_max_position_embeddings=4096)
    rope = rope_spec(config, head_dim(config), aliases=_ALIASES)
    window = config.size("sliding_window") if config.values.get("sliding_window") is not None else 0
    decoder = uniform_decoder(config, architecture, rope=rope, window=window)
    return replace(decoder, max_position_embeddings=config.size("max_position_embeddings"))
