"""GPT-2: learned positions, layer norms, a plain feed-forward part, biases everywhere; its linears are stored [in, out]."""

from dataclasses import replace

from builder_svc.models.config import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.families.llama import activation, head_dim
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names
from engine.errors import Unimplemented

ARCHITECTURES = ("GPT2LMHeadModel",)
CLASS_NAME = "GPTForCausalLM"
NAMES = Names(
    prefix="transformer.", embedding="wte", positions="wpe", layer="h.{}", final_norm="ln_f",
    attention_norm="ln_1", mlp_norm="ln_2", qkv=("attn.c_attn",), out="attn.c_proj",
    up="mlp.c_fc", down="mlp.c_proj", transposed=True,
)  # fmt: skip

FIELDS = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}  # fmt: skip


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`reorder_and_upcast_attn` is about the order of computing alone."""
    config = config.renamed(FIELDS)
    if config.get("add_cross_attention", bool, False):
        raise Unimplemented(f"{config.where}: cross-attention is not supported", reason="CROSS_ATTENTION_UNSUPPORTED")
    longest = config.size("max_position_embeddings")
    norm = layer_norm(config)
    num_heads, size = config.size("num_attention_heads"), head_dim(config)
    scale = size**-0.5 if config.get("scale_attn_weights", bool, True) else 1.0
    by_layer = config.get("scale_attn_by_inverse_layer_idx", bool, False)
    attention = AttentionSpec(num_heads, num_heads, size, rope=None, qkv_bias=True, out_bias=True, scale=scale)
    layers = tuple(
        LayerSpec(replace(attention, scale=scale / (index + 1) if by_layer else scale), mlp(config), norm, norm)
        for index in range(config.size("num_hidden_layers"))
    )
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=layers,
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, True),
        max_position_embeddings=longest,
        learned_positions=longest,
    )


def layer_norm(config: Fields) -> NormSpec:
    """The norm of GPT-2 and GPT-J."""
    return NormSpec("layer", config.positive("layer_norm_epsilon", 1e-5), bias=True)


def mlp(config: Fields) -> MlpSpec:
    """The feed-forward part of GPT-2 and GPT-J."""
    size = config.size("n_inner", 4 * config.size("hidden_size"))
    act = activation(config, "activation_function", "gelu_new", among=("gelu", "gelu_tanh"))
    return MlpSpec(size, bias=True, activation=act, gated=False)
