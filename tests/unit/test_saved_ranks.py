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
from enginehouse import AutoModelForCausalLM, LLaMAForCausalLM, Mapping, QuantConfig
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from tests.conftest import save_checkpoint
from tests.ranks import run_ranks
from tests.running import reference_logits

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


QUANTIZED: dict[str, dict[str, Any]] = {
    "int4": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "FP8", "quantize_lm_head": True},
    "int4-zeros": {"quant_algo": "W4A16", "has_zero_point": True},
    "int8": {"quant_algo": "W8A16", "quantize_lm_head": True},
    "int8-tokens": {"quant_algo": "W8A8_SQ_PER_CHANNEL", "kv_cache_quant_algo": "INT8"},
    "fp8": {"quant_algo": "FP8", "quantize_lm_head": True},
    "fp8-tokens": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
}
CALIB = {"calib_batches": 4, "calib_max_seq_length": 64}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 321}
    return save_checkpoint(tmp_path_factory.mktemp("groups") / "checkpoint", **size)


@pytest.mark.parametrize("form", QUANTIZED)
def test_ranks_of_a_quantized_model(form: str, groups: Path, tmp_path: Path) -> None:
    """One file each, which together are the whole quantized model; and their engine computes what one rank's does."""
    quant, ranks = QuantConfig(group_size=32, **QUANTIZED[form]), Mapping(4, tp_size=2, pp_size=2)
    for name, mapping in (("whole", None), ("ranks", ranks)):
        LLaMAForCausalLM.quantize(groups, tmp_path / name, mapping=mapping, quant_config=quant, **CALIB)
    whole = AutoModelForCausalLM.from_checkpoint(tmp_path / "whole")
    parts = [AutoModelForCausalLM.from_checkpoint(tmp_path / "ranks", rank) for rank in range(4)]
    assert [part.config.mapping for part in parts] == ranks.ranks()
    assert sorted(file.name for file in (tmp_path / "ranks").glob("*.safetensors")) == [
        f"rank{rank}.safetensors" for rank in range(4)
    ] and not list((tmp_path / "ranks").glob(".*"))
    for name, weight in whole.weights().items():
        assert torch.equal(parts[1].weights()[name].view(torch.uint8), weight.view(torch.uint8)), name
    store = DirectoryStore(tmp_path / "store")
    one = build(whole, BuildConfig(device="cpu"), store=store)
    divided = build(whole, BuildConfig(device="cpu", tp_size=2, pp_size=2), store=store)
    again = build(parts[0], BuildConfig(device="cpu"), store=store)
    assert again.manifest.ranks == divided.manifest.ranks and again.manifest.quantization == one.manifest.quantization
    assert again.manifest.model == one.manifest.model
    tokens = [*range(2, 30)]
    dense, expected = (reference_logits(load_engine(store, made.engine_id, this_node("cpu")), tokens) for made in (
        build(groups, BuildConfig(device="cpu"), store=store), one,
    ))  # fmt: skip
    bound = 0.02 if quant.kv_cache_quant_algo else 1e-5  # what is next to a border falls to either side of it
    lost = (expected - dense).square().mean().sqrt()
    for prepared in (False, True):
        for found in run_ranks(store, divided.manifest, tokens, [20, 8], prepared=prepared):
            if form == "int8-tokens":  # a rank rounds its part of a token by its own largest number: no more coarsely
                assert (found - dense).square().mean().sqrt() <= 1.1 * lost
            else:
                assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_one_rank_alone_is_not_quantized(groups: Path, tmp_path: Path) -> None:
    quant = QuantConfig("W8A16")
    for mapping, save_config in ((Mapping(2, 1, tp_size=2), True), (Mapping(), False)):
        model = AutoModelForCausalLM.from_hugging_face(groups, mapping=mapping, quant_config=quant)
        with pytest.raises(InvalidArgument, match="call quantize, with the mapping, in place of save_checkpoint"):
            model.save_checkpoint(tmp_path / "saved", save_config)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(InvalidArgument, match="cuts the weight of layers.0.attention.out.* tp_size 1 or 2 would fit"):
        LLaMAForCausalLM.quantize(
            groups, tmp_path / "saved", mapping=Mapping(4, tp_size=4), quant_config=QuantConfig("W4A16", group_size=32)
        )
    assert not (tmp_path / "saved").exists()
