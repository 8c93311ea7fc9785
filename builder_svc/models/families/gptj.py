"""GPT-J: attention and feed-forward side by side behind one norm, rotary positions of neighbouring pairs, a head with a bias."""

from builder_svc.models.config import AttentionSpec, DecoderConfig, LayerSpec
from builder_svc.models.families.gpt2 import FIELDS, layer_norm, mlp
from builder_svc.models.families.llama import head_dim
from builder_svc.models.fields import Fields
from builder_svc.models.rope import rope_spec
from builder_svc.models.sources import Names
from engine.errors import InvalidArgument

ARCHITECTURES = ("GPTJForCausalLM",)
CLASS_NAME = "GPTJForCausalLM"
NAMES = Names(
    prefix="transformer.", embedding="wte", layer="h.{}", final_norm="ln_f", attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), out="attn.out_proj", up="mlp.fc_in", down="mlp.fc_out",
)  # fmt: skip


def decoder_config(config: Fields, architecture: str) -> DecoderConfig:
    """The first `rotary_dim` dimensions of each head turn."""
    config = config.renamed(FIELDS)
    num_heads, size = config.size("num_attention_heads"), head_dim(config)
    rotary_dim = config.size("rotary_dim", 64)
    if rotary_dim > size:
        raise InvalidArgument(
            f"{config.where}: rotary_dim {rotary_dim} is more than a head's {size} dimensions",
            reason="CONFIG_FIELD_INVALID",
        )
    norm = layer_norm(config)
    attention = AttentionSpec(num_heads, num_heads, size, rope_spec(config, rotary_dim, interleaved=True))
    layer = LayerSpec(attention, mlp(config), norm, None, parallel=True)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        layers=(layer,) * config.size("num_hidden_layers"),
        final_norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", bool, False),
        max_position_embeddings=config.size("max_position_embeddings"),
        head_bias=True,
    )
