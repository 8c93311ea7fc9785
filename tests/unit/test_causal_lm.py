"""The model classes of the Python API: what they read, what they hold, and that what they save builds the same engine."""

import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from test_builder_pipeline import change_config

import enginehouse
from builder_svc.auto import model_classes
from builder_svc.models import families
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, NotFound, ResourceExhausted, Unimplemented
from engine.manifest import Manifest
from enginehouse import (
    AutoConfig,
    AutoModelForCausalLM,
    BuildConfig,
    Engine,
    Mapping,
    PretrainedConfig,
    QuantConfig,
    build,
)
from enginehouse.cli import main
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from tests.conftest import save_checkpoint


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen"), "qwen2", tie_word_embeddings=True)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def engine_weights(model: Any, store: Path, **options: Any) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Of an engine that is built and loaded."""
    manifest = build(model, BuildConfig(**options), store=DirectoryStore(store)).manifest
    loaded = load_engine(DirectoryStore(store), manifest.engine_id, this_node("cpu"))
    return manifest, loaded.weights


# Mappings


def test_a_mapping_says_who_its_neighbours_are() -> None:
    rank = Mapping(world_size=12, rank=7, gpus_per_node=4, tp_size=4, pp_size=3)
    assert (rank.tp_rank, rank.pp_rank, rank.node_rank, rank.local_rank) == (3, 1, 1, 3)
    assert (rank.tp_group, rank.pp_group) == ([4, 5, 6, 7], [3, 7, 11])
    assert (rank.prev_pp_rank(), rank.next_pp_rank()) == (3, 11)
    assert (rank.is_first_pp_rank(), rank.is_last_pp_rank(), rank.has_tp(), rank.has_pp()) == (False, False, True, True)
    assert replace(rank, rank=11).next_pp_rank() == 3 and replace(rank, rank=3).prev_pp_rank() == 11
    assert [replace(rank, rank=4 * stage).pp_layers(8) for stage in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert Mapping.from_dict(rank.to_dict()) == rank
    assert Mapping() == Mapping(1, 0, 8, tp_size=1, pp_size=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"world_size": 4, "tp_size": 2}, r"tp_size 2 \* pp_size 1 is 2, but world_size is 4"),
        ({"world_size": 2, "tp_size": 2, "rank": 2}, "rank is 2, but the last of 2 ranks is 1"),
        ({"tp_size": 0}, "tp_size is 0, expected a number from 1"),
        ({"world_size": True}, "world_size is True"),
        ({"cp_size": 2}, "cp_size is no field of it"),
    ],
)
def test_a_mapping_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mapping.from_dict(fields)


def test_layers_that_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be divided among pp_size 3"):
        Mapping(3, pp_size=3).pp_layers(2)


# Configurations


def test_a_config_has_the_source_apis_fields(checkpoint: Path) -> None:
    mapping = Mapping(world_size=2, rank=1, tp_size=2)
    config = AutoConfig.from_hugging_face(str(checkpoint), dtype="float16", mapping=mapping)
    told = config.to_dict()
    assert json.loads(json.dumps(told)) == told
    ours = told.pop("enginehouse")
    assert told == {
        "architecture": "LlamaForCausalLM", "dtype": "float16", "logits_dtype": "float32", "vocab_size": 320, "hidden_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_size": 20, "hidden_act": "silu",
        "intermediate_size": 72, "norm_epsilon": 1e-6, "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 256, "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }  # fmt: skip
    assert ours["config"] == json.loads((checkpoint / "config.json").read_text())
    assert PretrainedConfig.from_dict(config.to_dict()) == replace(config, mapping=replace(mapping, rank=0))


def test_auto_is_the_dtype_that_config_json_declares(copy: Path) -> None:
    change_config(copy, dtype="bfloat16")
    assert AutoConfig.from_hugging_face(copy).dtype == "bfloat16"
    change_config(copy, dtype=None, torch_dtype=None)
    assert AutoConfig.from_hugging_face(copy).dtype == "float32"


