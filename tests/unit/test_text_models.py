"""Models of text and images: their text model is built as if it had been published alone."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families_harness import check_family
from safetensors.torch import load_file, save_file

from builder_svc.checkpoint.reader import open_checkpoint, read_configs
from builder_svc.models.families import find_family
from tests.conftest import VOCAB_SIZE, save_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 256, "sliding_window": 24, "initializer_range": 0.2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "vision_use_head": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma3")
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=[1, 6]
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def test_gemma_3_with_an_image_encoder(gemma3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(
        gemma3, dtype=torch.float32, attn_implementation="eager"
    )
    check_family(gemma3, whole.eval(), tmp_path)
    assert "the engine takes text" in caplog.text


def test_names_as_they_were_first_published(gemma3: Path, tmp_path: Path) -> None:
    for file in gemma3.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = {
        "language_model.model." + name.split("language_model.")[1].removeprefix("model.")
        if "language" in name
        else name: tensor
        for name, tensor in load_file(gemma3 / "model.safetensors").items()
    }
    assert "language_model.model.norm.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found, wanted = open_checkpoint(tmp_path), open_checkpoint(gemma3)
    assert found.shapes == wanted.shapes and "model.norm.weight" in found.shapes
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in found.shapes)


def test_what_a_config_leaves_out_is_what_transformers_has(tmp_path: Path) -> None:
    """The published ones leave out most of the text model's fields."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "hidden_size": 2560,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "eos_token_id": [1, 106],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    fields, _ = read_configs(tmp_path, None)
    assert fields.values["eos_token_id"] == [1, 106]
    sparse = find_family(fields)[0].decoder_config(fields, "Gemma3ForCausalLM")
    whole = transformers.Gemma3TextConfig(**config["text_config"]).to_dict() | {"architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    fields, _ = read_configs(tmp_path, None)
    assert find_family(fields)[0].decoder_config(fields, "Gemma3ForCausalLM") == sparse
