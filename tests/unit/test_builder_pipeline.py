"""From a checkpoint to an engine: what decides its id, what is written, and what bad checkpoints get."""

import errno
import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from store_harness import keys

from builder_svc import weights
from builder_svc.build_config import BuildConfig
from builder_svc.checkpoint.digests import file_digests
from builder_svc.mapping import Mapping
from builder_svc.pipeline import build, build_identity, make_rank, read_model
from engine import gc, inventory
from engine.blobs import blob_key, put_bytes, read
from engine.errors import (
    DataLoss,
    EnginehouseError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from engine.fingerprint import Node
from engine.manifest import engine_id
from engine.opset import OPERATORS
from engine.registry import missing_files
from engine.store import Store
from executor_svc.loader import load_engine
from tests.conftest import small_file_system

NODE = Node("cpu", {"torch": torch.__version__})


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change_config(directory: Path, name: str = "config.json", **changes: object) -> None:
    file = directory / name
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))


def test_the_same_inputs_give_the_same_engine_and_the_second_build_is_a_lookup(
    checkpoint: Path, copy: Path, store: Store
) -> None:
    phases = []
    first = build(checkpoint, store=store, progress=lambda phase, *_: phases.append(phase))
    assert list(dict.fromkeys(phases)) == ["checkpoint", "program", "weights", "upload", "publish"]
    again = build(copy, store=store)
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest == first.manifest
    assert len(keys(store, "engines/")) == 1


def identify(path: Path, **options: object) -> str:
    chosen = BuildConfig(**options)  # type: ignore[arg-type]
    return engine_id(build_identity(read_model(path, chosen), chosen))


def test_every_option_decides_the_engine(checkpoint: Path) -> None:
    changes: list[dict[str, object]] = [
        {},
        {"dtype": "bfloat16"},
        {"max_seq_len": 100},
        {"max_batch_size": 3},
        {"max_num_tokens": 99},
        {"device": "cuda"},
        {"device": "cuda", "compute_capability": "9.0"},
    ]
    assert len({identify(checkpoint, **options) for options in changes}) == len(changes)


def test_changed_weights_config_or_tokenizer_give_another_engine(copy: Path) -> None:
    ids = {identify(copy)}
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    ids.add(identify(copy))
    change_config(copy, rms_norm_eps=1e-3)
    ids.add(identify(copy))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    ids.add(identify(copy))
    assert len(ids) == 4


def test_the_program_is_data_over_the_operator_set(checkpoint: Path) -> None:
    part = make_rank(read_model(checkpoint, BuildConfig(max_num_tokens=77)), Mapping())
    program = part.program
    assert {op.op for op in program.ops} <= set(OPERATORS)
    assert set(program.dims.values()) == {77}
    assert len(program.caches) == 3 and program.caches[0].bytes_per_token == 2 * 2 * 20 * 4
    assert set(part.constants) == {"rope.0.inv_freq"} <= set(program.weights)
    assert type(program).from_json(program.to_json()) == program


def test_the_manifest_tells_what_others_need(checkpoint: Path, store: Store) -> None:
    manifest = build(checkpoint, BuildConfig(max_seq_len=128), store=store).manifest
    assert manifest.model.kv_bytes_per_token == 3 * 2 * 2 * 20 * 4
    assert manifest.model.eos_token_ids == (1,)
    assert (manifest.limits.max_seq_len, manifest.limits.max_batch_size) == (128, 64)
    assert manifest.fingerprint.device == "cpu" and manifest.source == str(checkpoint)
    config = json.loads(read(store, manifest.tokenizer[1]))
    assert config == {"chat_template": None}


def test_weights_are_split_into_files_and_loaded_from_all(
    checkpoint: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_engine(store, build(checkpoint, store=store).manifest.engine_id, NODE)
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 50_000)
    split = build(checkpoint, BuildConfig(max_batch_size=5), store=store).manifest
    assert len(split.ranks[0].weights) > 3
    loaded = load_engine(store, split.engine_id, NODE)
    assert set(loaded.weights) == set(whole.weights)
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in whole.weights.items())


