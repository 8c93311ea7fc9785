"""Checkpoints that are saved rank by rank: each file has its rank's part, and together they are the model."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from builder_svc.build_config import BuildConfig
from builder_svc.causal_lm import CausalLM
from builder_svc.models.decoder import Decoder
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.errors import InvalidArgument, NotFound
from enginehouse import AutoModelForCausalLM, Mapping
from tests.conftest import save_checkpoint

ROPE = {"rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.5}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "llama": ("llama", {}, (2, 2)),
    "llama-keys-that-ranks-share": ("llama", {"vocab_size": 323, "tie_word_embeddings": True}, (4, 1)),
    "biases": ("gpt_neox", {"rope_parameters": ROPE}, (2, 1)),
    "learned-positions": ("gpt2", {}, (2, 2)),
    "norms-of-all-heads": ("olmo2", {"num_key_value_heads": 1}, (2, 1)),
    "experts": ("mixtral", {"num_local_experts": 3}, (2, 1)),
}


def save(checkpoint: Path, directory: Path, tp: int, pp: int) -> list[CausalLM]:
    """A loop over ranks, as people write it."""
    ranks = Mapping(tp * pp, tp_size=tp, pp_size=pp).ranks()
    models = [AutoModelForCausalLM.from_hugging_face(checkpoint, mapping=rank) for rank in ranks]
    for model in models:
        model.save_checkpoint(directory, save_config=model.config.mapping.rank == 0)
    return models


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_files_are_the_model(case: str, tmp_path: Path) -> None:
    family, changes, (tp, pp) = CASES[case]
    checkpoint, saved = save_checkpoint(tmp_path / "checkpoint", family, **changes), tmp_path / "saved"
    models = save(checkpoint, saved, tp, pp)
    for number, model in enumerate(models):
        declared = Decoder.on_meta(model.config.decoder, "float32", mapping=model.config.mapping).declared()
        with safe_open(saved / f"rank{number}.safetensors", "pt") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                name: type.shape for name, type in declared.items()
            }
        again = AutoModelForCausalLM.from_checkpoint(saved, rank=number)
        assert again.config.mapping.rank == number and again.config == model.config
    whole, merged = models[0].weights(), again.weights()
    assert whole.keys() == merged.keys() and all(torch.equal(merged[name], whole[name]) for name in whole)
    options, store = BuildConfig(device="cpu"), DirectoryStore(tmp_path / "store")
    expected = build(models[0], options, store=store).manifest
    for source in (again, saved):
        manifest = build(source, options, store=store).manifest
        assert manifest.mapping == expected.mapping and manifest.ranks == expected.ranks
        assert manifest.engine_id != expected.engine_id


@pytest.fixture
def saved(checkpoint: Path, tmp_path: Path) -> Path:
    save(checkpoint, tmp_path / "saved", 1, 2)
    return tmp_path / "saved"


def test_what_was_saved_of_some_ranks_can_be_divided_among_others(
    checkpoint: Path, saved: Path, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "store")
    config = AutoModelForCausalLM.from_checkpoint(saved).config
    for mapping in (Mapping(), Mapping(2, tp_size=2)):
        model = AutoModelForCausalLM.from_checkpoint(saved, config=replace(config, mapping=mapping))
        expected = AutoModelForCausalLM.from_hugging_face(checkpoint, mapping=mapping)
        options = BuildConfig(device="cpu")
        assert build(model, options, store=store).manifest.ranks == build(expected, options, store=store).manifest.ranks


def test_files_that_are_not_of_one_model_are_refused(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="rank is 2, but the last of 2 ranks is 1"):
        AutoModelForCausalLM.from_checkpoint(saved, rank=2)
    model = AutoModelForCausalLM.from_checkpoint(saved, rank=1)
    with pytest.raises(InvalidArgument, match="is where the weights of all ranks are read from: save to another"):
        model.save_checkpoint(saved)
    shutil.copy(saved / "rank0.safetensors", saved / "rank1.safetensors")
    with pytest.raises(
        InvalidArgument, match=r"rank1.safetensors: tensor '.*' has .*, but by config.json that rank has"
    ):
        AutoModelForCausalLM.from_checkpoint(saved)
    (saved / "rank1.safetensors").unlink()
    with pytest.raises(NotFound, match="lacks rank1.safetensors: copy that file, too, or save that rank"):
        AutoModelForCausalLM.from_checkpoint(saved)
    with pytest.raises(InvalidArgument, match="3 layers cannot be divided among pp_size 4"):
        AutoModelForCausalLM.from_hugging_face(checkpoint, mapping=Mapping(4, pp_size=4)).save_checkpoint(
            tmp_path / "4"
        )


def test_rank_0_removes_what_was_there(checkpoint: Path, saved: Path) -> None:
    """A loop that breaks off leaves no mixture of two models."""
    AutoModelForCausalLM.from_hugging_face(checkpoint, mapping=Mapping(2, pp_size=2)).save_checkpoint(saved)
    with pytest.raises(NotFound, match="lacks rank1.safetensors"):
        AutoModelForCausalLM.from_checkpoint(saved)
