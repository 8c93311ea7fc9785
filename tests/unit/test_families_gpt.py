"""Families with layer norms and plain feed-forward parts against transformers: GPT-2, GPT-J, Phi, Falcon."""

import shutil
from pathlib import Path

import pytest
import torch
from families_harness import check_family, reference_of
from safetensors.torch import load_file, save_file
from transformers.models.falcon import modeling_falcon

from builder_svc.models.families.falcon import alibi_slopes, decoder_config
from builder_svc.models.fields import Fields
from tests.conftest import save_checkpoint
from tests.running import make_engine

GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
FALCON_40B = {"new_decoder_architecture": True, "num_attention_heads": 6, "num_kv_heads": 2}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}

CASES = {
    "gpt2": (
        "gpt2",
        {"n_head": 3, "n_inner": 100, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "gpt2-untied": (
        "gpt2", {"n_embd": 60, "tie_word_embeddings": False, "activation_function": "gelu", "scale_attn_weights": False}
    ),
    "gptj": ("gptj", {"n_head": 3, "rotary_dim": 6}),
    "gptj-tied": (
        "gptj", {"rotary_dim": 12, "tie_word_embeddings": True, "n_inner": 100, "activation_function": "gelu"}
    ),
    "phi": ("phi", {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "phi-tied": (
        "phi",
        {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3, "partial_rotary_factor": 0.4,
         "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "falcon-7b": ("falcon", {"num_attention_heads": 6}),
    "falcon-40b": ("falcon", {**FALCON_40B, "bias": True, "tie_word_embeddings": False}),
    "falcon2-11b": (
        "falcon",
        {**FALCON_40B, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 100, "activation": "gelu_new",
         "rope_parameters": {"rope_type": "default", "rope_theta": 90.0}},
    ),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "multi_query": False, "num_attention_heads": 3}),
    "falcon-rw": ("falcon", FALCON_RW),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **changes)
    # transformers' eager attention adds Falcon's alibi twice
    attention = "sdpa" if changes.get("alibi") else "eager"
    check_family(checkpoint, reference_of(checkpoint, attention), tmp_path)


def test_alibi_of_any_number_of_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds slope times position to bfloat16, which is exact for the case above alone; here it does not."""

    def exact(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        slopes = build(torch.ones(1, 2, dtype=torch.int64), num_heads, torch.float32)[:, 0, 1]
        return (slopes[:, None] * torch.arange(attention_mask.shape[-1])[None, :])[:, None, :].to(dtype)

    build = modeling_falcon.build_alibi_tensor
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", exact)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "falcon", **FALCON_40B, alibi=True)
    check_family(checkpoint, reference_of(checkpoint, "sdpa"), tmp_path)


@pytest.mark.parametrize("num_heads", [1, 2, 8, 12, 71, 128])
def test_slopes_are_those_of_transformers(num_heads: int) -> None:
    theirs = modeling_falcon.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), num_heads, torch.float32)
    assert alibi_slopes(num_heads) == theirs[:, 0, 1].tolist()


def test_names_of_the_first_falcons(tmp_path: Path) -> None:
    """RefinedWeb's configs say the same in other words, and leave out what all of them have."""

    def falcon(**values: object) -> Fields:
        return Fields(
            {"vocab_size": 320, "hidden_size": 48, "layer_norm_epsilon": 1e-5, "bias": False, **values}, "config"
        )

    heads = {"num_attention_heads": 6, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    old_heads = {"n_head": 6, "n_layer": 2, "alibi": False}
    grouped = decoder_config(falcon(**heads, new_decoder_architecture=True, num_kv_heads=2), "x")
    assert decoder_config(falcon(**old_heads, n_head_kv=2, parallel_attn=True), "x") == grouped
    shared = decoder_config(falcon(**heads), "x")
    assert decoder_config(falcon(**old_heads, multi_query=True, parallel_attn=True), "x") == shared
    assert grouped.layers[0].attention.num_kv_heads == 2
    assert shared.layers[0].attention.num_kv_heads == 1


def test_gpt2_checkpoints_without_prefix_and_with_masks(tmp_path: Path) -> None:
    """As the first GPT-2 files are: names without "transformer.", causal masks among the weights."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "gpt2", num_hidden_layers=2)
    old = Path(shutil.copytree(checkpoint, tmp_path / "old"))
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for index in range(2):
        renamed[f"h.{index}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
        renamed[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(renamed, old / "model.safetensors", {"format": "pt"})
    found, wanted = (make_engine(path, tmp_path / path.name).manifest for path in (old, checkpoint))
    assert [file.digest for file in found.ranks[0].weights] == [file.digest for file in wanted.ranks[0].weights]
