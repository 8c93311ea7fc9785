"""GGUF files: what comes out of them is what transformers' model had that they were made of."""

import copy
import json
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from families_harness import check_family
from gguf_models import MODELS, make_model, write_gguf
from safetensors.torch import load_file, save_file

from builder_svc.checkpoint import gguf_file
from builder_svc.checkpoint.gguf_file import GgufFile
from builder_svc.checkpoint.huggingface import eos_token_ids
from builder_svc.checkpoint.reader import open_checkpoint, open_gguf
from engine.directory import DirectoryStore
from engine.errors import DataLoss, EnginehouseError, InvalidArgument, NotFound, Unimplemented
from enginehouse import AutoModelForCausalLM, build
from tests.conftest import save_tokenizer


@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    """Tensor for tensor, and a model of the config and tensors that were read gives the original's logits."""
    arch, class_name, changes = MODELS[kind]
    original = make_model(tmp_path / "hf", class_name, changes)
    write_gguf(tmp_path / "model.gguf", arch, tmp_path / "hf")
    opened = open_checkpoint(tmp_path / "model.gguf")
    wanted = load_file(tmp_path / "hf/model.safetensors")
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    read = {name: opened.read(name).contiguous() for name in opened.shapes}
    for name, tensor in wanted.items():
        assert torch.allclose(read[name], tensor, atol=1e-6 if arch.startswith("gemma") else 0, rtol=0), name
    assert eos_token_ids(opened.config, opened.generation_config) == (1, 7)
    assert opened.dtype() == "float32"
    assert opened.files() == [tmp_path / "model.gguf"]

    (tmp_path / "again").mkdir()
    (tmp_path / "again/config.json").write_text(json.dumps(dict(opened.config.values)))
    save_file(read, tmp_path / "again/model.safetensors", {"format": "pt"})
    (architecture,) = opened.config.values["architectures"]
    assert architecture == type(original).__name__
    again = getattr(transformers, architecture).from_pretrained(tmp_path / "again").eval()
    ids = torch.arange(40)[None] * 7 % 320
    with torch.inference_mode():
        assert (again(ids).logits - original(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_is_stored_is_read(kind: str, tmp_path: Path) -> None:
    """Quantized tensors are what gguf makes of them, with the rows of queries where Hugging Face has them."""
    make_model(tmp_path / "hf", "Llama", {"head_dim": 32})
    write_gguf(tmp_path / "model.gguf", "llama", tmp_path / "hf", lambda name: "F32" if "norm" in name else kind)
    opened = open_checkpoint(tmp_path / "model.gguf")
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, original in load_file(tmp_path / "hf/model.safetensors").items():
        read = opened.read(name)
        if "norm" in name:
            assert torch.equal(read, original)
        elif plain:
            assert torch.equal(read, original.to(plain))
        else:  # by rows, so that the order of rows does not matter
            wanted = gguf.dequantize(gguf.quantize(original.numpy(), quantization), quantization)
            assert read.dtype == torch.float32 and np.array_equal(read.numpy(), wanted)
    assert opened.dtype() == ("float16" if kind == "F16" else "bfloat16")


RARE = [
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL",
    "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
]  # fmt: skip


def write_raw(path: Path, tensors: dict[str, tuple[np.ndarray[Any, Any], str]], **metadata: str) -> None:
    """A file of tensors whose bytes are given."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for key, value in metadata.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_types_that_only_llama_cpp_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are dequantized at a time, and single entries of stacks of them."""
    monkeypatch.setattr(gguf_file, "_SLICE", 1024)
    random = np.random.default_rng(0)
    tensors = {}
    for kind in RARE:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        tensors[kind] = (random.integers(0, 0x3C, (3, 5, 512 // block * size), np.uint8), kind)  # scales below 1
    write_raw(tmp_path / "raw.gguf", tensors)
    file = GgufFile(tmp_path / "raw.gguf")
    for kind, (data, _) in tensors.items():
        wanted = gguf.dequantize(data.reshape(15, -1), gguf.GGMLQuantizationType[kind]).reshape(3, 5, 512)
        assert file.shapes[kind] == (3, 5, 512)
        assert np.array_equal(file.read(kind).numpy(), wanted, equal_nan=True) and wanted.any()
        assert np.array_equal(file.read(kind, 1).numpy(), wanted[1], equal_nan=True)


def test_from_several_threads(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", "Llama", {})
    write_gguf(tmp_path / "model.gguf", "llama", tmp_path / "hf", lambda name: "F32" if "norm" in name else "Q4_0")
    opened = open_checkpoint(tmp_path / "model.gguf")
    names = list(opened.shapes) * 4
    with ThreadPoolExecutor(4) as pool:
        for name, read in zip(names, pool.map(opened.read, names), strict=True):
            assert torch.equal(read, opened.read(name))


def test_split_files(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", "Llama", {"rope_parameters": MODELS["llama"][2]["rope_parameters"]})
    write_gguf(tmp_path / "m.gguf", "llama", tmp_path / "hf")
    write_gguf(tmp_path / "split/m.gguf", "llama", tmp_path / "hf", split_max_tensors=12)
    parts = sorted((tmp_path / "split").iterdir())
    assert [part.name for part in parts] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    whole = open_checkpoint(tmp_path / "m.gguf")
    for path in (tmp_path / "split", parts[0], parts[2]):  # rope_freqs is in the last part
        opened = open_checkpoint(path)
        assert opened.files() == parts
        assert opened.config.values == whole.config.values and opened.shapes == whole.shapes
        assert all(torch.equal(opened.read(name), whole.read(name)) for name in whole.shapes)
    parts[1].rename(tmp_path / "alone.gguf")
    with pytest.raises(NotFound, match=r"lacks m-00002-of-00003\.gguf of 3 parts"):
        open_checkpoint(parts[0])
    with pytest.raises(InvalidArgument, match="is one part of 3"):
        open_checkpoint(tmp_path / "alone.gguf")


@pytest.mark.parametrize(("kind", "inside"), [("llama", True), ("qwen3moe", False)])
def test_a_file_is_built_as_it_is(kind: str, inside: bool, tmp_path: Path) -> None:
    """Config, weights and tokenizer out of the file, or a tokenizer.json beside it: the original's logits and tokens."""
    arch, class_name, changes = MODELS[kind]
    original = make_model(tmp_path / "hf", class_name, changes)
    file = tmp_path / "gguf/model.gguf"
    file.parent.mkdir()
    save_tokenizer(tmp_path / "hf" if inside else file.parent)
    write_gguf(file, arch, tmp_path / "hf")
    check_family(file, original, tmp_path)


def test_a_header_is_read_once_and_a_copy_maps_the_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a real vocabulary takes half a second, and the copy of what is mapped would be as large as the model."""
    make_model(tmp_path / "hf", "Llama", MODELS["llama"][2])
    file, read, opened = tmp_path / "gguf/model.gguf", gguf_file._read_header, []
    file.parent.mkdir()
    save_tokenizer(file.parent)
    write_gguf(file, "llama", tmp_path / "hf")
    monkeypatch.setattr(gguf_file, "_read_header", lambda path: (opened.append(path), read(path))[1])
    for model in (file, AutoModelForCausalLM.from_hugging_face(file)):
        build(model, store=DirectoryStore(tmp_path / "store"))
    assert opened == [file, file]
    config = model.config
    again = copy.deepcopy(config)
    assert again == config and again.gguf and config.gguf and again.gguf is not config.gguf
    assert again.gguf.shapes == config.gguf.shapes and len(pickle.dumps(config)) < 10_000


def test_a_directory_with_one_model(tmp_path: Path) -> None:
    """An image encoder beside it is no second one, and neither does a config.json without weights count."""
    make_model(tmp_path / "hf", "Qwen2", {})
    directory = tmp_path / "gguf"
    directory.mkdir()
    write_gguf(directory / "a.gguf", "qwen2", tmp_path / "hf")
    (directory / "mmproj-a.gguf").write_bytes(b"GGUF")
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    opened = open_checkpoint(directory)
    assert (opened.path, opened.files()) == (directory, [directory / "a.gguf"])
    write_gguf(directory / "b.gguf", "qwen2", tmp_path / "hf")
    with pytest.raises(InvalidArgument, match=r"holds several GGUF files: give the path of one, a\.gguf, b\.gguf"):
        open_checkpoint(directory)
    (tmp_path / "hf/b.gguf").write_bytes(b"")
    assert open_gguf(tmp_path / "hf") is None


def test_divisors_that_are_not_llama_3s(tmp_path: Path) -> None:
    """They come as they are, in the form of longrope."""
    rope = {**MODELS["llama"][2]["rope_parameters"], "high_freq_factor": 8.0, "original_max_position_embeddings": 2048}
    original = make_model(tmp_path / "hf", "Llama", {"rope_parameters": rope})
    write_gguf(tmp_path / "m.gguf", "llama", tmp_path / "hf")
    config = open_checkpoint(tmp_path / "m.gguf").config.values
    assert config["rope_scaling"]["rope_type"] == "longrope"
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).model.rotary_emb
    ids = torch.arange(200)[None]
    for ours, wanted in zip(again(torch.zeros(1), ids), original.model.rotary_emb(torch.zeros(1), ids), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-5)


def edited(path: Path, **changes: Any) -> bytes:
    """The file with other bytes: `cut` from the end, or `replace`=(old, new)."""
    data = path.read_bytes()
    if "replace" in changes:
        old, new = changes["replace"]
        assert data.count(old)
        return data.replace(old, new, 1)
    return data[: -changes["cut"]] if "cut" in changes else data[: changes["keep"]]


BAD: dict[str, tuple[dict[str, Any], type[EnginehouseError], str]] = {
    "no GGUF": ({"replace": (b"GGUF", b"GGML")}, InvalidArgument, "m.gguf is no GGUF file"),
    "version 1": ({"replace": (b"GGUF\x03", b"GGUF\x01")}, Unimplemented, "is GGUF version 1"),
    "cut off": ({"cut": 1000}, DataLoss, r"m.gguf is damaged or incomplete \(tensor '.*', F32 \[.*\], does not fit"),
    "cut off in its header": ({"keep": 900}, DataLoss, r"m.gguf is damaged or incomplete \(its header"),
    "empty": ({"keep": 0}, InvalidArgument, "m.gguf is no GGUF file"),
    "architecture": (
        {"replace": (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba")},
        Unimplemented,
        "architecture 'mamba' is not supported; supported are falcon, gemma, .* stablelm",
    ),
    "metadata missing": (
        {"replace": (b"llama.block_count", b"llama.blokk_count")},
        InvalidArgument,
        "m.gguf has no 'block_count'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(kind: str, tmp_path: Path) -> None:
    changes, error, message = BAD[kind]
    make_model(tmp_path / "hf", "Llama", {})
    write_gguf(tmp_path / "m.gguf", "llama", tmp_path / "hf")
    (tmp_path / "m.gguf").write_bytes(edited(tmp_path / "m.gguf", **changes))
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_headers_that_nobody_writes(tmp_path: Path) -> None:
    file, name = tmp_path / "m.gguf", b"\1\0\0\0\0\0\0\0k"
    for number_of, rest in (((0, 1), struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000), ((1, 0), b"")):
        file.write_bytes(
            b"GGUF" + struct.pack("<IQQ", 3, *number_of) + name + (rest or struct.pack("<IQQIQ", 2, 32, 0, 0, 0))
        )
        with pytest.raises(DataLoss, match="m.gguf is damaged or incomplete"):
            GgufFile(file)


def test_a_type_that_nobody_dequantizes(tmp_path: Path) -> None:
    write_raw(tmp_path / "m.gguf", {"token_embd.weight": (np.zeros((4, 40), np.uint8), "Q8_1")})
    with pytest.raises(Unimplemented, match="tensor 'token_embd.weight' is of type Q8_1, which is not supported: take"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_damaged_header_is_never_worse_than_an_error(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", "Llama", {"num_hidden_layers": 1})
    write_gguf(tmp_path / "m.gguf", "llama", tmp_path / "hf")
    data, random = (tmp_path / "m.gguf").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        spoiled = bytearray(data)
        spoiled[random.integers(4, 2000)] = random.integers(256)
        (tmp_path / "m.gguf").write_bytes(spoiled)
        try:
            opened = open_checkpoint(tmp_path / "m.gguf")
        except EnginehouseError:
            continue
        assert all(opened.read(name).shape == shape for name, shape in opened.shapes.items())
