"""Opens a checkpoint, whatever its format: its config as Hugging Face writes it, and its tensors by Hugging Face's names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from builder_svc.checkpoint import gguf_config
from builder_svc.checkpoint.gguf_file import GgufFile, Metadata
from builder_svc.checkpoint.gguf_names import GgufWeights
from builder_svc.checkpoint.huggingface import SafetensorsFile, declared_dtype, find_weights, has_weights, read_json
from builder_svc.checkpoint.pickles import PickleFile
from builder_svc.checkpoint.tensors import Weights
from builder_svc.checkpoint.text_models import text_config, text_weights
from builder_svc.models.fields import Fields
from engine.checkpoints import gguf_models
from engine.errors import InvalidArgument, NotFound


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened.

    Attributes:
        path: the directory or file.
        config: in the form of Hugging Face's config.json.
        generation_config: in the form of generation_config.json, empty if there is none.
        weights: its tensors.
        inputs: the files that decide an engine that is made of it, tokenizer apart.
    """

    path: Path
    config: Fields
    generation_config: Mapping[str, Any]
    weights: Weights
    inputs: tuple[Path, ...]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Those of the weights."""
        return self.weights.shapes

    def files(self) -> list[Path]:
        """What decides an engine that is made of this checkpoint, tokenizer apart."""
        return list(self.inputs)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's dtype, from any thread. Raises KeyError for an unknown name."""
        return self.weights.read(name)

    def dtype(self) -> str:
        """The dtype that the config declares, else that of the first tensor in floating point, such as "bfloat16"."""
        if declared := declared_dtype(self.config.values):
            return declared
        dtypes = (self.read(name).dtype for name in self.shapes)  # masks of older checkpoints are bool or uint8
        return str(next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)).removeprefix("torch.")


class Shards:
    """The tensors of several files as one. Raises InvalidArgument when two have the same."""

    def __init__(self, files: Sequence[SafetensorsFile | PickleFile]) -> None:
        self._where: dict[str, SafetensorsFile | PickleFile] = {}
        for file in files:
            for name in file.shapes:
                if name in self._where:
                    where = f"{self._where[name].path.name} and in {file.path.name}"
                    raise InvalidArgument(
                        f"{file.path.parent}: tensor {name!r} stands in {where}: remove one of both",
                        reason="TENSOR_TWICE",
                    )
                self._where[name] = file
        self.shapes = {name: file.shapes[name] for name, file in self._where.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, of the file that has it. Raises KeyError."""
        return self._where[name].read(name)


def read_configs(path: Path, gguf: GgufFile | None) -> tuple[Fields, Mapping[str, Any]]:
    """config.json and generation_config.json (empty if there is none), both of the GGUF file if there is one; no weights.

    Raises:
        NotFound: no config.json.
        InvalidArgument, Unimplemented: as `open_checkpoint`.
    """
    if gguf:
        meta = Metadata(gguf)
        return Fields(gguf_config.config(meta), meta.where), gguf_config.generation_config(meta)
    generation = path / "generation_config.json"
    config = Fields(read_json(path / "config.json"), str(path / "config.json"))
    return text_config(config), read_json(generation) if generation.exists() else {}


def open_checkpoint(path: Path, gguf: GgufFile | None = None) -> Checkpoint:
    """Finds out what a path is, and opens it. Reads headers only.

    Args:
        gguf: what `open_gguf` has given for the path, for those who have asked already.

    Raises:
        NotFound: nothing there, or no config.json or no weights in it.
        InvalidArgument: files that are not what they should be.
        Unimplemented: a GGUF file of an architecture or type that we do not read.
        DataLoss: a file of weights that is damaged or incomplete.
        PermissionDenied: weights that are a pickle with code.
    """
    gguf = gguf or open_gguf(path)
    config, generation_config = read_configs(path, gguf)
    if gguf:
        return Checkpoint(path, config, generation_config, GgufWeights(Metadata(gguf)), tuple(gguf.parts))
    files = find_weights(path)
    shards = Shards([SafetensorsFile(file) if file.suffix == ".safetensors" else PickleFile(file) for file in files])
    published = Fields(read_json(path / "config.json"), config.where)
    settings = [path / "config.json", *([path / "generation_config.json"] if generation_config else [])]
    return Checkpoint(path, config, generation_config, text_weights(published, shards), (*settings, *files))


def open_gguf(path: Path) -> GgufFile | None:
    """The GGUF file that a path is, or that its directory holds instead of other weights. Its header takes up to a second.

    Raises NotFound for nothing there, InvalidArgument for several, and what `GgufFile` raises.
    """
    if not path.is_dir():
        if path.suffix == ".gguf" and path.is_file():
            return GgufFile(path)
        raise NotFound(
            f"{path} is no directory and no .gguf file; give a checkpoint in Hugging Face layout or in GGUF",
            reason="CHECKPOINT_NOT_FOUND",
        )
    models = gguf_models([file.name for file in path.glob("*.gguf")])
    if not models or has_weights(path):
        return None
    if len(models) > 1:
        raise InvalidArgument(
            f"{path} holds several GGUF files: give the path of one, {', '.join(models)}",
            reason="GGUF_AMBIGUOUS",
        )
    return GgufFile(path / models[0])
