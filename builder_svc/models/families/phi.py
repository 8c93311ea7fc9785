"""Phi 1, 1.5 and 2: attention and feed-forward side by side behind one norm, biases everywhere, heads that turn in part."""

from builder_svc.models.config import DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.families.llama import activation, attention_spec, head_dim
from builder_svc.models.fields import Fields
from builder_svc.models.rope import longest_sequence, rope_spec
from builder_svc.models.sources import Names
from engine.errors import Unimplemented

ARCHITECTURES = ("PhiForCausalLM",)
CLASS_NAME = "PhiForCausalLM"
NAMES = Names(final_norm="final_layernorm", out="self_attn.dense", up="mlp.fc1", down="mlp.fc2")


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """Raises Unimplemented for norms of queries and keys, which no published Phi has."""
    if config.get("qk_layernorm", bool, False):
        raise Unimplemented(
            f"{config.where}: 'qk_layernorm' is not supported for {architecture}", reason="QK_NORM_UNSUPPORTED"
        )
    norm = NormSpec("layer", config.positive("layer_norm_eps", 1e-5), bias=True)
    rope = rope_spec(config, head_dim(config), partial=0.5)
    act = activation(config, default="gelu_new", among=("gelu", "gelu_tanh"))
    mlp = MlpSpec(config.size("intermediate_size"), bias=True, activation=act, gated=False)
    attention = attention_spec(config, rope=rope, qkv_bias=True, out_bias=True)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(LayerSpec(attention, mlp, norm, None, parallel=True),) * config.size("num_hidden_layers"),
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        max_position_embeddings=longest_sequence(config),
        head_bias=True,
    )
