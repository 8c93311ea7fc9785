"""Engines of several ranks: all ranks' programs together give one rank's logits."""

import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from quantized_writers import Writer, awq, floats, gptq, save_quantized
from qwen_reference import save_qwen
from torch import Tensor

from builder_svc.build_config import BuildConfig
from builder_svc.mapping import Mapping
from builder_svc.models import families
from builder_svc.pipeline import build
from builder_svc.shard import Cut
from engine import blobs
from engine.artifact import Engine
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, InvalidArgument
from engine.opset import OPERATORS
from enginehouse.cli import main
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from tests.conftest import save_checkpoint
from tests.ranks import rank_program, rank_weights, run_ranks
from tests.running import reference_logits

TOKENS, STEPS = [*range(2, 36), 319, 7], [33, 1, 2]
ROPE = {"rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-odd-vocabulary": ("llama", {"vocab_size": 323}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "head_dim": 14},
    ),
    "mistral": ("mistral", {"sliding_window": 9}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"pad_token_id": None}),
    "gemma": ("gemma", {"head_dim": 14}),
    "gemma2": ("gemma2", {"head_dim": 14, "sliding_window": 9, "final_logit_softcapping": 2.5}),
    "granite": ("granite", {"residual_multiplier": 0.22, "logits_scaling": 1.7}),
    "smollm3": ("smollm3", {"pad_token_id": None, "no_rope_layers": [1, 0, 1]}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 9}),
    "olmo2-one-key": ("olmo2", {"num_key_value_heads": 1}),
    "falcon-one-key": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gptj-odd-vocabulary": ("gptj", {"rotary_dim": 6, "vocab_size": 321}),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {"rope_parameters": ROPE}),
    "mixtral": ("mixtral", {"num_local_experts": 3}),
    "qwen2-moe": ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 60}),
    "stablelm-head-norms": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "rope_parameters": ROPE}),
}


def make(checkpoint: Path, store: DirectoryStore, tp: int = 1, pp: int = 1, **options: Any) -> Engine:
    config = BuildConfig(max_num_tokens=64, device="cpu", tp_size=tp, pp_size=pp, **options)
    return build(checkpoint, config, store=store)


def wanted(checkpoint: Path, store: DirectoryStore) -> Tensor:
    """One rank's logits."""
    return reference_logits(load_engine(store, make(checkpoint, store).engine_id, this_node("cpu")), TOKENS)


