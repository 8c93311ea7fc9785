"""What the ranks of an engine have: each a program, and of the model's weights its part."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from builder_svc.checkpoint.quantized.resolve import Resolved
from builder_svc.shard import Cut
from builder_svc.weights import read_parts, write_weights
from engine.manifest import FileRef
from engine.program import Program


@dataclass(frozen=True)
class RankPart:
    """One rank's part of a model.

    Attributes:
        constants: the weights that no checkpoint holds.
        cuts: of the others, what it has of the whole one, where that is not all.
    """

    program: Program
    constants: Mapping[str, Tensor]
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    def read(self, weights: Resolved, name: str) -> Iterable[Tensor]:
        """The tensors that form one of its weights, one after another."""
        if weights.checkpoint is None or name in self.constants:
            return [self.constants[name]]
        whole = read_parts(weights.checkpoint, weights.sources[name])
        if name not in self.cuts:
            return whole
        return self.cuts[name].taken(whole, tuple(map(int, self.program.weights[name].shape)))

    def _value(self, name: str) -> Hashable:
        """Equal for ranks in which a weight has the same values."""
        constant = self.constants.get(name)
        of_rank = self.cuts.get(name, Cut()) if constant is None else constant.numpy().tobytes()
        return name, self.program.weights[name], of_rank

    def values(self, weights: Resolved) -> dict[str, Hashable]:
        """Of each weight that is written to a file; what several ranks have alike is written once."""
        written = {*self.constants, *weights.sources}
        return {name: self._value(name) for name in self.program.weights if name in written}


def write_ranks(
    ranks: Sequence[RankPart], weights: Resolved, directory: Path, progress: Callable[[int, int], None]
) -> list[tuple[tuple[int, ...], FileRef, Path]]:
    """Writes the weights of all ranks into a directory. Those that several have alike are in files of their own.

    Args:
        progress: called with (bytes done, bytes in all).

    Returns:
        For each file the ranks whose it is, its description and its path.
    """
    holders: dict[Hashable, list[int]] = {}
    names: dict[Hashable, str] = {}
    for number, rank in enumerate(ranks):
        for name, value in rank.values(weights).items():
            holders.setdefault(value, []).append(number)
            names[value] = name
    groups: dict[tuple[int, ...], list[str]] = {}
    for value, held_by in holders.items():
        groups.setdefault(tuple(held_by), []).append(names[value])
    sizes = {
        numbers: sum(ranks[numbers[0]].program.weights[name].nbytes for name in group)
        for numbers, group in groups.items()
    }
    written: list[tuple[tuple[int, ...], FileRef, Path]] = []
    before = 0
    for numbers, group in sorted(groups.items()):
        rank = ranks[numbers[0]]

        def parts(name: str, rank: RankPart = rank) -> Iterable[Tensor]:
            return rank.read(weights, name)

        def wrote(done: int, _: int, before: int = before) -> None:
            progress(before + done, sum(sizes.values()))

        files = write_weights(rank.program, parts, group, directory, wrote, f"rank{'+'.join(map(str, numbers))}")
        written += [(numbers, ref, path) for ref, path in files]
        before += sizes[numbers]
    return written
