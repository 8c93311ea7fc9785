"""What every reader of a checkpoint offers: tensors by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch


class Weights(Protocol):
    """Tensors by name. Nothing large stays in memory between two calls.

    Attributes:
        shapes: tensor name -> shape, linear layers as [out, in] where the Hugging Face files have them so; made of headers
            alone.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's dtype, not to be written to. From any thread. Raises KeyError for an unknown name."""


class Tensors(Weights, Protocol):
    """The same with a path, for errors."""

    @property
    def path(self) -> Path | str: ...
