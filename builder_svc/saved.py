"""A checkpoint that `save_checkpoint` has written: our weights under our names, as the program takes them.

config.json            what the model is, in TensorRT-LLM's fields, with the Hugging Face config behind them; written last
rank0.safetensors      the weights: stacked, turned and offset already; packed, where the config says so
tokenizer.json, tokenizer_config.json     normalized, if the model has a tokenizer

Tensors that a person gave by these names (`load`) are read the same way.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from builder_svc.checkpoint.huggingface import SafetensorsFile, read_json
from builder_svc.pretrained import OURS, PretrainedConfig
from builder_svc.tokenizer import NormalizedTokenizer
from builder_svc.weights import write_file
from engine.errors import FailedPrecondition, NotFound
from engine.program import TensorType

WEIGHTS = "rank0.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def is_saved(path: Path) -> bool:
    """Whether a directory holds such a checkpoint, a half-written one, or one of TensorRT-LLM, which is told to be one."""
    if not (path / "config.json").is_file():
        return (path / WEIGHTS).is_file()
    values = read_json(path / "config.json")
    return OURS in values or ("architecture" in values and "architectures" not in values)


class SavedCheckpoint:
    """A saved directory, opened. Only headers are read.

    Attributes:
        path: the directory.
        pretrained: its config.
        config, generation_config: the Hugging Face configs that it came from.
        shapes: our weight name -> shape.

    Raises:
        NotFound: no config.json, or no weights.
        InvalidArgument, Unimplemented: what `PretrainedConfig.from_dict` raises.
        DataLoss: the weights are damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file() and (path / WEIGHTS).is_file():
            raise NotFound(
                f"{path} holds {WEIGHTS} and no config.json: saving it did not come to its end. Save it again",
                reason="CHECKPOINT_INCOMPLETE",
            )
        self.pretrained = PretrainedConfig.from_json_file(path / "config.json")
        self.config = self.pretrained.fields
        self.generation_config = self.pretrained.generation_config
        file = path / WEIGHTS
        if not file.is_file():
            raise NotFound(f"{path} lacks {WEIGHTS}: copy that file, too", reason="WEIGHTS_NOT_FOUND")
        self._file = SafetensorsFile(file)
        self.shapes = self._file.shapes

    def files(self) -> list[Path]:
        """What decides an engine that is made of it, tokenizer apart."""
        return [self.path / "config.json", self.path / WEIGHTS]

    def read(self, name: str) -> torch.Tensor:
        """One weight. Raises KeyError for an unknown name."""
        if name not in self.shapes:
            raise KeyError(name)
        return self._file.read(name)


class GivenWeights:
    """Tensors that a person gave, by our names; they are kept, not copied."""

    path = "what load() was given"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One weight. Raises KeyError for an unknown name."""
        return self._tensors[name].detach().cpu()

    def digests(self) -> dict[str, str]:
        """Weight name -> SHA-256, hexadecimal, of dtype and bytes."""
        found = {}
        for name in sorted(self._tensors):
            tensor = self.read(name).contiguous()
            digest = hashlib.sha256(str(tensor.dtype).encode())
            digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
            found[name] = digest.hexdigest()
        return found


def save(
    directory: Path,
    config: Callable[[], PretrainedConfig],
    declared: Mapping[str, TensorType],
    parts: Callable[[str], Iterable[torch.Tensor]],
    tokenizer: NormalizedTokenizer | None,
    save_config: bool = True,
) -> None:
    """Writes a checkpoint. What has been there is none any more from the first byte on, until all is written.

    Args:
        config: asked for when the weights are written.
        declared: the weights' names and types, in the order of the file.
        parts: the tensors that form a weight, one after another.

    Raises:
        FailedPrecondition: it cannot be written there, or another checkpoint is there.
        ResourceExhausted: the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "config.json").exists() and OURS not in read_json(directory / "config.json"):
            raise FailedPrecondition(
                f"{directory} holds another checkpoint, whose config.json would be overwritten: choose another directory",
                reason="OUTPUT_OCCUPIED",
            )
        if save_config:
            (directory / "config.json").unlink(missing_ok=True)
        half = directory / f".{WEIGHTS}.half"
        try:
            write_file(half, declared, parts)
            half.replace(directory / WEIGHTS)
        finally:
            half.unlink(missing_ok=True)
        for name in TOKENIZER_FILES:
            (directory / name).unlink(missing_ok=True)
        for name, data in (tokenizer.files() if tokenizer else {}).items():
            _write(directory / name, data)
        if save_config:
            described = config()
            _write_json(directory / "generation_config.json", described.generation_config)
            _write_json(directory / "config.json", described.to_dict())
    except OSError as error:
        raise FailedPrecondition(
            f"cannot write into {directory}: {error.strerror}; choose another directory", reason="OUTPUT_UNWRITABLE"
        ) from None


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    _write(file, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _write(file: Path, data: bytes) -> None:
    """The whole file or nothing, on the disk when it returns."""
    half = file.with_name(f".{file.name}.half")
    with half.open("wb") as written:
        written.write(data)
        written.flush()
        os.fsync(written.fileno())
    half.replace(file)
