"""A checkpoint in Hugging Face layout: config.json beside safetensors, sharded or not."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from builder_svc.models.fields import Fields
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound


class HuggingFaceCheckpoint:
    """A directory whose tensors are read one at a time, straight from its files.

    Attributes:
        path: the directory.
        config: config.json.
        generation_config: generation_config.json, empty if there is none.
        shapes: tensor name -> shape, of all files; nothing but the headers has been read.

    Raises:
        NotFound: no directory, no config.json or no safetensors file.
        InvalidArgument: a JSON file that is none.
        DataLoss: a safetensors file that is damaged or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = Fields(read_json(path / "config.json"), str(path / "config.json"))
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self._files = {name: self._open(name) for name in self._file_names()}
        self._where: dict[str, str] = {}
        for file, opened in self._files.items():
            for tensor in opened.keys():  # noqa: SIM118  (no mapping)
                if tensor in self._where:
                    where = f"{self._where[tensor]} and in {file}"
                    raise InvalidArgument(f"{path}: tensor {tensor!r} stands in {where}", reason="TENSOR_TWICE")
                self._where[tensor] = file
        self.shapes = {
            tensor: tuple(self._files[file].get_slice(tensor).get_shape()) for tensor, file in self._where.items()
        }

    def files(self) -> list[Path]:
        """What decides an engine that is made of this checkpoint, tokenizer apart."""
        names = ["config.json", *(["generation_config.json"] if self.generation_config else []), *self._files]
        return [self.path / name for name in names]

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's dtype. Raises KeyError for an unknown name."""
        return self._files[self._where[name]].get_tensor(name)

    def dtype(self) -> str:
        """The dtype that the config declares, else that of the first tensor, such as "bfloat16"."""
        declared = self.config.values.get("dtype") or self.config.values.get("torch_dtype")
        if isinstance(declared, str):
            return declared
        return str(self.read(next(iter(self._where))).dtype).removeprefix("torch.")

    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids, of generation_config.json or else config.json."""
        found = self.generation_config.get("eos_token_id", self.config.values.get("eos_token_id"))
        ids = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
        vocab_size = self.config.size("vocab_size")
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise InvalidArgument(
                    f"{self.path}: eos_token_id {token!r} is no id below vocab_size {vocab_size}",
                    reason="CONFIG_FIELD_INVALID",
                )
        return tuple(ids)

    def _file_names(self) -> list[str]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            mapped = list(Fields(read_json(index), str(index)).require("weight_map", dict).values())
            names = sorted({name if isinstance(name, str) else repr(name) for name in mapped})
        else:
            whole = self.path / "model.safetensors"
            names = [whole.name] if whole.exists() else sorted(file.name for file in self.path.glob("*.safetensors"))
        if any(Path(name).name != name for name in names):
            raise InvalidArgument(f"{index} names files outside of its directory: {names}", reason="WEIGHT_MAP_INVALID")
        if not names:
            raise NotFound(
                f"{self.path} holds no *.safetensors file: put the model's weights beside its config.json, in that format",
                reason="WEIGHTS_NOT_FOUND",
            )
        return names

    def _open(self, name: str) -> Any:
        file = self.path / name
        if not file.is_file():
            raise NotFound(
                f"{self.path} lacks {name}, which its index names: download that file, too", reason="WEIGHTS_NOT_FOUND"
            )
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise DataLoss(
                f"{file} is damaged or incomplete ({error}): download it again", reason="WEIGHTS_DAMAGED"
            ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises NotFound and InvalidArgument, naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"{path.parent} holds no {path.name}: give a checkpoint in Hugging Face layout", reason="FILE_NOT_FOUND"
        ) from None
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}", reason="FILE_UNREADABLE") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not valid JSON ({error}): download it again", reason="JSON_INVALID") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} is not a JSON object: download it again", reason="JSON_INVALID")
    return value
