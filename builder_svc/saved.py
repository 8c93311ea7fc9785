"""A checkpoint that `save_checkpoint` has written: our weights under our names, as the program takes them.

config.json            what the model is, in TensorRT-LLM's fields, with the Hugging Face config behind them; written last
rank0.safetensors      the weights: stacked, turned and offset already, packed where the config says so; of a mapping of several
                       ranks one file each, with its part
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
from builder_svc.models.decoder import Decoder
from builder_svc.pretrained import OURS, PretrainedConfig
from builder_svc.shard import cuts
from builder_svc.tokenizer import NormalizedTokenizer
from builder_svc.weights import write_file
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.program import TensorType

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def weights_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank{rank}.safetensors"


def is_saved(path: Path) -> bool:
    """Whether a directory holds such a checkpoint, a half-written one, or one of TensorRT-LLM, which is told to be one."""
    if not (path / "config.json").is_file():
        return (path / weights_file(0)).is_file()
    values = read_json(path / "config.json")
    return OURS in values or ("architecture" in values and "architectures" not in values)


class SavedCheckpoint:
    """A saved directory, opened. Only headers are read. Of several ranks' files the whole model's weights are read.

    Attributes:
        path: the directory.
        pretrained: its config, with the mapping that it was saved with.
        config, generation_config: the Hugging Face configs that it came from.
        shapes: our weight name -> shape.

    Raises:
        NotFound: no config.json, or no weights.
        InvalidArgument, Unimplemented: what `PretrainedConfig.from_dict` raises.
        DataLoss: the weights are damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file() and (path / weights_file(0)).is_file():
            raise NotFound(
                f"{path} holds {weights_file(0)} and no config.json: saving it did not come to its end. Save it again",
                reason="CHECKPOINT_INCOMPLETE",
            )
        self.pretrained = PretrainedConfig.from_json_file(path / "config.json")
        self.config = self.pretrained.fields
        self.generation_config = self.pretrained.generation_config
        self._ranks = self.pretrained.mapping.ranks()
        self._files = [self._open(weights_file(rank.rank)) for rank in self._ranks]
        self.shapes: Mapping[str, tuple[int, ...]] = self._files[0].shapes
        if len(self._ranks) > 1:
            self._cuts = [cuts(self.pretrained.decoder, rank) for rank in self._ranks]
            self.shapes = self._whole_shapes()

    def files(self) -> list[Path]:
        """What decides an engine that is made of it, tokenizer apart."""
        return [self.path / "config.json", *(self.path / weights_file(rank.rank) for rank in self._ranks)]

    def read(self, name: str) -> torch.Tensor:
        """One weight. Raises KeyError for an unknown name."""
        if name not in self.shapes:
            raise KeyError(name)
        if len(self._ranks) == 1:
            return self._files[0].read(name)
        whole: torch.Tensor | None = None
        for file, cut in zip(self._files, self._cuts, strict=True):
            if name in file.shapes:
                part = file.read(name)
                if name not in cut:
                    return part  # which each rank that has it has whole
                whole = part.new_empty(self.shapes[name]) if whole is None else whole
                cut[name].put(part, whole)
        if whole is None:
            raise KeyError(name)
        return whole

    def _open(self, name: str) -> SafetensorsFile:
        file = self.path / name
        if not file.is_file():
            raise NotFound(
                f"{self.path} lacks {name}: copy that file, too, or save that rank", reason="WEIGHTS_NOT_FOUND"
            )
        return SafetensorsFile(file)

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all ranks together. Raises InvalidArgument where a file has not the part that its rank has of the model."""
        decoder = self.pretrained.decoder
        for rank, file in zip(self._ranks, self._files, strict=True):
            expected = _shapes(Decoder.on_meta(decoder, "float32", mapping=rank))
            for name in expected.keys() | file.shapes.keys():
                if expected.get(name) != file.shapes.get(name):
                    raise InvalidArgument(
                        f"{self.path / weights_file(rank.rank)}: tensor {name!r} has {_told(file.shapes.get(name))}, but by "
                        f"config.json that rank has {_told(expected.get(name))}: save all ranks again, of one model",
                        reason="TENSOR_SHAPE_MISMATCH",
                    )
        return _shapes(Decoder.on_meta(decoder, "float32"))


def _shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(map(int, declared.shape)) for name, declared in decoder.declared().items()}


def _told(shape: tuple[int, ...] | None) -> str:
    return "nothing of it" if shape is None else f"shape {list(shape)}"


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
    config: PretrainedConfig,
    declared: Mapping[str, TensorType],
    parts: Callable[[str], Iterable[torch.Tensor]],
    tokenizer: NormalizedTokenizer | None,
    save_config: bool = True,
    described: Callable[[], PretrainedConfig] | None = None,
) -> None:
    """Writes a checkpoint. What has been there is none any more from the first byte on, until all is written.

    Args:
        config: with the mapping, of whose rank the weights are.
        described: what to write instead of the config, asked for when the weights are written.
        declared: the weights' names and types, in the order of the file.
        parts: the tensors that form a weight, one after another.

    Raises:
        FailedPrecondition: it cannot be written there, or another checkpoint is there.
        ResourceExhausted: the disk is full.
    """
    rank, name = config.mapping.rank, weights_file(config.mapping.rank)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "config.json").exists() and OURS not in read_json(directory / "config.json"):
            raise FailedPrecondition(
                f"{directory} holds another checkpoint, whose config.json would be overwritten: choose another directory",
                reason="OUTPUT_OCCUPIED",
            )
        if save_config:
            (directory / "config.json").unlink(missing_ok=True)
        half = directory / f".{name}.half"
        try:
            write_file(half, declared, parts)
            if (
                rank == 0
            ):  # with which a loop over ranks begins: those of another model must not be taken for this one's
                for old in directory.glob("rank*.safetensors"):
                    old.unlink()
            half.replace(directory / name)
        finally:
            half.unlink(missing_ok=True)
        if save_config or rank == 0:
            for file in TOKENIZER_FILES:
                (directory / file).unlink(missing_ok=True)
            for file, data in (tokenizer.files() if tokenizer else {}).items():
                _write(directory / file, data)
        if save_config:
            config = described() if described else config
            _write_json(directory / "generation_config.json", config.generation_config)
            _write_json(directory / "config.json", config.to_dict())
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
