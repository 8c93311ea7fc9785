"""Dense families with norms, ropes, windows and residual topologies of their own, held against transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families_harness import check_family, check_half_precision, reference_of
from safetensors.torch import load_file, save_file

from builder_svc.models.config import DecoderConfig
from builder_svc.models.families import find_family
from builder_svc.models.fields import Fields
from engine.errors import EnginehouseError, InvalidArgument, Unimplemented
from tests.conftest import save_checkpoint
from tests.running import make_engine

YARN = {"rope_type": "yarn", "rope_theta": 800.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}
DEFAULT = {"rope_type": "default", "rope_theta": 90.0}
FULL, SLIDING = "full_attention", "sliding_attention"
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}  # three queries a key

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox-parallel": (
        "gpt_neox",
        {"num_attention_heads": 3, "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}, "hidden_act": "gelu_new"},
    ),
    "gpt-neox-sequential-tied": (
        "gpt_neox",
        {
            "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast",
            "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.35},
        },
    ),
    "gemma": ("gemma", {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 1}),
    "gemma-untied": ("gemma", {"head_dim": 6, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 20, "sliding_window": 24, "query_pre_attn_scalar": 30}),
    "gemma2-caps": (
        "gemma2",
        {"head_dim": 14, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.5, "sliding_window": 9,
         "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "gemma2-no-caps": (
        "gemma2", {"head_dim": 12, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 300}
    ),
    "gemma3": (
        "gemma3_text", {**GROUPED, "head_dim": 20, "sliding_window": 24, "layer_types": [SLIDING, FULL, SLIDING]}
    ),
    "gemma3-two-ropes": (
        "gemma3_text",
        {"head_dim": 10, "sliding_window": 9, "layer_types": [SLIDING, FULL, FULL], "final_logit_softcapping": 2.5,
         "rope_parameters": {FULL: YARN, SLIDING: DEFAULT}, "query_pre_attn_scalar": 17, "tie_word_embeddings": False},
    ),
    "stablelm": ("stablelm", {**GROUPED, "use_qkv_bias": True, "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}),
    "stablelm-parallel-norms": (
        "stablelm",
        {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "qk_layernorm": True,
         "use_parallel_residual": True, "tie_word_embeddings": True,
         "rope_parameters": {**YARN, "partial_rotary_factor": 0.4}},
    ),
    "olmo2": ("olmo2", {**GROUPED, "attention_bias": True}),
    "olmo2-tied-scaled": ("olmo2", {"head_dim": 14, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "olmo3": (
        "olmo3",
        {"sliding_window": 24, "num_key_value_heads": 1, "layer_types": [SLIDING, SLIDING, FULL],
         "rope_parameters": {FULL: YARN, SLIDING: DEFAULT}},
    ),
    "olmo3-default-types": ("olmo3", {"sliding_window": 11, "num_hidden_layers": 4}),
    "granite": (
        "granite",
        {**GROUPED, "embedding_multiplier": 3.5, "attention_multiplier": 0.21, "residual_multiplier": 0.22,
         "logits_scaling": 1.7},
    ),
    "granite-tied-biases": (
        "granite",
        {"head_dim": 18, "attention_multiplier": 0.3, "logits_scaling": 6, "attention_bias": True, "mlp_bias": True,
         "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "smollm3": ("smollm3", {**GROUPED, "pad_token_id": 0, "no_rope_layer_interval": 2, "rope_parameters": YARN}),
    "smollm3-windows-untied": (
        "smollm3",
        {"head_dim": 10, "pad_token_id": 0, "no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 24,
         "attention_bias": True, "tie_word_embeddings": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **changes)
    check_family(checkpoint, reference_of(checkpoint), tmp_path)


def test_gemma_in_half_precision_keeps_its_norms_in_float32(tmp_path: Path) -> None:
    """A weight of bfloat16 near one would have lost most of the little that the checkpoint holds."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "gemma3_text", head_dim=20, sliding_window=24)
    loaded = check_half_precision(checkpoint, tmp_path)
    held = load_file(checkpoint / "model.safetensors")
    for ours, theirs in (
        ("final_norm", "norm"),
        ("layers.1.mlp_out_norm", "layers.1.post_feedforward_layernorm"),
        ("layers.2.attention.q_norm", "layers.2.self_attn.q_norm"),
    ):
        assert torch.equal(loaded.weights[f"{ours}.weight"], held[f"model.{theirs}.weight"] + 1)


