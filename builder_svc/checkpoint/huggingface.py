"""Hugging Face layout: config.json beside files of weights, sharded or not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from builder_svc.models.fields import Fields
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound

_LFS = b"version https://git-lfs.github.com/"


class SafetensorsFile:
    """One file, memory-mapped: a tensor that is read is a view of the file's pages.

    Attributes:
        path: the file.
        shapes: tensor name -> shape; nothing but the header has been read.

    Raises:
        DataLoss: damaged, or shorter than its header says.
        FailedPrecondition: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            with path.open("rb") as file:
                pointer = file.read(len(_LFS)) == _LFS
            wrong = f"is a pointer of git-lfs, which has not fetched the file: git -C {path.parent} lfs pull"
            damaged = f"is damaged or incomplete ({error}): download it again"
            raise DataLoss(f"{path} {wrong if pointer else damaged}", reason="WEIGHTS_DAMAGED") from None
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be read: {error}", reason="FILE_UNREADABLE") from None
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(self._file.get_slice(name).get_shape())
            for name in self._file.keys()  # noqa: SIM118  (no mapping)
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


def find_weights(path: Path) -> list[Path]:
    """The files that hold a directory's weights: *.safetensors, or else pytorch_model.bin and its shards.

    Raises:
        NotFound: none, or not all that the index names.
        InvalidArgument: an index that names files elsewhere.
    """
    names = _weights(path)
    if not names:
        raise NotFound(
            f"{path} holds no *.safetensors file and no pytorch_model.bin: put the model's weights beside its config.json",
            reason="WEIGHTS_NOT_FOUND",
        )
    return [path / name for name in names]


def has_weights(path: Path) -> bool:
    """Whether `find_weights` would find some. Raises what it raises of an index."""
    return bool(_weights(path))


def _weights(path: Path) -> list[str]:
    return (
        _shards(path, "model.safetensors")
        or sorted(file.name for file in path.glob("*.safetensors"))
        or _shards(path, "pytorch_model.bin")
    )


def _shards(path: Path, whole: str) -> list[str]:
    """What the index beside a file's place names, else the file itself; empty if there is neither."""
    index = path / f"{whole}.index.json"
    if not index.exists():
        return [whole] if (path / whole).exists() else []
    mapped = list(Fields(read_json(index), str(index)).require("weight_map", dict).values())
    names = sorted({name if isinstance(name, str) else repr(name) for name in mapped})
    if any(Path(name).name != name for name in names):
        raise InvalidArgument(f"{index} names files outside of its directory: {names}", reason="WEIGHT_MAP_INVALID")
    for name in names:
        if not (path / name).is_file():
            raise NotFound(
                f"{path} lacks {name}, which its index names: download that file, too", reason="WEIGHTS_NOT_FOUND"
            )
    return names


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json declares, such as "bfloat16"."""
    declared = config.get("dtype") or config.get("torch_dtype")
    return declared if isinstance(declared, str) else None


def eos_token_ids(config: Fields, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids, of generation_config.json or else config.json. Raises InvalidArgument for what is no id."""
    found = generation_config.get("eos_token_id", config.values.get("eos_token_id"))
    ids = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
    vocab_size = config.size("vocab_size")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InvalidArgument(
                f"{config.where}: eos_token_id {token!r} is no id below vocab_size {vocab_size}",
                reason="CONFIG_FIELD_INVALID",
            )
    return tuple(ids)


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
