"""Mistral: LLaMA's layout with a sliding window, in all layers or, in Ministral, in some of them."""

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families.llama import uniform_decoder
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names
from builder_svc.models.windows import FULL, SLIDING, with_windows

ARCHITECTURES = ("MistralForCausalLM", "MinistralForCausalLM")
CLASS_NAME = "LLaMAForCausalLM"
NAMES = Names()


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """A `sliding_window` of null is none; a missing one is 4096, as in the first Mistral."""
    values = {"sliding_window": 4096, **config.values}
    decoder = uniform_decoder(config, architecture)
    types = [FULL if values["sliding_window"] is None else SLIDING] * len(decoder.layers)
    if architecture == "MinistralForCausalLM":
        types = config.get("layer_types", list, types)
    return with_windows(Fields(values, config.where), decoder, types)
