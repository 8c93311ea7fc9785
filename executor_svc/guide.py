"""Where a completion stands in its grammar, and which tokens may come next.

A mask is a row of bits, which the sampler puts over the logits (processors.py). The mask of a token depends on the one before it,
so it is begun when a batch is started, and is there when the batch's logits are; all of a batch's masks are one call, without
the interpreter's lock.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from concurrent.futures import Future

import llguidance
import numpy as np

from engine.errors import EnginehouseError, Internal, InvalidArgument, ResourceExhausted
from executor_svc.core import Sequence
from executor_svc.grammar_trial import too_complex


class Guide:
    """Where a completion stands in its grammar.

    Attributes:
        error: why it cannot go on; then every token is allowed, and none of them counts.
        mask, row: of the next token: that it is being computed, and then its bits; None before.
        end: the token by which a matcher says that a text may end, behind all of the model's.
        ends, stops: bits of the tokens that end the completion; whether any of them is text.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        kind: str,
        sequence: Sequence,
        vocab_size: int,
        special: frozenset[int],
        give_up: Callable[[ResourceExhausted], None],
    ) -> None:
        """At the beginning of a completion, or behind the tokens that `sequence` has of it.

        Args:
            special: tokens that are no text.
            give_up: told when the grammar turns out to be too complex.

        Raises:
            InvalidArgument: these do not follow the grammar, or have come to its end.
        """
        self.error: EnginehouseError | None = None
        self.kind = kind
        self.matcher = matcher
        self.mask: Future[None] | None = None
        self.row: np.ndarray | None = None
        self.end = vocab_size
        self._give_up = give_up
        self._ends = sequence.eos_ids | sequence.stop_ids
        self.ends = np.zeros(-(-(vocab_size + 1) // 32) * 4, dtype=np.uint8)
        for token in self._ends:
            self.ends[token >> 3] |= 1 << (token & 7)
        self.stops = not self._ends <= special
        resumed = sequence.token_ids[sequence.prompt_len :]
        for place, token in enumerate(resumed):
            if matcher.is_stopped() or token in self._ends or not matcher.consume_token(token):
                raise InvalidArgument(
                    f"resume_token_ids: token {token} at place {place} cannot stand there by guided_decoding.{kind}: send what "
                    "was generated with it",
                    reason="RESUME_TOKEN_IDS_INVALID",
                )
        if resumed and matcher.is_stopped():
            raise InvalidArgument(
                f"resume_token_ids are all that guided_decoding.{kind} allows: there is nothing to go on with",
                reason="RESUME_TOKEN_IDS_INVALID",
            )

    def accept(self, token: int) -> bool:
        """Follows the completion's next token; whether the completion ends with it, since nothing more is allowed."""
        self.mask = self.row = None
        if self.error is None and token not in self._ends and not self.matcher.consume_token(token):
            self.error = self._failure()
        return self.error is not None or self.matcher.is_stopped()

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, a bit each from the lowest on: uint8 [at least vocab_size / 8]. Not to be changed."""
        if self.row is None:
            if self.mask is None:
                fill([self], None)
            else:
                self.mask.result()
        if self.row is None:
            raise Internal("the mask of a guide was not computed")
        return self.row

    def finish(self, row: np.ndarray, at_end: int) -> None:
        """Takes the mask of its next token, of one whose text may end, or whose mask has to be looked at."""
        if at_end and self.matcher.is_error():  # then it allows the end, wherever it is
            row.fill(0)
        elif at_end:
            row |= self.ends
        elif self.stops:
            kept = row & ~self.ends
            if kept.any():
                row[:] = kept
        if not row.any():
            self.error = self._failure()
            row.fill(0xFF)
        self.row = row

    def _failure(self) -> EnginehouseError:
        error = self.matcher.get_error()
        if self.matcher.is_error() and "NoExtension" not in error:
            found = too_complex(self.kind, error)
            self._give_up(found)
            return found
        return InvalidArgument(
            f"guided_decoding.{self.kind} has led to where no token of this model can follow: change it",
            reason="GUIDED_DECODING_DEAD_END",
        )


def fill(guides: List[Guide], threads: llguidance.LLExecutor | None) -> None:
    """Computes the masks of the next tokens of one or more guides."""
    rows = np.zeros((len(guides), len(guides[0].ends)), dtype=np.uint8)
    if threads is None:
        for guide, row in zip(guides, rows, strict=True):
            guide.matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    else:
        places = [(guide.matcher, place) for place, guide in enumerate(guides)]
        threads.unsafe_compute_mask_ptr(places, rows.ctypes.data, rows.shape[1], len(guides))
    end, bit = guides[0].end >> 3, 1 << (guides[0].end & 7)  # the token that is the end of the text
    at_end = (rows[:, end] & bit).tolist()
    rows[:, end] &= 0xFF ^ bit
    some_left: list[bool] = rows.any(axis=1).tolist()
    for guide, row, ends, some in zip(guides, rows, at_end, some_left, strict=True):
        if ends or guide.stops or not some:
            guide.finish(row, ends)
        else:
            guide.row = row
