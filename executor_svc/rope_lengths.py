"""What the scheduler must know of a program whose rotary frequencies depend on how long a sequence is. Imports no torch."""

from dataclasses import dataclass

from engine.errors import Unimplemented
from engine.program import Program

_BEGINS_AGAIN = {"long_rope_table": True, "dynamic_rope_table": False}


@dataclass(frozen=True)
class RopeLengths:
    """How a sequence's length decides on its keys.

    Attributes:
        original: tokens up to which the length makes no difference.
        begins_again: whether all keys of a sequence that grows beyond are computed again (LongRoPE); otherwise keys stay as they
            were written (dynamic NTK).
    """

    original: int
    begins_again: bool

    def least(self, prompt_len: int, num_tokens: int) -> int:
        """`Sequence.rope_length` of one that has `num_tokens` when the first of them is computed; 0 up to `original`.

        Where keys stay, only the prompt counts: they must be the same when they are computed again later, behind which other
        tokens ever. Where they do not, all lengths beyond are one.
        """
        if self.begins_again:
            return self.original + 1 if num_tokens > self.original else 0
        return prompt_len if prompt_len > self.original else 0


def rope_lengths(program: Program) -> RopeLengths | None:
    """By its operators; None for a program whose frequencies are always the same.

    Raises:
        Unimplemented: its layers differ in what a length does to them.
    """
    found = {
        RopeLengths(int(str(op.attrs["original"])), _BEGINS_AGAIN[op.op])
        for op in program.ops
        if op.op in _BEGINS_AGAIN
    }
    if len(found) > 1:
        each = ", ".join(sorted(f"{'longrope' if rope.begins_again else 'dynamic'} {rope.original}" for rope in found))
        raise Unimplemented(
            f"the engine's layers have rotary frequencies of {each}: this executor runs models of which all layers change at "
            "the same length and in the same way; build another model",
            reason="ROPE_LENGTHS_MIXED",
        )
    return found.pop() if found else None
