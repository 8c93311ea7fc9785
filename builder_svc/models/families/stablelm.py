"""StableLM: LLaMA's layout with layer norms, rotation of a part of each head, and in some a norm for each query and key head."""

from builder_svc.models.config import DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.families.llama import activation, attention_spec, head_dim
from builder_svc.models.fields import Fields
from builder_svc.models.rope import longest_sequence, rope_spec
from builder_svc.models.sources import Names

ARCHITECTURES = ("StableLmForCausalLM",)
CLASS_NAME = "StableLmForCausalLM"
NAMES = Names(q_norm="self_attn.q_layernorm.norms.{}", k_norm="self_attn.k_layernorm.norms.{}")


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """With `use_parallel_residual` both parts share one norm."""
    norm = NormSpec("layer", config.positive("layer_norm_eps", 1e-5), bias=True)
    parallel = config.get("use_parallel_residual", bool, False)
    attention = attention_spec(
        config,
        rope=rope_spec(config, head_dim(config), partial=0.25),
        qkv_bias=config.get("use_qkv_bias", bool, False),
        qk_norm="heads" if config.get("qk_layernorm", bool, False) else "",
    )
    mlp = MlpSpec(config.size("intermediate_size"), activation=activation(config))
    layer = LayerSpec(attention, mlp, norm, None if parallel else norm, parallel=parallel)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.size("num_hidden_layers"),
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        max_position_embeddings=longest_sequence(config),
    )
