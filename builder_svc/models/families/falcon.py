"""Falcon: four layouts of a layer, told by the config. Also as it was called before transformers had it, RefinedWeb (RW)."""

import math
from collections.abc import Collection

import torch

from builder_svc.models.config import DecoderConfig, LayerSpec, MlpSpec, NormSpec
from builder_svc.models.families.llama import activation, attention_spec, head_dim
from builder_svc.models.fields import Fields
from builder_svc.models.rope import longest_sequence, rope_spec
from builder_svc.models.sources import Names, Source

ARCHITECTURES = ("FalconForCausalLM", "RWForCausalLM")
CLASS_NAME = "FalconForCausalLM"


class _Names(Names):
    """Of layers with two norms side by side, and of all others."""

    def sources(self, config: DecoderConfig, tensors: Collection[str]) -> dict[str, Source]:
        apart = config.layers[0].parallel and config.layers[0].mlp_norm is not None
        norms = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"} if apart else {}
        return Names(
            prefix="transformer.", embedding="word_embeddings", layer="h.{}", final_norm="ln_f",
            qkv=("self_attention.query_key_value",), out="self_attention.dense", up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h", heads_together=True, **norms,
        ).sources(config, tensors)  # fmt: skip


NAMES = _Names()
_FIELDS = {
    "n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads",
}  # fmt: skip


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """The new layout (40B, 11B) groups queries and is parallel, with two norms or one; the old one follows its own fields."""
    grouped = config.get("new_decoder_architecture", bool, config.values.get("n_head_kv") is not None)
    config = config.renamed(_FIELDS).filled(max_position_embeddings=2048)
    parallel = grouped or config.get("parallel_attn", bool, True)
    two_norms = config.get("num_ln_in_parallel_attn", int, 2) == 2 if grouped else not parallel
    num_heads, size = config.size("num_attention_heads"), head_dim(config)
    kv_heads = 1 if config.get("multi_query", bool, True) else num_heads
    if grouped:
        kv_heads = config.size("num_kv_heads", num_heads)
    bias, alibi = config.get("bias", bool, False), config.get("alibi", bool, False)
    attention = attention_spec(
        Fields({**config.values, "num_key_value_heads": kv_heads}, config.where),
        qkv_bias=bias,
        out_bias=bias,
        rope=None if alibi else rope_spec(config, size),
        alibi=tuple(slope / math.sqrt(size) for slope in alibi_slopes(num_heads)) if alibi else (),
    )
    ffn = config.size("ffn_hidden_size", 4 * config.size("hidden_size"))
    mlp = MlpSpec(ffn, bias, activation(config, "activation", "gelu", among=("gelu", "gelu_tanh")), gated=False)
    norm = NormSpec("layer", config.positive("layer_norm_epsilon", 1e-5), bias=True)
    layer = LayerSpec(attention, mlp, norm, norm if two_norms else None, parallel=parallel)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.size("num_hidden_layers"),
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, True),
        max_position_embeddings=longest_sequence(config),
    )


def alibi_slopes(num_heads: int) -> list[float]:
    """A geometric series of each head's slope, filled up from the one of twice the heads (Press et al. 2022).

    In bfloat16: Falcon was trained with slopes of that precision.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    first, between = (torch.tensor(2.0 ** (-8.0 / count), dtype=torch.float32) for count in (power, 2 * power))
    slopes = [first ** torch.arange(1, 1 + power), between ** torch.arange(1, 1 + 2 * (num_heads - power), 2)]
    return torch.cat(slopes).bfloat16().tolist()
