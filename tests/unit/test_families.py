"""Families against transformers: the same logits through the program, the same tokens through scheduler and runner."""

import json
import shutil
from pathlib import Path

import pytest
from families_harness import check_family, check_half_precision, reference_of

import builder_svc.models.families as families_package
from builder_svc.models.families import families
from tests.conftest import save_checkpoint
from tests.running import make_engine

ROPE_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 6.0,
}  # fmt: skip
ODD_YARN = {**YARN, "truncate": False, "mscale": 1.3, "mscale_all_dim": 0.7}
FULL, SLIDING = "full_attention", "sliding_attention"
SHORT, LONG = [1.0, 1.1, 1.7, 2.0], [1.5, 3.0, 5.0, 9.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 200.0, "short_factor": SHORT, "long_factor": LONG}
PHI3 = {"pad_token_id": None}  # the default is beyond a small vocabulary

CASES = {
    "llama-grouped-odd-head": ("llama", {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-scaling": ("llama", {"rope_parameters": ROPE_LLAMA3}),
    "llama-linear-scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "head_dim": 14, "num_key_value_heads": 1}),
    "falcon3": ("llama", {"head_dim": 256, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 60}),
    "qwen2-window-tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen3-window-biases-tied": (
        "qwen3",
        {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": ODD_YARN,
         "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "mistral": (
        "mistral", {"head_dim": 14, "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 24}
    ),
    "mistral-no-window-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "ministral": (
        "ministral", {"head_dim": 10, "sliding_window": 20, "layer_types": [SLIDING, FULL, SLIDING], "num_key_value_heads": 1}
    ),
    "phi3": ("phi3", {**PHI3, "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 24}),
    "phi3-partial-tied": (
        "phi3",
        {**PHI3, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "partial_rotary_factor": 0.6,
         "tie_word_embeddings": True},
    ),
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0}},
    ),
    "llama-longrope-short": (
        "llama", {"head_dim": 8, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 200, "factor": 8.0}}
    ),
    "phi3-longrope": (
        "phi3", {**PHI3, "num_attention_heads": 6, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}
    ),
    "phi3-longrope-partial-tied": (
        "phi3",
        {**PHI3, "original_max_position_embeddings": 40, "partial_rotary_factor": 0.7, "rope_parameters": LONGROPE,
         "tie_word_embeddings": True, "sliding_window": 24},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **changes)
    check_family(checkpoint, reference_of(checkpoint), tmp_path)


def test_half_precision_stays_near_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    check_half_precision(checkpoint, tmp_path)


def test_a_new_family_is_one_new_file(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "newcomer.py").write_text(
        "from builder_svc.models.families.llama import NAMES, decoder_config\n"
        "ARCHITECTURES, CLASS_NAME = ('NewcomerForCausalLM',), 'NewcomerForCausalLM'\n"
    )
    monkeypatch.setattr(families_package, "__path__", [*families_package.__path__, str(pages)])
    config = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["NewcomerForCausalLM"]}
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps(config))
    assert make_engine(copy, tmp_path / "store").manifest.model.architecture == "NewcomerForCausalLM"
    assert {"LlamaForCausalLM", "NewcomerForCausalLM", "Qwen2ForCausalLM"} <= set(families())
