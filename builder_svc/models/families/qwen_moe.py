"""Qwen with experts: one of them shared in Qwen2-MoE, norms of queries and keys in Qwen3-MoE."""

from builder_svc.models.config import DecoderConfig, MlpSpec
from builder_svc.models.experts import experts_spec, with_sparse_layers
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names
from builder_svc.models.windows import FULL, SLIDING, with_windows

ARCHITECTURES = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
CLASS_NAME = "QWenForCausalLM"
NAMES = Names()


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """The window, if asked for: in all layers of Qwen3, in every second one below `max_window_layers` of Qwen2."""
    shared = None
    if architecture == "Qwen2MoeForCausalLM":
        decoder = uniform_decoder(config, architecture, qkv_bias=config.get("qkv_bias", bool, True))
        shared = MlpSpec(config.size("shared_expert_intermediate_size"))
        first = config.get("max_window_layers", int, 28)
        windows = [index < first and index % 2 == 0 for index in range(len(decoder.layers))]
    else:
        bias = config.get("attention_bias", bool, False)
        decoder = uniform_decoder(config, architecture, qkv_bias=bias, out_bias=bias, qk_norm="head")
        windows = [True] * len(decoder.layers)
    normalize = config.get("norm_topk_prob", bool, False)
    experts = experts_spec(config, config.size("moe_intermediate_size"), normalize, shared)
    decoder = with_sparse_layers(config, decoder, experts)
    if not config.get("use_sliding_window", bool, False):
        return decoder
    types = [SLIDING if window else FULL for window in windows]
    return with_windows(config, decoder, config.get("layer_types", list, types))
