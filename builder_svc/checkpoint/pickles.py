"""PyTorch's own files, pytorch_model.bin: read as data, never run."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, PermissionDenied

_CODE = re.compile(r"(?:GLOBAL|Unsupported class|Unsupported global:?) +(?:GLOBAL +)?([\w.]+)")
_CONVERT = "convert the model to safetensors where you trust it (transformers' save_pretrained writes them)"


class PickleFile:
    """One file, which torch.load opens with weights_only: a pickle that asks for anything but tensors is refused.

    Files of PyTorch 1.6 and later are zip archives and are memory-mapped. Older ones cannot be: such a file is in memory as a
    whole for as long as this object is.

    Attributes:
        path: the file.
        shapes: tensor name -> shape.

    Raises:
        PermissionDenied: a pickle that would run code.
        InvalidArgument: no mapping of names to dense tensors.
        DataLoss: damaged or incomplete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what the file's author used and we do not
                loaded = torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
        except pickle.UnpicklingError as error:
            if found := _CODE.search(str(error)):
                raise PermissionDenied(
                    f"{path} is a pickle that needs {found[1]!r}, which is not a tensor and may run code; it is never run: "
                    f"{_CONVERT}",
                    reason="PICKLE_REFUSED",
                ) from None
            raise _damaged(path, error) from None
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be read: {error.strerror}", reason="FILE_UNREADABLE") from None
        except Exception as error:  # a broken pickle raises whatever its bytes lead to
            raise _damaged(path, error) from None
        if not isinstance(loaded, Mapping):
            raise InvalidArgument(
                f"{path} holds a {type(loaded).__name__}, not tensors by name: {_CONVERT}", reason="WEIGHTS_INVALID"
            )
        for name, value in loaded.items():
            if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
                raise InvalidArgument(
                    f"{path}: its entry {name!r} is a {type(value).__name__}, not a tensor: save the model's state_dict alone",
                    reason="WEIGHTS_INVALID",
                )
            if value.layout != torch.strided or value.is_quantized:
                raise InvalidArgument(
                    f"{path}: tensor {name!r} is sparse or quantized in PyTorch's own way: save it dense",
                    reason="WEIGHTS_INVALID",
                )
        self._tensors: Mapping[str, torch.Tensor] = loaded
        self.shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype; it may share its memory with others and have any strides."""
        return self._tensors[name].detach()


def _damaged(path: Path, error: Exception) -> DataLoss:
    lines = str(error).splitlines() or [type(error).__name__]
    return DataLoss(f"{path} is damaged or incomplete ({lines[0][:200]}): download it again", reason="WEIGHTS_DAMAGED")
