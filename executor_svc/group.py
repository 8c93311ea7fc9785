"""The ranks that run an engine together, as a runner sees them: one alone here, several in `ranks.py`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from engine.errors import FailedPrecondition, Internal
from engine.manifest import Parallelism
from engine.opset import OPERATORS
from engine.program import Program
from executor_svc.frames import FrameSocket


class Follower(Protocol):
    """A runner of a rank that rank 0 leads."""

    def follow(self, plan: bytes) -> None:
        """Computes this rank's part of a step that rank 0 has started."""


class Group:
    """The only rank of an engine, or one of several (`Ranks`), as runners see them; an `engine.ops.Group`.

    Attributes:
        rank: this one; 0 leads.
        size: ranks in all. tp_size: of them, those that have the same layers. pp_size: places in the pipeline.
        here: ranks on this machine.
        rows: tokens of the step, which a runner sets before it lets the program run.
    """

    def __init__(self, rank: int = 0, mapping: Parallelism = Parallelism()) -> None:  # noqa: B008  (frozen)
        self.rank, self.size, self.here = rank, mapping.world_size, mapping.world_size
        self.tp_size, self.pp_size = mapping.tp_size, mapping.pp_size
        self.rows = 0

    def least(self, number: int) -> int:
        """The least of what all ranks give."""
        return number

    def tell(self, plan: Mapping[str, Any]) -> None:
        """Tells the other ranks a step, if this one leads; see `plans.pack`."""

    def follow(self, front: FrameSocket, runner: Follower) -> NoReturn:  # noqa: ARG002
        """Computes what rank 0 tells, until that has ended.

        Raises:
            Unavailable: rank 0 has ended.
            ConnectionError: the front is gone.
        """
        raise Internal("a rank that is alone has nobody to follow")

    def agree_on_logits(self, program: Program) -> int:  # noqa: ARG002
        """To be called once, with the rank's own program, before `bring_home`: how wide logits are that come here; 0 for none."""
        return 0

    def bring_home(self, logits: Tensor | None, rows: int) -> Tensor | None:  # noqa: ARG002
        """Takes float32 logits [rows, vocab_size] from the pipeline's last place to rank 0; what is not there is None."""
        return logits

    def bring_tokens(self, tokens: Tensor | None, rows: int) -> Tensor | None:  # noqa: ARG002
        """Takes tokens, int32 [rows], from each rank of the last place to the one of its place in the first."""
        return tokens

    def communicator(self) -> int:
        """The address of the tensor-parallel group's ncclComm_t, for what runs collectives by itself."""
        raise Internal("a rank that is alone has no communicator")

    def most_shared(self) -> int:
        """Bytes of a message, at most, that ranks sum by themselves, through memory that they share; 0 where they do not."""
        return 0

    def share(self, size: int, fill: int) -> list[int] | None:  # noqa: ARG002
        """Memory on each rank of the tensor-parallel group that all of them read and write, until they end.

        Args:
            size: bytes, a multiple of 4. fill: 32 bits that all of it has at first.

        Returns:
            The addresses in this process, by rank of the group; None, on all ranks, where there is no way.
        """
        return None

    def from_leader(self, values: Tensor) -> Tensor:
        """Rank 0's values, to be called by its tensor-parallel group: the others' are overwritten."""
        return values

    def all_reduce(self, x: Tensor) -> Tensor:
        """As the protocol says."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """As the protocol says."""
        return x

    def send(self, x: Tensor) -> None:  # noqa: ARG002
        """As the protocol says."""
        raise FailedPrecondition("the program sends to another rank, but runs alone", reason="PROGRAM_INVALID")

    def recv(self, columns: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """As the protocol says."""
        raise FailedPrecondition("the program waits for another rank, but runs alone", reason="PROGRAM_INVALID")


ALONE = Group()


def bind(operators: Mapping[str, Callable[..., Any]], group: Group) -> dict[str, Callable[..., Any]]:
    """Implementations, of which those that use the group have it."""
    uses = {name for name, spec in OPERATORS.items() if spec.uses_group}
    return {name: partial(run, group=group) if name in uses else run for name, run in operators.items()}
