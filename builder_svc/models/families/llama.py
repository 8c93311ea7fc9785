"""LLaMA 1, 2, 3.x, and models with the same layout."""

from builder_svc.models.config import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec
from builder_svc.models.fields import Fields
from builder_svc.models.rope import rope_spec
from engine.errors import Unimplemented

ARCHITECTURES = ("LlamaForCausalLM",)


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """Every layer alike; biases where the config says so."""
    bias = config.get("attention_bias", bool, False)
    return uniform_decoder(config, architecture, qkv_bias=bias, out_bias=bias)


def uniform_decoder(config: Fields, architecture: str, *, qkv_bias: bool, out_bias: bool) -> DecoderConfig:
    """A decoder of equal layers, from the field names that LLaMA set for most families."""
    activation = config.get("hidden_act", str, "silu")
    if activation != "silu":
        raise Unimplemented(f"{config.where}: hidden_act {activation!r} is not supported; supported is silu")
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", hidden_size // num_heads)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=config.size("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rope=rope_spec(config, head_dim),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    mlp = MlpSpec(config.size("intermediate_size"), bias=config.get("mlp_bias", bool, False))
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        norm_eps=config.require("rms_norm_eps", float),
        layers=(LayerSpec(attention, mlp),) * config.size("num_hidden_layers"),
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        max_position_embeddings=config.size("max_position_embeddings"),
    )


def weight_names(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """As in transformers' LlamaForCausalLM."""
    names: dict[str, tuple[str, ...]] = {
        "embedding": ("model.embed_tokens.weight",),
        "final_norm.weight": ("model.norm.weight",),
    }
    if not config.tie_embeddings:
        names["lm_head.weight"] = ("lm_head.weight",)
    for index, layer in enumerate(config.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        names[f"{ours}.input_norm.weight"] = (f"{theirs}.input_layernorm.weight",)
        names[f"{ours}.post_norm.weight"] = (f"{theirs}.post_attention_layernorm.weight",)
        linears = {
            "attention.qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layer.attention.qkv_bias),
            "attention.out": (("self_attn.o_proj",), layer.attention.out_bias),
            "mlp.gate_up": (("mlp.gate_proj", "mlp.up_proj"), layer.mlp.bias),
            "mlp.down": (("mlp.down_proj",), layer.mlp.bias),
        }
        for ours_linear, (parts, bias) in linears.items():
            for kind in ("weight", "bias") if bias else ("weight",):
                names[f"{ours}.{ours_linear}.{kind}"] = tuple(f"{theirs}.{part}.{kind}" for part in parts)
    return names