def test_sharded_checkpoints_are_read(checkpoint: Path, copy: Path, store: Store) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}})
    )
    sharded, plain = (
        load_engine(store, build(path, store=store).manifest.engine_id, NODE) for path in (copy, checkpoint)
    )
    assert all(torch.equal(sharded.weights[name], tensor) for name, tensor in plain.weights.items())


def test_lost_and_cut_off_blobs_are_built_again(checkpoint: Path, store: Store) -> None:
    manifest = build(checkpoint, store=store).manifest
    store.delete(blob_key(manifest.ranks[0].weights[0].digest))
    store.replace(blob_key(manifest.ranks[0].program.digest), b"cut off")
    assert not build(checkpoint, store=store).reused
    load_engine(store, manifest.engine_id, NODE)
    assert build(checkpoint, store=store).reused


def test_a_tied_head_that_is_stored_all_the_same(checkpoint: Path, copy: Path, store: Store) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    change_config(copy, tie_word_embeddings=True)
    loaded = load_engine(store, build(copy, store=store).manifest.engine_id, NODE)
    assert "lm_head.weight" not in loaded.weights


def test_a_disk_that_loses_what_it_took_is_told(
    checkpoint: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(weights, "_FLUSH_BYTES", 100)
    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(FailedPrecondition, match="cannot write .*: Input/output error; free some space, or choose"):
        build(checkpoint, store=store)


def spoil_truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def spoil_shape(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 71)
    save_file(tensors, path / "model.safetensors")


def spoil_rows(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(39, 48)
    save_file(tensors, path / "model.safetensors")


def spoil_missing(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.2.input_layernorm.weight"]
    save_file(tensors, path / "model.safetensors")


def spoil_extra(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(120)
    save_file(tensors, path / "model.safetensors")


def spoil_twice(path: Path) -> None:
    (path / "model.safetensors").rename(path / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(48)}, path / "b.safetensors")


def spoil_directory(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


def spoil_map(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors", "b": {}}}')


BAD = {
    "truncated": (spoil_truncate, DataLoss, "model.safetensors is damaged or incomplete"),
    "a pointer of git-lfs": (
        lambda path: (path / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
        ),
        DataLoss,
        "model.safetensors is a pointer of git-lfs, which has not fetched the file: git -C .* lfs pull",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), NotFound, "holds no \\*.safetensors file"),
    "shape": (
        spoil_shape,
        InvalidArgument,
        r"layers.1.mlp.down_proj.weight' has shape \[48, 71\], config.json implies \[48, 72\]",
    ),
    "rows": (spoil_rows, InvalidArgument, r"has shape \[199, 48\], config.json implies \[200, 48\]"),
    "missing tensor": (spoil_missing, InvalidArgument, "no tensor 'model.layers.2.input_layernorm.weight'"),
    "no config": (lambda path: (path / "config.json").unlink(), NotFound, "holds no config.json"),
    "config is no JSON": (
        lambda path: (path / "config.json").write_text("{"),
        InvalidArgument,
        "config.json is not valid JSON",
    ),
    "field missing": (
        lambda path: change_config(path, hidden_size=None),
        InvalidArgument,
        "config.json has no 'hidden_size'",
    ),
    "field of another type": (
        lambda path: change_config(path, vocab_size="x"),
        InvalidArgument,
        "'vocab_size' is 'x', expected int",
    ),
    "field is no finite number": (
        lambda path: change_config(path, rms_norm_eps=float("nan")),
        InvalidArgument,
        "'rms_norm_eps' is nan, expected a finite number",
    ),
    "field zero": (
        lambda path: change_config(path, num_attention_heads=0),
        InvalidArgument,
        "'num_attention_heads' is 0, expected at least 1",
    ),
    "architecture": (
        lambda path: change_config(path, architectures=["MambaForCausalLM"]),
        Unimplemented,
        "MambaForCausalLM is not supported; supported are .*LlamaForCausalLM, .*Qwen2ForCausalLM",
    ),
    "rope": (
        lambda path: change_config(path, rope_parameters={"rope_type": "mrope", "rope_theta": 1.0}),
        Unimplemented,
        "rope type 'mrope' is not supported; supported are default, dynamic, linear, llama3, longrope, yarn",
    ),
    "extra tensor": (
        spoil_extra,
        InvalidArgument,
        "holds tensor 'model.layers.0.self_attn.q_proj.bias', for which its config.json has no",
    ),
    "a head that is to be tied": (
        lambda path: change_config(path, tie_word_embeddings=True),
        InvalidArgument,
        r"'lm_head.weight' of shape \[320, 48\], which is not 'model.embed_tokens.weight' .* set tie_word_embeddings to false",
    ),
    "tensor twice": (
        spoil_twice,
        InvalidArgument,
        "tensor 'model.norm.weight' stands in a.safetensors and in b.safetensors",
    ),
    "eos is text": (
        lambda path: change_config(path, "generation_config.json", eos_token_id="</s>"),
        InvalidArgument,
        "eos_token_id '</s>' is no id",
    ),
    "eos is no token": (
        lambda path: change_config(path, "generation_config.json", eos_token_id=[1, 320]),
        InvalidArgument,
        "eos_token_id 320 is no id",
    ),
    "odd head_dim": (
        lambda path: change_config(path, head_dim=21),
        InvalidArgument,
        "head_dim is 21: rotary positions need an even number",
    ),
    "rope_theta": (
        lambda path: change_config(path, rope_parameters={"rope_theta": 0.0}),
        InvalidArgument,
        "rope_theta is 0.0, expected more than 0",
    ),
    "config is a directory": (spoil_directory, FailedPrecondition, "config.json cannot be read: Is a directory"),
    "weights elsewhere": (spoil_map, InvalidArgument, "names files outside of its directory"),
    "quantized": (
        lambda path: change_config(path, quantization_config={"quant_method": "bitsandbytes"}),
        Unimplemented,
        "quantization method 'bitsandbytes' is not supported; supported: awq, compressed-tensors, fbgemm_fp8, .*modelopt",
    ),
    "activation": (
        lambda path: change_config(path, hidden_act="xielu"),
        Unimplemented,
        "hidden_act 'xielu' is not supported; supported are gelu, ",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), FailedPrecondition, "holds no tokenizer.json"),
    "tokenizer damaged": (
        lambda path: (path / "tokenizer.json").write_text("{}"),
        InvalidArgument,
        "tokenizer.json is no tokenizer",
    ),
    "tokenizer of another model": (
        lambda path: change_config(path, vocab_size=100),
        InvalidArgument,
        "vocab_size is 100: they do not belong",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_named_and_leaves_the_store_as_it_was(kind: str, copy: Path, store: Store) -> None:
    spoil, error, message = BAD[kind]
    spoil(copy)
    with pytest.raises(error, match=message) as caught:
        build(copy, store=store)
    assert isinstance(caught.value, EnginehouseError)
    assert keys(store, "") == []


def test_options_are_checked() -> None:
    for bad, message in [
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"compute_capability": "9.0"}, "needs device 'cuda'"),
        ({"device": "cuda", "compute_capability": "sm90"}, "write it like 9.0"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_num_tokens": 10}, "less than max_batch_size"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            BuildConfig(**bad)  # type: ignore[arg-type]


def test_auto_takes_the_checkpoints_dtype_on_cuda_and_float32_on_the_cpu(copy: Path) -> None:
    for stored, taken in [("bfloat16", "bfloat16"), ("float16", "float16")]:
        change_config(copy, dtype=stored)
        assert read_model(copy, BuildConfig(device="cuda")).dtype == taken
        assert read_model(copy, BuildConfig()).dtype == "float32"
    change_config(copy, dtype="float64")
    with pytest.raises(Unimplemented, match="is stored in float64; choose one of float32, bfloat16, float16"):
        read_model(copy, BuildConfig(device="cuda"))


def test_weights_of_a_dtype_that_no_engine_has(checkpoint: Path, copy: Path, store: Store) -> None:
    """The engine is of the options' dtype, and without one float32 on the CPU: that of the same numbers in float32."""
    weights = {name: tensor.double() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    change_config(copy, dtype="float64")
    for options in (BuildConfig(), BuildConfig(dtype="bfloat16"), BuildConfig(device="cuda", dtype="float16")):
        ours, wanted = (build(path, options, store=store).manifest for path in (copy, checkpoint))
        assert ours.ranks == wanted.ranks and ours.engine_id != wanted.engine_id


def test_a_longer_max_seq_len_than_the_models_is_refused(checkpoint: Path, store: Store) -> None:
    with pytest.raises(InvalidArgument, match="max_seq_len is 300, more than the model's 256 positions"):
        build(checkpoint, BuildConfig(max_seq_len=300), store=store)


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "f", tmp_path / "cache.json"
    file.write_bytes(b"one")
    first = file_digests([file], cache=cache)
    remembered = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(remembered, "remembered")))
    assert file_digests([file], cache=cache) == {"f": "remembered"}
    file.write_bytes(b"other")
    assert file_digests([file], cache=cache)["f"] not in ("remembered", first["f"])


@pytest.mark.parametrize("moment", [("upload", 1), ("publish", 0)])
def test_a_build_that_finds_old_blobs_loses_none_to_a_garbage_collection(
    checkpoint: Path, store: Store, moment: tuple[str, int]
) -> None:
    first = build(checkpoint, store=store).manifest
    inventory.remove_engine(store, first.engine_id)
    collected = []

    def progress(phase: str, done: int, *_: object) -> None:
        if phase == moment[0] and bool(done) == bool(moment[1]):
            collected.append(gc.collect(store, grace=0).deleted.count)

    second = build(checkpoint, store=store, progress=progress)
    assert collected
    assert not any(collected)
    assert (second.reused, second.manifest.files()) == (False, first.files())
    assert missing_files(store, second.manifest) == []
    assert keys(store, "pins/") == keys(store, "gc/") == []


def test_a_build_that_fails_leaves_no_pin(checkpoint: Path, store: Store) -> None:
    def fail(phase: str, *_: object) -> None:
        if phase == "publish":
            raise InvalidArgument("enough")

    with pytest.raises(InvalidArgument, match="enough"):
        build(checkpoint, store=store, progress=fail)
    assert keys(store, "pins/") == keys(store, "engines/") == []


# What may be signed


def test_an_engine_that_is_built_again_is_known_to_be_right(checkpoint: Path, store: Store):
    first = build(checkpoint, store=store)
    assert first.ours and not first.reused
    found = build(checkpoint, store=store)
    assert found.reused and not found.ours
    asked: list[str] = []
    again = build(checkpoint, store=store, source="elsewhere", again=lambda engine_id: not asked.append(engine_id))
    assert asked == [first.manifest.engine_id]
    assert again.ours and not again.reused and again.manifest == first.manifest


def test_an_engine_that_somebody_has_put_in_its_place_is_not_ours(checkpoint: Path, store: Store):
    """Under the right id, since that is of the inputs, with other weights."""
    manifest = build(checkpoint, store=store).manifest
    rank = manifest.ranks[0]
    planted = msgspec.structs.replace(
        manifest, ranks=(msgspec.structs.replace(rank, weights=(put_bytes(store, "weights", b"evil"),)),)
    )
    store.replace(f"engines/{manifest.engine_id}.json", planted.to_json())
    built = build(checkpoint, store=store, again=lambda _: True)
    assert not built.ours and built.manifest == planted


def test_a_work_directory_that_is_full_is_told(checkpoint: Path, store: Store, tmp_path: Path):
    with small_file_system(tmp_path / "small", "200k") as mount:
        with pytest.raises(
            ResourceExhausted, match="No space left on device; free some space, or choose another folder: --data"
        ):
            build(checkpoint, store=store, work_dir=mount)
        assert list(mount.iterdir()) == []
    assert keys(store, "engines/") == []


def test_numbers_that_float16_cannot_hold_are_told(copy: Path, store: Store):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = 70000.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgument, match="'final_norm.weight' holds numbers up to 7e\\+04, .* choose bfloat16"):
        build(copy, BuildConfig(dtype="float16"), store=store)
    assert keys(store, "engines/") == []
    build(copy, BuildConfig(dtype="bfloat16"), store=store)
