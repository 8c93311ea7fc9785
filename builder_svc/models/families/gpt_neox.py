"""GPT-NeoX and Pythia: layer norms, half-split rotation of a part of each head, attention and feed-forward side by side."""

from builder_svc.models.config import AttentionSpec, DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.families.llama import activation
from builder_svc.models.fields import Fields
from builder_svc.models.rope import longest_sequence, rope_spec
from builder_svc.models.sources import Names

ARCHITECTURES = ("GPTNeoXForCausalLM",)
CLASS_NAME = "GPTNeoXForCausalLM"
NAMES = Names(
    prefix="gpt_neox.",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head="embed_out",
    qkv=("attention.query_key_value",),
    heads_together=True,
    out="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`rotary_pct` and `rotary_emb_base` in older configs, `rope_parameters` in newer ones."""
    hidden_size, heads = config.size("hidden_size"), config.size("num_attention_heads")
    rope = rope_spec(
        config,
        hidden_size // heads,
        theta=config.get("rotary_emb_base", float, 10000.0),
        partial=config.get("rotary_pct", float, 0.25),
    )
    bias = config.get("attention_bias", bool, True)
    gelu = activation(config, default="gelu", among=("gelu", "gelu_tanh"))
    norm = NormSpec("layer", config.positive("layer_norm_eps", 1e-5), bias=True)
    layer = LayerSpec(
        AttentionSpec(heads, heads, hidden_size // heads, rope, qkv_bias=bias, out_bias=bias),
        MlpSpec(config.size("intermediate_size"), bias=True, activation=gelu, gated=False),
        attention_norm=norm,
        mlp_norm=norm,
        parallel=config.get("use_parallel_residual", bool, True),
    )
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.size("num_hidden_layers"),
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        max_position_embeddings=longest_sequence(config),
    )
