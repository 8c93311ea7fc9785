"""Families with experts, held against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families_harness import check_family

from tests.conftest import save_checkpoint

GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}  # three queries a key
QWEN = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 5}),
    "mixtral-window-tied": (
        "mixtral",
        {"head_dim": 10, "num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size": 28, "sliding_window": 24,
         "tie_word_embeddings": True},
    ),
    "qwen2-moe": ("qwen2_moe", {**QWEN, **GROUPED, "shared_expert_intermediate_size": 28}),
    "qwen2-moe-some-layers": (
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": 36, "norm_topk_prob": True, "qkv_bias": False, "num_hidden_layers": 4,
         "decoder_sparse_step": 2, "mlp_only_layers": [3], "use_sliding_window": True, "sliding_window": 24,
         "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3-moe": ("qwen3_moe", {**QWEN, **GROUPED, "head_dim": 20, "norm_topk_prob": True}),
    "qwen3-moe-some-layers": (
        "qwen3_moe",
        {**QWEN, "num_experts_per_tok": 5, "mlp_only_layers": [1], "attention_bias": True, "use_sliding_window": True,
         "sliding_window": 24, "rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}},
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