def test_an_unknown_architecture_is_not_implemented_and_the_known_ones_are_named(copy: Path) -> None:
    change_config(copy, architectures=["MambaForCausalLM"])
    for read in (
        AutoConfig.from_hugging_face,
        AutoModelForCausalLM.from_hugging_face,
        AutoModelForCausalLM.get_trtllm_model_class,
    ):
        with pytest.raises(NotImplementedError, match=r"MambaForCausalLM.*LlamaForCausalLM, .*Qwen2ForCausalLM"):
            read(copy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "int4"}, ValueError, "dtype 'int4': choose one of auto, float32"),
        ({"mapping": {"tp_size": 1}}, ValueError, "give a Mapping"),
        ({"quant_config": QuantConfig("W4A8_AWQ")}, NotImplementedError, "W4A8_AWQ: it is not made here"),
        ({"quant_config": "W4A16"}, ValueError, "quant_config is 'W4A16': give a QuantConfig"),
        (
            {"hf_model_or_dir": "nowhere"},
            NotFound,
            "nowhere is no directory and no .gguf file; .* or ORG/NAME of the hub",
        ),
        ({"revision": "v1"}, ValueError, "a revision is of a repository of the hub"),
    ],
)
def test_what_from_hugging_face_refuses(
    checkpoint: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    for read in (AutoConfig, AutoModelForCausalLM, enginehouse.LLaMAForCausalLM):
        with pytest.raises(error, match=message):
            read.from_hugging_face(**{"hf_model_or_dir": str(checkpoint), **arguments})


def test_a_config_that_contradicts_itself_or_is_another_programs(checkpoint: Path) -> None:
    values = AutoConfig.from_hugging_face(checkpoint).to_dict()
    with pytest.raises(ValueError, match="'num_hidden_layers' is 2, but by the Hugging Face config .* it is 3"):
        PretrainedConfig.from_dict({**values, "num_hidden_layers": 2})
    with pytest.raises(NotImplementedError, match="quantization .*W4A16.* is not supported"):
        PretrainedConfig.from_dict({**values, "quantization": {"quant_algo": "W4A16"}})
    with pytest.raises(NotImplementedError, match="has format 2, this release reads 1"):
        PretrainedConfig.from_dict({**values, "enginehouse": {**values["enginehouse"], "format": 2}})
    with pytest.raises(ValueError, match="read it with from_hugging_face"):
        PretrainedConfig.from_dict(values["enginehouse"]["config"])
    del values["enginehouse"]
    with pytest.raises(NotImplementedError, match="was written by another program"):
        PretrainedConfig.from_dict(values)


# Classes


def test_a_class_for_each_class_name_of_the_pages(checkpoint: Path, qwen: Path) -> None:
    wanted = {page.CLASS_NAME for page in families.families().values()}
    assert {"LLaMAForCausalLM", "QWenForCausalLM"} <= wanted <= set(dir(enginehouse))
    for name in wanted:
        found = getattr(enginehouse, name)
        assert (found.__name__, found.__module__) == (name, "enginehouse") and found is getattr(enginehouse, name)
    assert AutoModelForCausalLM.get_trtllm_model_class(checkpoint) is enginehouse.LLaMAForCausalLM
    assert type(AutoModelForCausalLM.from_hugging_face(qwen)) is enginehouse.QWenForCausalLM
    with pytest.raises(AttributeError, match="no attribute 'NoSuchForCausalLM'"):
        enginehouse.NoSuchForCausalLM  # noqa: B018


def test_a_new_page_is_a_new_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(families.__file__).with_name("llama.py").read_text()
    page = page.replace('("LlamaForCausalLM",)', '("OwnForCausalLM",)').replace("LLaMAForCausalLM", "OwnForCausalLM")
    (tmp_path / "own.py").write_text(page)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert "OwnForCausalLM" in dir(enginehouse)
    assert enginehouse.OwnForCausalLM.CLASS_NAME == "OwnForCausalLM"
    del enginehouse.OwnForCausalLM
    monkeypatch.delitem(sys.modules, f"{families.__name__}.own")


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, enginehouse, typing; assert 'torch' not in sys.modules; enginehouse.Mapping(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


def test_a_class_refuses_what_another_one_reads(checkpoint: Path, qwen: Path) -> None:
    message = "Qwen2ForCausalLM is a model of QWenForCausalLM, not of LLaMAForCausalLM: use enginehouse.QWenForCausalLM"
    config = AutoConfig.from_hugging_face(qwen)
    with pytest.raises(ValueError, match=message):
        enginehouse.LLaMAForCausalLM.from_hugging_face(qwen)
    with pytest.raises(ValueError, match=message):
        enginehouse.LLaMAForCausalLM(config)


def test_a_model_builds_the_engine_that_its_directory_builds(checkpoint: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    options = BuildConfig(max_seq_len=64)
    built = build(enginehouse.LLaMAForCausalLM.from_hugging_face(str(checkpoint)), options, store=store)
    again = build(checkpoint, options, store=store)
    assert (built.reused, again.reused, again.manifest) == (False, True, built.manifest)
    assert built.manifest.source == str(checkpoint)


def test_the_models_dtype_is_the_engines(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_hugging_face(checkpoint, dtype="bfloat16")
    manifest, weights = engine_weights(model, tmp_path)
    assert manifest.model.dtype == "bfloat16" and weights["layers.0.mlp.down.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="the model is bfloat16, the options say float16"):
        build(model, BuildConfig(dtype="float16"), store=DirectoryStore(tmp_path))


def test_a_loop_over_ranks_builds_one_engine(checkpoint: Path, tmp_path: Path) -> None:
    for rank in range(2):
        model = AutoModelForCausalLM.from_hugging_face(checkpoint, mapping=Mapping(2, rank, tp_size=2))
        engine = build(model, BuildConfig(device="cpu"))
        assert engine is build(model, BuildConfig(device="cpu", tp_size=2))  # nothing is built again
        engine.save(tmp_path / "engine")
    found = Engine.from_dir(tmp_path / "engine", rank=1)
    assert found.engine_id == engine.engine_id and len(found.manifest.ranks) == found.manifest.mapping.tp_size == 2
    with pytest.raises(ValueError, match="rank 2, but the last of 2 ranks is 1"):
        Engine.from_dir(tmp_path / "engine", rank=2)
    with pytest.raises(ValueError, match="the model's has tp_size 2 and pp_size 1, the options say 1 and 2"):
        build(model, BuildConfig(device="cpu", pp_size=2))


# Weights


def test_weights_are_those_of_the_engine(qwen: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_hugging_face(qwen)
    weights = model.weights()
    _, loaded = engine_weights(model, tmp_path)
    assert set(loaded) - set(weights) == {"rope.0.inv_freq"} and len(weights) == len(loaded) - 1
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)
    assert {name: (str(weights[name].dtype), weights[name].shape) for name in weights} == {
        name: (f"torch.{type.dtype}", type.shape) for name, type in model.declared().items()
    }


def test_load_replaces_all_weights(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_hugging_face(checkpoint)
    given = {name: torch.randn(tensor.shape) for name, tensor in model.weights().items()}
    dummy = enginehouse.LLaMAForCausalLM(AutoConfig.from_hugging_face(checkpoint))
    ids = {build(checkpoint, store=DirectoryStore(tmp_path)).manifest.engine_id}
    for loading in (model, dummy):
        loading.load(given)
        manifest, loaded = engine_weights(loading, tmp_path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in given.items())
        ids.add(manifest.engine_id)
    assert len(ids) == 2
    changed = {**given, "final_norm.weight": given["final_norm.weight"] + 1}
    model.load(changed)
    assert build(model, store=DirectoryStore(tmp_path)).manifest.engine_id not in ids


def test_load_checks_names_and_shapes(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_hugging_face(checkpoint)
    whole = dict(model.weights())
    before = model.checkpoint
    missing = {name: tensor for name, tensor in whole.items() if name != "layers.1.mlp.down.weight"}
    with pytest.raises(ValueError, match="has no tensor 'layers.1.mlp.down.weight'"):
        model.load(missing)
    with pytest.raises(ValueError, match="holds tensor 'extra'"):
        model.load({**whole, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'final_norm.weight' has shape \[47\], config.json implies \[48\]"):
        model.load({**whole, "final_norm.weight": torch.zeros(47)})
    assert model.checkpoint is before


# Saved checkpoints


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_saved_checkpoint_builds_the_same_engine(
    checkpoint: Path, qwen: Path, tmp_path: Path, family: str, dtype: str
) -> None:
    """By Python and by path: the same program, weights and tokenizer."""
    directory, saved = {"llama": checkpoint, "qwen": qwen}[family], tmp_path / "saved"
    model = AutoModelForCausalLM.from_hugging_face(directory, dtype=dtype)
    model.save_checkpoint(saved)
    original, _ = engine_weights(model, tmp_path / "store")
    again = AutoModelForCausalLM.from_checkpoint(saved)
    assert type(again) is type(model) and again.config == model.config
    for source in (again, saved):
        manifest, _ = engine_weights(source, tmp_path / "store")
        assert manifest.engine_id != original.engine_id
        assert manifest.files() == original.files()
        assert (manifest.model, manifest.limits) == (original.model, original.limits)
    assert {file.name for file in saved.iterdir()} == {
        "config.json", "generation_config.json", "rank0.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    with safe_open(saved / "rank0.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.declared())
        stored = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert stored == {"torch.float32" if dtype == "auto" else "torch.bfloat16"}


def test_the_command_line_builds_and_plans_a_saved_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    AutoModelForCausalLM.from_hugging_face(checkpoint).save_checkpoint(tmp_path / "saved")
    built = CliRunner().invoke(main, ["build", str(tmp_path / "saved"), "--name", "m", "--json"])
    assert built.exit_code == 0, built.stderr
    planned = [CliRunner().invoke(main, ["plan", str(path), "--json"]) for path in (tmp_path / "saved", checkpoint)]
    shapes = [json.loads(one.stdout)["model"] | {"name": ""} for one in planned]
    assert shapes[0] == shapes[1]


def test_from_checkpoint_takes_a_config(checkpoint: Path, qwen: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_hugging_face(checkpoint).save_checkpoint(tmp_path / "saved")
    config = PretrainedConfig.from_json_file(tmp_path / "saved" / "config.json")
    shorter = replace(config, hugging_face={**config.hugging_face, "rms_norm_eps": 0.5})
    store = DirectoryStore(tmp_path / "store")
    ids = [
        build(
            enginehouse.LLaMAForCausalLM.from_checkpoint(tmp_path / "saved", config=one), store=store
        ).manifest.engine_id
        for one in (None, config, shorter)
    ]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(ValueError, match="LlamaForCausalLM is a model of LLaMAForCausalLM, not of QWenForCausalLM"):
        enginehouse.QWenForCausalLM.from_checkpoint(tmp_path / "saved")
    fewer = replace(config, hugging_face={**config.hugging_face, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="holds tensor 'layers.2"):
        AutoModelForCausalLM.from_checkpoint(tmp_path / "saved", config=fewer).weights()
    with pytest.raises(ValueError, match="rank is 1, but the last of 1 ranks is 0"):
        AutoModelForCausalLM.from_checkpoint(tmp_path / "saved", rank=1)
    with pytest.raises(ValueError, match="read it with from_checkpoint"):
        AutoModelForCausalLM.from_hugging_face(tmp_path / "saved")


def test_a_save_that_breaks_off_leaves_no_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over an older one, whose config would say what its weights are not."""
    saved, store = tmp_path / "saved", DirectoryStore(tmp_path / "store")
    model = AutoModelForCausalLM.from_hugging_face(checkpoint)
    model.save_checkpoint(saved)

    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("builder_svc.saved._write_json", break_off)
        model.save_checkpoint(saved)
    for read in (lambda: build(saved, store=store), lambda: AutoModelForCausalLM.from_checkpoint(saved)):
        with pytest.raises(NotFound, match="config.json"):
            read()
    with pytest.raises(NotFound, match="saving it did not come to its end. Save it again"):
        enginehouse.LLaMAForCausalLM.from_checkpoint(saved)
    model.save_checkpoint(saved)
    assert build(saved, store=store).manifest


def test_a_save_that_fails_gives_the_disk_back(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builder_svc.weights._Output._write", full)
    with pytest.raises(ResourceExhausted, match="No space left on device"):
        AutoModelForCausalLM.from_hugging_face(checkpoint).save_checkpoint(tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []


def test_save_config_is_of_the_config_alone(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_hugging_face(checkpoint).save_checkpoint(tmp_path / "saved", save_config=False)
    assert not (tmp_path / "saved" / "config.json").exists() and (tmp_path / "saved" / "rank0.safetensors").exists()


def test_where_a_checkpoint_is_not_saved(checkpoint: Path, copy: Path) -> None:
    model = AutoModelForCausalLM.from_hugging_face(checkpoint)
    before = {file: file.read_bytes() for file in copy.iterdir()}
    with pytest.raises(FailedPrecondition, match="holds another checkpoint, whose config.json would be overwritten"):
        model.save_checkpoint(copy)
    assert {file: file.read_bytes() for file in copy.iterdir()} == before
    with pytest.raises(FailedPrecondition, match="cannot write into .*config.json/x"):
        model.save_checkpoint(copy / "config.json" / "x")


def test_a_damaged_or_foreign_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    saved, store = tmp_path / "saved", DirectoryStore(tmp_path / "store")
    AutoModelForCausalLM.from_hugging_face(checkpoint).save_checkpoint(saved)
    file = saved / "rank0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(enginehouse.EnginehouseError, match="rank0.safetensors is damaged or incomplete"):
        build(saved, store=store)
    file.unlink()
    with pytest.raises(NotFound, match=r"lacks rank0.safetensors"):
        build(saved, store=store)
    theirs = {"architecture": "LlamaForCausalLM", "dtype": "float16", "mapping": {"world_size": 1}}
    (saved / "config.json").write_text(json.dumps(theirs))
    foreign = "has no 'enginehouse': it was written by another program"
    with pytest.raises(Unimplemented, match=foreign):
        build(saved, store=store)
    with pytest.raises(Unimplemented, match=foreign):
        AutoConfig.from_hugging_face(saved)
    with pytest.raises(FailedPrecondition, match="holds another checkpoint"):
        AutoModelForCausalLM.from_hugging_face(checkpoint).save_checkpoint(saved)
    assert json.loads((saved / "config.json").read_text()) == theirs


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    (block,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    for name in ("examples", "bench"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["engine"].manifest.dummy_weights and (tmp_path / "demo.ckpt" / "rank0.safetensors").is_file()


def test_a_save_over_another_leaves_nothing_of_it(checkpoint: Path, tmp_path: Path) -> None:
    model = enginehouse.LLaMAForCausalLM.from_hugging_face(checkpoint)
    model.save_checkpoint(tmp_path / "saved")
    bare = enginehouse.LLaMAForCausalLM(replace(model.config, path=None))
    bare.load(dict(model.weights()))
    bare.save_checkpoint(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "generation_config.json",
        "rank0.safetensors",
    }


def test_what_scripts_of_the_source_api_pass(checkpoint: Path) -> None:
    config = AutoConfig.from_hugging_face(checkpoint, torch.float16, trust_remote_code=True)
    assert config.dtype == "float16" and not config.auto_dtype
    assert (
        AutoModelForCausalLM.from_hugging_face(checkpoint, "bfloat16", trust_remote_code=True).config.dtype
        == "bfloat16"
    )


def test_the_version_is_the_packages() -> None:
    assert enginehouse.__version__ == importlib.metadata.version("enginehouse")


def test_type_checkers_know_every_class() -> None:
    known = set(re.findall(r"^    (\w+ForCausalLM): type", Path(enginehouse.__file__).read_text(), re.MULTILINE))
    assert known == set(model_classes())
