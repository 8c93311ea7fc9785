"""Qwen, the first: LLaMA's parts under GPT-2's names. transformers does not have it; its checkpoints bring code of their own."""

from builder_svc.models.config import DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.families.llama import attention_spec, head_dim
from builder_svc.models.fields import Fields
from builder_svc.models.rope import rope_spec
from builder_svc.models.sources import Names

ARCHITECTURES = ("QWenLMHeadModel",)
CLASS_NAME = "QWenForCausalLM"
NAMES = Names(
    prefix="transformer.", embedding="wte", layer="h.{}", final_norm="ln_f", attention_norm="ln_1", mlp_norm="ln_2",
    qkv=("attn.c_attn",), out="attn.c_proj", gate_up=("mlp.w2", "mlp.w1"), down="mlp.c_proj",
)  # fmt: skip


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """Beyond `seq_length` dynamic NTK and log-n attention would act: with one of them on, that is the longest sequence."""
    config = config.renamed({"kv_channels": "head_dim"})
    theta, partial = config.get("rotary_emb_base", float, 10000.0), config.get("rotary_pct", float, 1.0)
    bias = not config.get("no_bias", bool, True)
    rope = rope_spec(config, head_dim(config), theta=theta, partial=partial)
    attention = attention_spec(config, rope=rope, qkv_bias=True, out_bias=bias)
    mlp = MlpSpec(config.size("intermediate_size") // 2, bias)  # which counts both halves
    norm = NormSpec("rms", config.positive("layer_norm_epsilon", 1e-6))
    extended = config.get("use_dynamic_ntk", bool, True) or config.get("use_logn_attn", bool, True)
    longest = config.size("seq_length", 8192)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(LayerSpec(attention, mlp, norm, norm),) * config.size("num_hidden_layers"),
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        max_position_embeddings=longest if extended else config.size("max_position_embeddings", longest),
    )
