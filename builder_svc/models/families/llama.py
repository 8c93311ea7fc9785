"""LLaMA 1, 2, 3.x, and models with the same layout."""

from collections.abc import Collection
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
    norm = NormSpec("rms", config.positive("rms_norm_eps"))
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
    num_heads, size = config.size("num_attention_heads"), head_dim(config)
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise InvalidArgument(
            f"{config.where}: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly",
            reason="CONFIG_FIELD_INVALID",
        )
    if "rope" not in changes:
        changes["rope"] = rope_spec(config, size)
    return AttentionSpec(num_heads, num_kv_heads, size, **changes)


def head_dim(config: Fields) -> int:
    """`head_dim`, by default the hidden size over the heads."""
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    if config.values.get("head_dim") is None and hidden_size % num_heads:
        raise InvalidArgument(
            f"{config.where}: hidden_size {hidden_size} is no multiple of {num_heads} attention heads, and there is no head_dim",
            reason="CONFIG_FIELD_INVALID",
        )
    return config.size("head_dim", hidden_size // num_heads)


def activation(
    config: Fields,
    field: str = "hidden_act",
    default: str = "silu",
    among: Collection[Activation] = ACTIVATIONS.values(),
) -> Activation:
    """Raises Unimplemented for one that is not among those that there are."""
    name = config.get(field, str, default)
    if ACTIVATIONS.get(name) not in among:
        known = (name for name, found in sorted(ACTIVATIONS.items()) if found in among)
        raise Unimplemented(
            f"{config.where}: {field} {name!r} is not supported; supported are {', '.join(known)}",
            reason="ACTIVATION_UNSUPPORTED",
        )
    return ACTIVATIONS[name]
