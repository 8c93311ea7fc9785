"""OLMo 3: OLMo 2's layers, most of them with a window."""

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families import olmo2
from builder_svc.models.families.llama import head_dim
from builder_svc.models.fields import Fields
from builder_svc.models.rope import local_rope_spec, rope_spec
from builder_svc.models.windows import FULL, SLIDING, with_windows

ARCHITECTURES = ("Olmo3ForCausalLM",)
CLASS_NAME = "Olmo3ForCausalLM"
NAMES = olmo2.NAMES


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """Without `layer_types`, every fourth layer sees everything; `rope_scaling` is of these alone."""
    theta = config.get("rope_theta", float, 500000.0)
    rope = rope_spec(config, head_dim(config), layer_type=FULL, theta=theta)
    decoder = olmo2.decoder_config(config, architecture, rope=rope)
    types = [SLIDING if (index + 1) % 4 else FULL for index in range(len(decoder.layers))]
    local = local_rope_spec(config, head_dim(config), SLIDING, theta)
    return with_windows(config, decoder, config.get("layer_types", list, types), rope=local)
