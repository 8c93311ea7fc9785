"""Weights in Hugging Face layout: safetensors of every float dtype, and PyTorch's own files, which are never run."""

import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builder_svc.checkpoint.reader import open_checkpoint
from builder_svc.pipeline import build
from engine.errors import DataLoss, EnginehouseError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from engine.store import Store

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def as_pickle(path: Path, **options: Any) -> dict[str, Tensor]:
    """The directory's weights as pytorch_model.bin."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin", **options)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_every_float_dtype(copy: Path, dtype: torch.dtype, kind: str) -> None:
    if kind == "old" and dtype in DTYPES[4:]:
        pytest.skip("younger than that format")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    if kind != "safetensors":
        as_pickle(copy, _use_new_zipfile_serialization=kind == "zip")
    opened = open_checkpoint(copy)
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        read = opened.read(name)
        assert read.dtype == dtype and torch.equal(read.float(), tensor.float())
    with pytest.raises(KeyError):
        opened.read("no such tensor")


def test_a_pickle_makes_the_same_engine(checkpoint: Path, copy: Path, directory_store: Store) -> None:
    as_pickle(copy)
    wanted, made = (build(path, store=directory_store).manifest for path in (checkpoint, copy))
    assert [rank.weights for rank in made.ranks] == [rank.weights for rank in wanted.ranks]
    assert "pytorch_model.bin" in made.identity["checkpoint"]


def test_shards_of_pickles(copy: Path) -> None:
    tensors = as_pickle(copy)
    (copy / "pytorch_model.bin").unlink()
    names = list(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, copy / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(copy)
    assert [file.name for file in opened.files()] == ["config.json", "generation_config.json", *parts]
    with ThreadPoolExecutor(4) as pool:
        for name, read in zip(names * 3, pool.map(opened.read, names * 3), strict=True):
            assert torch.equal(read, tensors[name])
    (copy / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(NotFound, match="lacks pytorch_model-00002-of-00002.bin, which its index names"):
        open_checkpoint(copy)


def test_tensors_that_share_their_memory(copy: Path) -> None:
    shared = torch.arange(12.0).view(3, 4)
    (copy / "model.safetensors").unlink()
    torch.save({"a": shared, "b": shared, "turned": shared.t(), "rows": shared[1:]}, copy / "pytorch_model.bin")
    opened = open_checkpoint(copy)
    assert opened.shapes == {"a": (3, 4), "b": (3, 4), "turned": (4, 3), "rows": (2, 4)}
    for name, wanted in {"a": shared, "b": shared, "turned": shared.t(), "rows": shared[1:]}.items():
        assert torch.equal(opened.read(name), wanted)


def test_safetensors_win(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert [file.name for file in open_checkpoint(copy).files()][2:] == ["model.safetensors"]


class Code:
    """What a pickle may carry: a call, made when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_code_is_refused_and_never_run(copy: Path, tmp_path: Path, old: bool) -> None:
    (copy / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    torch.save({"a": Code(tmp_path / "ran")}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(
        PermissionDenied, match="is a pickle that needs 'posix.mkdir', .* convert the model to safetensors"
    ):
        open_checkpoint(copy)
    assert not (tmp_path / "ran").exists()
    torch.save(torch.nn.Linear(2, 2), file, _use_new_zipfile_serialization=not old)
    with pytest.raises(PermissionDenied, match="needs 'torch.nn.modules.linear.Linear'"):
        open_checkpoint(copy)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def nested(path: Path) -> None:
    torch.save({"model": torch.load(path), "epoch": 3}, path)


def quantized(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.eye(4).to_sparse()}, path)


BAD: dict[str, tuple[Any, type[EnginehouseError], str]] = {
    "cut off": (lambda path: cut(path, -300), DataLoss, "pytorch_model.bin is damaged or incomplete"),
    "cut off early": (lambda path: cut(path, 90), DataLoss, "pytorch_model.bin is damaged or incomplete"),
    "empty": (lambda path: cut(path, 0), DataLoss, r"damaged or incomplete \(EOFError\): download it again"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs"), DataLoss, "damaged or incomplete"),
    "broken pickle": (lambda path: path.write_bytes(b"\x80\x02}q\x00(X"), DataLoss, "damaged or incomplete"),
    "nested": (nested, InvalidArgument, "its entry 'model' is a dict, not a tensor: save the model's state_dict"),
    "a list": (lambda path: torch.save([torch.eye(2)], path), InvalidArgument, "holds a list, not tensors by name"),
    "sparse": (quantized, InvalidArgument, "tensor 'a' is sparse or quantized"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pickles(copy: Path, kind: str) -> None:
    as_pickle(copy)
    spoil, error, message = BAD[kind]
    spoil(copy / "pytorch_model.bin")
    with pytest.raises(error, match=message):
        open_checkpoint(copy)


def test_a_file_that_cannot_be_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(copy / "nothing")
    with pytest.raises(FailedPrecondition, match=r"model.safetensors cannot be read: No such file"):
        open_checkpoint(copy)


def test_masks_do_not_tell_the_dtype(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file({"a.attn.bias": torch.ones(3, dtype=torch.bool), **tensors}, copy / "model.safetensors")
    assert open_checkpoint(copy).dtype() == "float16"


def test_integers_without_a_scale_are_no_weights(copy: Path, directory_store: Store) -> None:
    tensors, name = load_file(copy / "model.safetensors"), "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, copy / "model.safetensors")
    with pytest.raises(InvalidArgument, match="weight 'layers.0.mlp.down.weight' are int8, and nothing says"):
        build(copy, store=directory_store)
    assert list(directory_store.list("")) == []


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path / "file.bin"):
        with pytest.raises(NotFound, match="is no directory and no .gguf file"):
            open_checkpoint(path)
        (tmp_path / "file.bin").write_bytes(b"")


def test_reading_from_several_threads(checkpoint: Path) -> None:
    opened, tensors = open_checkpoint(checkpoint), load_file(checkpoint / "model.safetensors")
    with ThreadPoolExecutor(4) as pool:
        for name, read in zip(list(tensors) * 4, pool.map(opened.read, list(tensors) * 4), strict=True):
            assert torch.equal(read, tensors[name])
