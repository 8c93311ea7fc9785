"""Mixtral: Mistral's layout with experts in every layer."""

from dataclasses import replace

from builder_svc.models.config import DecoderConfig
from builder_svc.models.experts import experts_spec
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import ExpertNames, Names
from builder_svc.models.windows import SLIDING, with_windows

ARCHITECTURES = ("MixtralForCausalLM",)
CLASS_NAME = "LLaMAForCausalLM"
NAMES = Names(
    experts=ExpertNames(
        "block_sparse_moe.gate",
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
        ("block_sparse_moe.experts.{}.w2.weight",),
    )
)


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """`sliding_window`, where there is one, is in all layers."""
    experts = experts_spec(config, config.size("intermediate_size"), normalize=True)
    decoder = uniform_decoder(config, architecture)
    decoder = replace(decoder, layers=tuple(replace(layer, mlp=experts) for layer in decoder.layers))
    if config.values.get("sliding_window") is None:
        return decoder
    return with_windows(config, decoder, [SLIDING] * len(decoder.layers))
