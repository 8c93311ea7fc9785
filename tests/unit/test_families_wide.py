"""Dense families with norms, ropes, windows and residual topologies of their own, held against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families_harness import check_family

from tests.conftest import save_checkpoint

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
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    check_family(checkpoint, reference.eval(), tmp_path)
