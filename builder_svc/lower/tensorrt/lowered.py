"""What `lower` makes: a network, and all that whoever builds or runs it must know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BATCH, SEQ, TOKENS, LOGITS = "batch", "seq", "num_tokens", "num_logits"
BORDERS = "batch + 1"
"""Names of dimensions: rows of the cache, tokens of each in a padded step, tokens of a packed one, rows whose logits are wanted,
and what cumulative lengths have."""


@dataclass(frozen=True)
class Port:
    """An input or output of a network: a dtype by our name, and a shape of numbers and names of dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Profile:
    """One range of shapes that a plan is made for: by the name of a dimension its least, its usual and its largest size."""

    name: str
    dims: Mapping[str, tuple[int, int, int]]

    def shapes(self, port: Port) -> list[tuple[int, ...]]:
        """The least, the usual and the largest shape of an input."""
        return [tuple(dim if isinstance(dim, int) else self.dims[dim][at] for dim in port.shape) for at in range(3)]


@dataclass(frozen=True)
class IoSpec:
    """What goes in and comes out.

    Attributes:
        attention: "padded": tokens [batch, seq], a row a slot of the caches; or "packed": tokens [num_tokens], the rows of the
            step one after another.
        capacity: tokens that a slot of the caches holds.
    """

    attention: str
    capacity: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class LoweredNetwork:
    """A program as a network.

    Attributes:
        network: an INetworkDefinition.
        constants: layer name -> the tensor whose memory its constant is, which TensorRT reads when it builds.
        kv_aliases: output -> the input whose memory it shares: a cache, before and after the step's tokens are written.
        profiles: for prefill and decode.
        builder: the Builder that made the network, which must live as long.
    """

    network: Any
    constants: dict[str, Tensor]
    io_spec: IoSpec
    kv_aliases: dict[str, str]
    profiles: tuple[Profile, ...]
    builder: Any

    def summary(self) -> dict[str, Any]:
        """The network for people, as JSON values: layers by kind, inputs, outputs and profiles."""
        kinds: dict[str, int] = {}
        for number in range(self.network.num_layers):
            kind = self.network.get_layer(number).type.name
            kinds[kind] = kinds.get(kind, 0) + 1
        return {
            "layers": dict(sorted(kinds.items())),
            "attention": self.io_spec.attention,
            "cache_capacity": self.io_spec.capacity,
            "caches": len(self.kv_aliases) // 2,
            "profiles": {
                profile.name: {dim: list(sizes) for dim, sizes in profile.dims.items()} for profile in self.profiles
            },
        }
