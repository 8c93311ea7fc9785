"""A model's weights as a mapping, for people and for `quantize`."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from builder_svc.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from builder_svc.checkpoint.tensors import Tensors
from builder_svc.models.sources import Source
from builder_svc.weights import check_weights, read_parts
from engine.program import TensorType


class WeightsView(Mapping[str, torch.Tensor]):
    """A model's weights by our names. Those that came quantized are dequantized; those that `quantize` has made are as packed.

    Reading one reads what it is made of, and keeps nothing.

    Attributes:
        declared: name -> dtype and shape.
    """

    def __init__(self, checkpoint: Tensors, sources: Mapping[str, Source], declared: Mapping[str, TensorType]) -> None:
        """Raises InvalidArgument where the checkpoint has not what is declared."""
        self.declared, self._checkpoint, self._sources = declared, checkpoint, sources
        if isinstance(checkpoint, QuantizedCheckpoint):
            used = {name for source in sources.values() for name in source.names}
            self._checkpoint = checkpoint.packed({}, used)
        check_weights(self._checkpoint, sources, declared)

    @property
    def path(self) -> Path | str:
        """Where they are read from."""
        return self._checkpoint.path

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """The tensors that form a weight, one after another, in the checkpoint's dtype."""
        return read_parts(self._checkpoint, self._sources[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        declared = self.declared[name]
        dtype = getattr(torch, declared.dtype)
        return torch.cat([part.to(dtype).reshape(-1) for part in self.parts(name)]).view(declared.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.declared)

    def __len__(self) -> int:
        return len(self.declared)
