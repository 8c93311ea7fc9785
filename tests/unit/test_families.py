"""Families against transformers: the same logits through the program, the same tokens through scheduler and runner."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families_harness import check_family

import builder_svc.models.families as families_package
from builder_svc.models.families import families
from executor_svc.core import Sampling, Sequence
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine

ROPE_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

CASES = {
    "llama-grouped-odd-head": ("llama", {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-scaling": ("llama", {"rope_parameters": ROPE_LLAMA3}),
    "llama-linear-scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "qwen2": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 60}),
    "qwen2-window-tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **changes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    check_family(checkpoint, reference.eval(), tmp_path)


def test_half_precision_stays_near_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    """Teacher-forced: each greedy token's reference logit is within 0.02 of the largest magnitude of the best."""
    loaded = make_engine(checkpoint, tmp_path / "store", dtype="bfloat16")
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    sequence = Sequence(0, 0, list(range(2, 30)), 28, 40, Sampling(0.0))
    Engine(loaded).run([sequence])
    with torch.inference_mode():
        logits = reference(torch.tensor([sequence.token_ids])).logits[0, 27:-1]
    for row, token in zip(logits, sequence.token_ids[28:], strict=True):
        assert row[token] >= row.max() - 0.02 * row.abs().max()


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