def test_gpt_neox_as_old_files_have_it(tmp_path: Path) -> None:
    """With masks and frequencies among the weights, and a head that is tied or called as transformers has it in memory."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "gpt_neox", num_attention_heads=2)
    expected = make_engine(checkpoint, tmp_path / "store")
    tensors = load_file(checkpoint / "model.safetensors")
    for layer in range(3):
        inner = f"gpt_neox.layers.{layer}.attention"
        tensors |= {
            f"{inner}.bias": torch.ones(1, 1, 256, 256),
            f"{inner}.masked_bias": torch.tensor(-1e9),
            f"{inner}.rotary_emb.inv_freq": torch.ones(1),
        }
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, checkpoint / "model.safetensors")
    found = make_engine(checkpoint, tmp_path / "store")
    assert found.manifest.engine_id != expected.manifest.engine_id
    assert found.manifest.ranks == expected.manifest.ranks
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    del tensors["lm_head.weight"]
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].clone()
    save_file(tensors, checkpoint / "model.safetensors")
    assert "lm_head.weight" not in make_engine(checkpoint, tmp_path / "store").weights


BASE = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
}  # fmt: skip
OLDER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-neox": ("gpt_neox", "GPTNeoXForCausalLM", {"rotary_pct": 0.5, "rotary_emb_base": 50000}),
    "gpt-neox-defaults": ("gpt_neox", "GPTNeoXForCausalLM", {"num_attention_heads": 2}),
    "gemma": ("gemma", "GemmaForCausalLM", {"hidden_act": "gelu", "head_dim": 16}),
    "gemma-defaults": ("gemma", "GemmaForCausalLM", {}),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", {"rope_theta": 500.0, "sliding_window": 100}),
    "gemma3": (
        "gemma3_text", "Gemma3ForCausalLM",
        {"rope_theta": 5e5, "rope_local_base_freq": 900.0, "sliding_window_pattern": 3, "sliding_window": 100,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma3-defaults": ("gemma3_text", "Gemma3ForCausalLM", {"sliding_window": 100}),
    "stablelm": ("stablelm", "StableLmForCausalLM", {"partial_rotary_factor": 0.5, "rope_theta": 600}),
    "stablelm-defaults": ("stablelm", "StableLmForCausalLM", {"num_attention_heads": 2}),
    "olmo3": (
        "olmo3", "Olmo3ForCausalLM",
        {"rope_theta": 500000, "sliding_window": 100,
         "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}},
    ),
    "granite": ("granite", "GraniteForCausalLM", {"rope_theta": 600.0, "embedding_multiplier": 12, "logits_scaling": 8}),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", {"rope_theta": 600.0, "use_sliding_window": True, "sliding_window": 9}),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"rope_theta": 1e6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "qwen2_moe", "Qwen2MoeForCausalLM",
        {"rope_theta": 600.0, "num_experts": 8, "num_experts_per_tok": 2, "use_sliding_window": True, "sliding_window": 9,
         "max_window_layers": 4, "shared_expert_intermediate_size": 20, "moe_intermediate_size": 12},
    ),
    "qwen3-moe": (
        "qwen3_moe", "Qwen3MoeForCausalLM",
        {"rope_theta": 600.0, "num_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 20},
    ),
}  # fmt: skip


def decoder_config(architecture: str, config: dict[str, Any]) -> DecoderConfig:
    fields = Fields({**config, "architectures": [architecture]}, "config.json")
    family, found = find_family(fields)
    return family.decoder_config(fields, found)


@pytest.mark.parametrize("case", OLDER)
def test_older_configs_mean_what_transformers_reads_in_them(case: str) -> None:
    """Fields of older spellings, and those that are left out, against what transformers writes of the same config."""
    family, architecture, changes = OLDER[case]
    newer = transformers.AutoConfig.for_model(family, **copy.deepcopy(BASE | changes)).to_dict()
    assert decoder_config(architecture, BASE | changes) == decoder_config(architecture, newer)


GEMMA3, SMOLLM3, NEOX = "Gemma3ForCausalLM", "SmolLM3ForCausalLM", "GPTNeoXForCausalLM"
WRONG: list[tuple[str, dict[str, Any], type[EnginehouseError], str]] = [
    (GEMMA3, {"layer_types": [FULL] * 6}, InvalidArgument, "for each of 7 layers"),
    (GEMMA3, {"layer_types": [FULL] * 6 + ["chunked_attention"]}, InvalidArgument, "chunked_attention"),
    (GEMMA3, {"sliding_window": None}, InvalidArgument, "no 'sliding_window'"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, Unimplemented, "attn_logit_softcapping 50 is Gemma 2's"),
    (GEMMA3, {"use_bidirectional_attention": True}, Unimplemented, "use_bidirectional_attention"),
    (GEMMA3, {"query_pre_attn_scalar": 0}, InvalidArgument, "query_pre_attn_scalar is 0"),
    (GEMMA3, {"hidden_activation": "relu2"}, Unimplemented, "hidden_activation 'relu2'.*supported are gelu, gelu_fast"),
    (
        "Gemma2ForCausalLM",
        {"sliding_window_pattern": 0, "sliding_window": 9},
        InvalidArgument,
        "'sliding_window_pattern' is 0",
    ),
    (
        NEOX,
        {"hidden_act": "silu", "num_attention_heads": 2},
        Unimplemented,
        "hidden_act 'silu' is not supported; supported are gelu, ",
    ),
    (NEOX, {"rotary_pct": 0.6}, InvalidArgument, "0.6 of it is rotated"),
    ("GraniteForCausalLM", {"logits_scaling": 0}, InvalidArgument, "logits_scaling is 0"),
    (SMOLLM3, {"no_rope_layers": [1, 0]}, InvalidArgument, "'no_rope_layers'.*each of 7 layers"),
    (SMOLLM3, {"no_rope_layers": [2] * 7}, InvalidArgument, "'no_rope_layers'.*each of 7 layers"),
    (SMOLLM3, {"no_rope_layer_interval": 0}, InvalidArgument, "'no_rope_layer_interval' is 0"),
]


@pytest.mark.parametrize(("architecture", "changes", "kind", "words"), WRONG)
def test_what_cannot_be_built(
    architecture: str, changes: dict[str, Any], kind: type[EnginehouseError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        decoder_config(architecture, BASE | changes)