def check(engine: Engine, one: Tensor, *, prepared: bool = False) -> None:
    found = run_ranks(engine.store, engine.manifest, TOKENS, STEPS, prepared=prepared)
    assert len(found) == engine.manifest.mapping.tp_size and all(torch.equal(found[0], other) for other in found)
    assert found[0].shape == one.shape
    assert (found[0] - one).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_logits_of_one(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint, store = save_checkpoint(tmp_path / "checkpoint", family, **changes), DirectoryStore(tmp_path / "store")
    check(make(checkpoint, store, 2, 2), wanted(checkpoint, store))


def test_ranks_of_the_first_qwen(tmp_path: Path) -> None:
    """Whose config transformers does not know."""
    checkpoint = save_qwen(tmp_path / "checkpoint", num_attention_heads=4, seq_length=24)
    store = DirectoryStore(tmp_path / "store")
    (one,) = run_ranks(store, make(checkpoint, store).manifest, TOKENS, STEPS)
    check(make(checkpoint, store, 2, 2), one)


def test_every_family_has_been_divided() -> None:
    tried = {re.sub(r"qwen\d_moe", "qwen_moe", family) for family, _ in CASES.values()} | {"qwen"}
    assert tried == {page.name for page in pkgutil.iter_modules(families.__path__)}


def test_each_way_to_divide_is_an_engine_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    one, ids = wanted(checkpoint, store), {make(checkpoint, store).engine_id}
    for split in ((2, 1), (1, 2), (1, 3), (2, 2), (6, 1)):
        engine = make(checkpoint, store, *split)
        assert engine.manifest.fingerprint.opset_version == OPERATORS["all_reduce"].since
        ids.add(engine.engine_id)
        check(engine, one)
    assert len(ids) == 6


def test_every_rank_is_told_how_long_sequences_are(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.3, 1.7, 2.0, 2.5, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 24, **factors}
    changes = {"pad_token_id": None, "original_max_position_embeddings": 24, "rope_parameters": rope}
    checkpoint, store = save_checkpoint(tmp_path / "checkpoint", "phi3", **changes), DirectoryStore(tmp_path / "store")
    (one,) = run_ranks(store, make(checkpoint, store).manifest, TOKENS, STEPS)
    engine = make(checkpoint, store, 2, 2)
    assert all("rope_lengths" in rank_program(store, engine.manifest, rank).inputs for rank in range(4))
    check(engine, one)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
PACKED: dict[str, tuple[dict[str, Any], Writer]] = {
    "int4": ({**GPTQ, "sym": False}, gptq(4, 32, symmetric=False)),
    "int4-zeros": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq(32),
    ),
    "int4-row": ({**GPTQ, "group_size": -1}, gptq(4, -1)),
    "int8": ({**GPTQ, "bits": 8, "group_size": -1}, gptq(8, -1)),
    "fp8-row": ({"quant_method": "fbgemm_fp8"}, floats(None, "channel")),
    "fp8-blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]},
        floats((16, 32), scale="weight_scale_inv"),
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "attention_bias": True}
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", **size)


@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_are_cut_with_their_scales(form: str, plain: Path, tmp_path: Path) -> None:
    config, writer = PACKED[form]
    store = DirectoryStore(tmp_path / "store")
    save_quantized(plain, tmp_path / "checkpoint", config, lambda name: None if name == "lm_head" else writer)
    one = wanted(tmp_path / "checkpoint", store)
    engine = make(tmp_path / "checkpoint", store, 2, 2)
    assert "layers.1.mlp.down.scales" in rank_program(store, engine.manifest, 3).weights
    check(engine, one)
    check(engine, one, prepared=True)


def test_a_shard_ends_where_a_scale_does(plain: Path, tmp_path: Path) -> None:
    config, writer = PACKED["fp8-blocks"]
    save_quantized(plain, tmp_path / "blocks", config, lambda name: None if name == "lm_head" else writer)
    with pytest.raises(InvalidArgument) as caught:
        make(tmp_path / "blocks", DirectoryStore(tmp_path / "store"), 4)
    assert caught.value.message == (
        "mapping: tp_size 4 cuts the weight of layers.0.attention.out, [64, 64] in float8_e4m3fn, blocks of 16 x 32, "
        "at column 16, which is no multiple of 32; tp_size 1 or 2 would fit"
    )


