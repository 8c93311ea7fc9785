"""Families with experts, held against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families_harness import check_family, check_half_precision, reference_of, watch

from builder_svc.models.families import find_family
from builder_svc.models.fields import Fields
from engine.errors import EnginehouseError
from executor_svc.core import Sampling, Sequence
from tests.conftest import VOCAB_SIZE, save_checkpoint, save_tokenizer
from tests.running import Engine, make_engine

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
    check_family(checkpoint, reference_of(checkpoint), tmp_path)


def test_a_tokens_result_does_not_depend_on_the_others_in_its_batch(tmp_path: Path) -> None:
    """Alone, and beside others of which some choose the same experts."""
    loaded = make_engine(save_checkpoint(tmp_path / "checkpoint", "mixtral", num_local_experts=5), tmp_path / "store")
    torch.manual_seed(5)
    prompts = [torch.randint(2, VOCAB_SIZE, (length,)).tolist() for length in (20, 50, 3)]

    def run(count: int) -> dict[tuple[int, int], torch.Tensor]:
        engine = Engine(loaded)
        rows = watch(engine)
        engine.run(
            [
                Sequence(0, row, list(prompt), len(prompt), 12, Sampling(0.0))
                for row, prompt in enumerate(prompts[:count])
            ]
        )
        return rows

    alone, beside = run(1), run(3)
    assert len(alone) == 20 + 12 - 1 and len(beside) == 73 + 3 * 11
    for at, row in alone.items():
        assert (row - beside[at]).abs().max() < 1e-5


def test_mixtral_in_half_precision_stays_near_the_reference(tmp_path: Path) -> None:
    """A token goes through all experts here: where it goes through some, rounding turns near ties of the router around."""
    changes = {"num_local_experts": 5, "num_experts_per_tok": 5}
    check_half_precision(save_checkpoint(tmp_path / "checkpoint", "mixtral", **changes), tmp_path)


def test_routers_in_half_precision_err_as_transformers_does(tmp_path: Path) -> None:
    """The median distance from float32 logits, which near ties of routers make large, is at most a quarter more."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "mixtral", num_local_experts=5)
    half = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
    )
    torch.manual_seed(6)
    prompt = torch.randint(2, VOCAB_SIZE, (200,)).tolist()
    engine = Engine(make_engine(checkpoint, tmp_path / "store", dtype="bfloat16"))
    rows = watch(engine)
    engine.run([Sequence(0, 0, list(prompt), len(prompt), 1, Sampling(0.0))])
    with torch.inference_mode():
        wanted, theirs = (model(torch.tensor([prompt])).logits[0].float() for model in (reference_of(checkpoint), half))
    ours = torch.stack([rows[0, position] for position in range(len(prompt))])
    errors = [(found - wanted).abs().amax(-1).median() for found in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1], errors


@pytest.mark.parametrize(("family", "changes"), [CASES["mixtral"], CASES["qwen2-moe"]])
def test_experts_that_a_file_holds_together_are_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    each = save_checkpoint(tmp_path / "each", family, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(each)
    together = tmp_path / "together"
    model.save_pretrained(together, save_original_format=False)
    save_tokenizer(together)
    one, other = (make_engine(folder, tmp_path / "store").manifest for folder in (each, together))
    assert one.engine_id != other.engine_id and one.ranks == other.ranks


BASE = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12,
}  # fmt: skip
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("Mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than num_experts 4"),
    ("Mixtral", {"num_experts": None, "num_local_experts": 1}, "more than num_local_experts 1"),
    ("Mixtral", {"num_experts": None}, "no 'num_local_experts'"),
    ("Mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for experts; supported is silu"),
    ("Qwen2Moe", {"num_experts_per_tok": 0}, "'num_experts_per_tok' is 0"),
    ("Qwen2Moe", {"shared_expert_intermediate_size": None}, "no 'shared_expert_intermediate_size'"),
    (
        "Qwen2Moe",
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 2, "sliding_window": 9},
        "of 3 layers",
    ),
    ("Qwen3Moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
    ("Qwen3Moe", {"mlp_only_layers": [3]}, "'mlp_only_layers' has 3, expected numbers of layers from 0 to 2"),
    ("Qwen3Moe", {"mlp_only_layers": ["1"]}, "'mlp_only_layers' has '1'"),
    ("Qwen3Moe", {"norm_topk_prob": "yes"}, "'norm_topk_prob' is 'yes', expected bool"),
]


@pytest.mark.parametrize(("family", "changes", "words"), WRONG)
def test_what_cannot_be_built(family: str, changes: dict[str, Any], words: str) -> None:
    fields = Fields({**BASE, **changes, "architectures": [f"{family}ForCausalLM"]}, "config.json")
    page, architecture = find_family(fields)
    with pytest.raises(EnginehouseError, match=words):
        page.decoder_config(fields, architecture)
