"""Configs that no decoder can be made of: refused with the field, its value and what would do."""

from typing import Any

import pytest

from builder_svc.models.families import families, find_family
from builder_svc.models.fields import Fields
from engine.errors import EnginehouseError, InvalidArgument, Unimplemented

LLAMA = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "sliding_window": 8,
}  # fmt: skip
GPT = {"vocab_size": 320, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 8}


def rope(**scaling: Any) -> dict[str, Any]:
    return {"rope_scaling": scaling}


CASES: list[tuple[str, dict[str, Any], type[EnginehouseError], str]] = [
    ("Llama", {"hidden_act": "relu"}, Unimplemented, "hidden_act 'relu' is not supported; supported are gelu, "),
    ("Phi", {"hidden_act": "silu"}, Unimplemented, "hidden_act 'silu' .* supported are gelu, gelu_fast, gelu_new, [a-z_]*$"),
    ("Phi", {"qk_layernorm": True}, Unimplemented, "'qk_layernorm' is not supported"),
    ("GPT2", {"activation_function": "tanh"}, Unimplemented, "activation_function 'tanh'"),
    ("GPT2", {"add_cross_attention": True}, Unimplemented, "cross-attention"),
    ("GPT2", {"n_head": 5}, InvalidArgument, "hidden_size 48 is no multiple of 5 attention heads"),
    ("GPT2", {"n_layer": None}, InvalidArgument, "no 'num_hidden_layers'"),
    ("GPTJ", {"rotary_dim": 14}, InvalidArgument, "rotary_dim 14 is more than a head's 12"),
    ("GPTJ", {"rotary_dim": 5}, InvalidArgument, "even number"),
    ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, InvalidArgument, "4 attention heads cannot share 3"),
    ("Falcon", {"activation": "silu"}, Unimplemented, "activation 'silu'"),
    ("Falcon", {"alibi": "yes"}, InvalidArgument, "'alibi' is 'yes', expected bool"),
    ("Llama", {"num_attention_heads": 5}, InvalidArgument, "no multiple of 5 attention heads"),
    ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 4}, InvalidArgument, "6 attention heads cannot share 4"),
    ("Llama", {"head_dim": 15}, InvalidArgument, "head_dim is 15: rotary positions need an even number"),
    ("Llama", {"rope_theta": 0.0}, InvalidArgument, "rope_theta is 0.0, expected more than 0"),
    ("Llama", {"rope_theta": 1.0, **rope(type="yarn", factor=4.0)}, InvalidArgument, "is 1.0, expected more than 1 for yarn"),
    ("Llama", rope(type="mrope"), Unimplemented, "rope type 'mrope' is not supported; supported are default, dynamic"),
    ("Llama", {"rope_parameters": {"rope_type": ["yarn"]}}, Unimplemented, r"rope type \"\['yarn'\]\" is not supported"),
    ("Llama", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, InvalidArgument, "entries for full_attention"),
    ("Llama", rope(type="linear"), InvalidArgument, "rope scaling has no 'factor'"),
    ("Llama", rope(type="linear", factor=0.0), InvalidArgument, "factor is 0.0, expected more than 0"),
    ("Llama", rope(type="dynamic", factor=-1.0), InvalidArgument, "factor is -1.0, expected more than 0"),
    ("Llama", rope(type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0), InvalidArgument, "low_freq_factor 4.0"),
    ("Llama", rope(type="yarn", factor=4.0, original_max_position_embeddings=0), InvalidArgument, "is 0, expected at least 1"),
    ("Llama", rope(type="longrope", long_factor=[1.0] * 6), InvalidArgument, "rope scaling has no 'short_factor'"),
    ("Llama", rope(type="longrope", original_max_position_embeddings=1), InvalidArgument, "is 1, expected at least 2"),
    ("Phi3", rope(type="su", short_factor=[1.0], long_factor=[1.0] * 6), InvalidArgument, "'short_factor' must be 6 positive"),
    ("Ministral", {"layer_types": ["full_attention"] * 2}, InvalidArgument, "'layer_types' .* for each of 3 layers"),
    ("Ministral", {"layer_types": ["chunked_attention"] * 3}, InvalidArgument, "'chunked_attention'.* must name"),
    ("Ministral", {"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, InvalidArgument, "no 'sliding_window'"),
    ("Qwen3", {"use_sliding_window": True, "layer_types": [7, 8, 9]}, InvalidArgument, "'layer_types' .* must name"),
    ("Llama", {"num_hidden_layers": 1001}, InvalidArgument, "'num_hidden_layers' is 1001, expected at most 1000"),
    ("Llama", {"vocab_size": 2**62}, InvalidArgument, "'vocab_size' is 4611686018427387904, expected at most"),
    ("Llama", {"rms_norm_eps": -1.0}, InvalidArgument, "rms_norm_eps is -1, expected more than 0"),
    ("Llama", {"rms_norm_eps": 10**400}, InvalidArgument, "'rms_norm_eps' is inf, expected a finite number"),
    ("GPT2", {"layer_norm_epsilon": 0.0}, InvalidArgument, "layer_norm_epsilon is 0, expected more than 0"),
    ("Gemma2", {"final_logit_softcapping": -30.0}, InvalidArgument, "final_logit_softcapping is -30, expected more than 0"),
    ("Gemma2", {"attn_logit_softcapping": 0}, InvalidArgument, "attn_logit_softcapping is 0, expected more than 0"),
    ("Mistral", {"sliding_window": 0}, InvalidArgument, "'sliding_window' is 0, expected at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "error", "message"), CASES)
def test_refused_in_words(family: str, changes: dict[str, Any], error: type[EnginehouseError], message: str) -> None:
    architecture = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    values = {"architectures": [architecture], **(GPT if family.startswith("GPT") else LLAMA)}
    page, name = find_family(Fields(values, "config.json"))
    page.decoder_config(Fields(values, "config.json"), name)  # it is the change that is refused
    with pytest.raises(error, match=message) as caught:
        page.decoder_config(Fields(values | changes, "config.json"), name)
    assert "config.json" in str(caught.value)
    assert caught.value.reason


def test_an_architecture_that_is_no_text() -> None:
    with pytest.raises(Unimplemented, match=r"architecture \['x'\] is not supported; supported are Falcon"):
        find_family(Fields({"architectures": [["x"]]}, "config.json"))


def test_every_page_is_whole() -> None:
    for page in families().values():
        assert page.CLASS_NAME.endswith("ForCausalLM")
        assert page.NAMES.layer.count("{}") == 1