@pytest.mark.parametrize(
    ("family", "changes", "split", "says"),
    [
        ("llama", {"num_attention_heads": 6}, (4, 1),
         "6 attention heads cannot be divided among tp_size 4; tp_size 1 or 2 or 6 would fit"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2}, (3, 1),
         "2 heads of keys and values cannot be divided among tp_size 3; tp_size 1 or 2 or 6 would fit"),
        ("llama", {"intermediate_size": 66}, (4, 1),
         "an intermediate size of 66 cannot be divided among tp_size 4; tp_size 1 or 2 would fit"),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 62}, (4, 1),
         "an intermediate size of 62 cannot be divided among tp_size 4; tp_size 1 or 2 would fit"),
        ("llama", {}, (1, 4), "3 layers cannot be divided among pp_size 4; at most 3 would fit"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_in_words(
    family: str, changes: dict[str, Any], split: tuple[int, int], says: str, tmp_path: Path
) -> None:
    checkpoint, store = save_checkpoint(tmp_path / "checkpoint", family, **changes), DirectoryStore(tmp_path / "store")
    with pytest.raises(InvalidArgument) as caught:
        make(checkpoint, store, *split)
    assert caught.value.message.startswith("mapping: ") and says in caught.value.message
    assert not (tmp_path / "store" / "engines").exists()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama") / "checkpoint", vocab_size=322, tie_word_embeddings=True)


def test_keys_that_several_ranks_have(llama: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    engine, one = make(llama, store, 4), wanted(llama, store)
    check(engine, one)
    check(engine, one, prepared=True)
    rows = [rank_weights(store, engine.manifest, rank)["layers.0.attention.qkv.weight"] for rank in range(4)]
    assert torch.equal(rows[0][12:], rows[1][12:]) and not torch.equal(rows[1][12:], rows[2][12:])
    embeddings = [rank_weights(store, engine.manifest, rank)["embedding"] for rank in range(4)]
    assert [len(part) for part in embeddings] == [81] * 4 and not embeddings[3][-2:].any() and embeddings[3][-3].any()


def test_what_several_ranks_have_is_stored_once(llama: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    one, engine = make(llama, store).manifest, make(llama, store, 2, 2).manifest
    assert engine.mapping.world_size == len(engine.ranks) == 4 and engine.identity["mapping"]["pp_size"] == 2
    assert engine.model == one.model  # the whole model's, whatever the ranks
    programs = [rank.program.digest for rank in engine.ranks]
    assert programs[0] == programs[1] != programs[2] == programs[3]
    held = [{file.name for file in rank.weights} for rank in engine.ranks]
    assert held[0] & held[1] and held[0] & held[2] and not held[1] & held[2] - held[0]
    norms = [file for file in engine.ranks[0].weights if file.name.startswith("rank0+1-")]
    assert norms and set(norms) < set(engine.ranks[1].weights)
    digests = [file.digest for file in engine.files()]
    assert len(digests) == len(set(digests)) and all(store.size(blobs.blob_key(file.digest)) for file in engine.files())
    stored = sum({file.digest: file.size for rank in engine.ranks for file in rank.weights}.values())
    assert stored < one.weight_bytes() * 1.1 and engine.weight_bytes() > one.weight_bytes() * 1.1  # the tied embedding
    caches = [rank_program(store, engine, rank).caches for rank in range(4)]
    assert [len(found) for found in caches] == [2, 2, 1, 1]
    assert sum(cache.bytes_per_token for found in caches for cache in found) == one.model.kv_bytes_per_token
    told = CliRunner().invoke(main, ["engines", "inspect", engine.engine_id[:12], "--store", str(tmp_path / "store")])
    assert "4 (tp 2, pp 2)" in told.output, told.output
    with pytest.raises(FailedPrecondition, match="is for 4 ranks"):
        load_engine(store, engine.engine_id, this_node("cpu"))


def test_dummy_weights(llama: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    engine = make(llama, store, 2, dummy_weights=True).manifest
    assert [rank.random_seed for rank in engine.ranks] == [0, 0]
    firsts = [rank_weights(store, engine, rank)["first_id"] for rank in range(2)]
    assert [int(first) for first in firsts] == [0, 161]


def test_parts_of_a_weight() -> None:
    whole = torch.arange(24.0).view(8, 3)
    parts = [whole[:5], whole[5:]]
    cut = Cut(((1, 3), (4, 7)), padding=1)
    assert torch.equal(
        torch.cat(list(cut.taken(parts, (6, 3)))), torch.cat([whole[1:3], whole[4:7], torch.zeros(1, 3)])
    )
    assert torch.equal(torch.cat(list(Cut(columns=(1, 3)).taken(parts, (8, 2)))), whole[:, 1:])
    assert not torch.cat(list(Cut(zeros=True).taken(parts, (8, 3)))).any()
    assert [rank.rank for rank in Mapping(4, tp_size=2, pp_size=2).ranks()] == [0, 1, 2, 3]
