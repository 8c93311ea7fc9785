"""Over which ranks a model is spread, and which of them one is."""

from collections.abc import Mapping as Values
from dataclasses import dataclass, replace
from typing import Any

from builder_svc.tensorrt_names import also_takes
from engine.errors import InvalidArgument

_SAVED = ("world_size", "tp_size", "pp_size")  # the rank is not a checkpoint's


@also_takes(off={"cp_size": 1, "moe_tp_size": (-1, 1), "moe_ep_size": (-1, 1), "auto_parallel": False})
@dataclass(frozen=True)
class Mapping:
    """The place of a rank among those that run a model together.

    Ranks of one tensor-parallel group are neighbours: rank = pp_rank * tp_size + tp_rank.

    Attributes:
        world_size: ranks in all, tp_size * pp_size.
        rank: this one, from 0.
        gpus_per_node: ranks on one machine.
        tp_size: ranks that each layer is divided among.
        pp_size: groups that the layers are divided among.

    Raises:
        InvalidArgument: (a ValueError) sizes whose product is not world_size, or no such rank.

    Example:
        >>> from enginehouse import Mapping
        >>> Mapping(world_size=4, rank=3, tp_size=2, pp_size=2).tp_group
        [2, 3]
    """

    world_size: int = 1
    rank: int = 0
    gpus_per_node: int = 8
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "rank" else 1
            if type(value) is not int or value < least:
                raise InvalidArgument(f"mapping: {name} is {value!r}, expected a number from {least}")
        if self.tp_size * self.pp_size != self.world_size:
            raise InvalidArgument(
                f"mapping: tp_size {self.tp_size} * pp_size {self.pp_size} is {self.tp_size * self.pp_size}, but world_size is "
                f"{self.world_size}: they must be the same",
                reason="MAPPING_INVALID",
            )
        if self.rank >= self.world_size:
            raise InvalidArgument(
                f"mapping: rank is {self.rank}, but the last of {self.world_size} ranks is {self.world_size - 1}",
                reason="MAPPING_INVALID",
            )

    @property
    def tp_rank(self) -> int:
        """Place within the tensor-parallel group."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """Place in the pipeline."""
        return self.rank // self.tp_size

    @property
    def tp_group(self) -> list[int]:
        """The ranks that have the same layers."""
        first = self.pp_rank * self.tp_size
        return list(range(first, first + self.tp_size))

    @property
    def pp_group(self) -> list[int]:
        """The ranks that have the same part of all layers, in the pipeline's order."""
        return list(range(self.tp_rank, self.world_size, self.tp_size))

    @property
    def node_rank(self) -> int:
        """The machine."""
        return self.rank // self.gpus_per_node

    @property
    def local_rank(self) -> int:
        """Place on its machine."""
        return self.rank % self.gpus_per_node

    def ranks(self) -> "list[Mapping]":
        """All that run the model together, in order."""
        return [replace(self, rank=rank) for rank in range(self.world_size)]

    def has_tp(self) -> bool:
        """Whether layers are divided."""
        return self.tp_size > 1

    def has_pp(self) -> bool:
        """Whether there is a pipeline."""
        return self.pp_size > 1

    def is_first_pp_rank(self) -> bool:
        """Whether it has the embedding."""
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        """Whether it has the head."""
        return self.pp_rank == self.pp_size - 1

    def prev_pp_rank(self) -> int:
        """The rank before it in the pipeline; before the first one, the last."""
        return (self.rank - self.tp_size) % self.world_size

    def next_pp_rank(self) -> int:
        """The rank behind it in the pipeline; behind the last one, the first."""
        return (self.rank + self.tp_size) % self.world_size

    def pp_layers(self, num_layers: int) -> list[int]:
        """Which of so many layers it has. Where they cannot be divided evenly, the first ranks have one more.

        Raises:
            InvalidArgument: fewer layers than pp_size.
        """
        if num_layers < self.pp_size:
            raise InvalidArgument(
                f"mapping: {num_layers} layers cannot be divided among pp_size {self.pp_size}; at most {num_layers} would fit",
                reason="MAPPING_INVALID",
            )
        each, more = divmod(num_layers, self.pp_size)
        first = self.pp_rank * each + min(self.pp_rank, more)
        return list(range(first, first + each + (self.pp_rank < more)))

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return dict(vars(self))

    def sizes(self) -> dict[str, int]:
        """What a checkpoint says of it: world_size, tp_size, pp_size."""
        return {name: getattr(self, name) for name in _SAVED}

    @staticmethod
    def from_dict(values: Values[str, Any]) -> "Mapping":
        """Of fields by name; what is left out has its default. Raises InvalidArgument, also for a field that is none."""
        known = Mapping.__dataclass_fields__
        if unknown := sorted(set(values) - set(known)):
            raise InvalidArgument(
                f"mapping: {', '.join(unknown)} is no field of it; there are {', '.join(known)}",
                reason="MAPPING_INVALID",
            )
        return Mapping(**values)
