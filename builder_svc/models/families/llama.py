"""LLaMA 1, 2, 3.x, and models with the same layout."""

from typing import Any

from builder_svc.models.config import Activation, AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.fields import Fields
from builder_svc.models.rope import longest_sequence, rope_spec
from builder_svc.models.sources import Names
from engine.errors import InvalidArgument, Unimplemented

ARCHITECTURES = ("LlamaForCausalLM",)
CLASS_NAME = "LLaMAForCausalLM"
NAMES = Names()

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """Every layer alike; biases where the config says so."""
    bias = config.get("attention_bias", bool, False)
    return uniform_decoder(config, architecture, qkv_bias=bias, out_bias=bias)


def uniform_decoder(config: Fields, architecture: str, *, tie: bool = False, **attention: Any) -> DecoderConfig:
    """A decoder of equal layers, from the field names that LLaMA set for most families.

    Args:
        tie: whether embeddings are tied where the config does not say.
        attention: fields of AttentionSpec that differ from LLaMA's.
    """
    norm = NormSpec("rms", config.require("rms_norm_eps", float))
    mlp = MlpSpec(config.size("intermediate_size"), config.get("mlp_bias", bool, False), activation(config))
    layer = LayerSpec(attention_spec(config, **attention), mlp, norm, norm)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.size("num_hidden_layers"),
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, tie),
        max_position_embeddings=longest_sequence(config),
    )


def attention_spec(config: Fields, **changes: Any) -> AttentionSpec:
    """Heads and rotary positions by LLaMA's field names, with changes of the spec's fields."""
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", hidden_size // num_heads)
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise InvalidArgument(
            f"{config.where}: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly",
            reason="CONFIG_FIELD_INVALID",
        )
    if "rope" not in changes:
        changes["rope"] = rope_spec(config, head_dim)
    return AttentionSpec(num_heads, num_kv_heads, head_dim, **changes)


def activation(config: Fields, field: str = "hidden_act", default: str = "silu") -> Activation:
    """Raises Unimplemented for one that we do not have."""
    name = config.get(field, str, default)
    if name not in ACTIVATIONS:
        raise Unimplemented(
            f"{config.where}: {field} {name!r} is not supported; supported are {', '.join(sorted(ACTIVATIONS))}",
            reason="ACTIVATION_UNSUPPORTED",
        )
    return ACTIVATIONS[name]
