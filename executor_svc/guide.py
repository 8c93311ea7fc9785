"""Where a completion stands in its grammar, and which tokens may come next.

A mask is a row of bits, which the sampler puts over the logits (sampler.py, processors.py). Most take a microsecond, right behind
the token before them, while what the matcher knows of the text is in the caches: less than to hand them to another thread. So
that is when they are computed. Those of a guide whose masks take longer are begun when a batch is started, and are there when its
logits are; all of a batch's are one call then, without the interpreter's lock.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from concurrent.futures import Future
from time import perf_counter

import llguidance
import numpy as np

from engine.errors import EnginehouseError, InvalidArgument, ResourceExhausted
from executor_svc.core import Sequence
from executor_svc.grammar_trial import too_complex

_QUICK = 20e-6  # seconds that a mask may take which is computed at once
# So many quick masks make up for a slow one. A guide whose masks were too slow leaves them to `fill`; each of these counts as a
# quick one, so that now and then one is computed at once again.
_SLOW, _TOO_SLOW = 16, 32


class Guide:
    """Where a completion stands in its grammar.

    Attributes:
        error: why it cannot go on; then every token is allowed, and none of them counts.
        begun: that the next token's mask is being computed beside the loop. ready: that it has been.
        mask, address: its bits, uint8 [at least vocab_size / 8], from the lowest of the first byte on, in whole words of 32 bits;
            and where they lie. num_bits: how many they are, at least vocab_size.
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
        self.begun: Future[None] | None = None
        self.ready = False
        self._give_up = give_up
        self._ends = sequence.eos_ids | sequence.stop_ids
        self._none = bytes(-(-(vocab_size + 1) // 32) * 4)
        self._bytes = bytearray(self._none)
        self._end_byte, self._end_bit = vocab_size >> 3, 1 << (vocab_size & 7)
        self.mask = np.frombuffer(self._bytes, dtype=np.uint8)
        self.address: int = self.mask.ctypes.data
        self.num_bits = 8 * len(self._none)
        self._slow = 0
        # Called for every token: bound once.
        self._consume, self._is_stopped = matcher.consume_token, matcher.is_stopped
        self._compute = matcher.unsafe_compute_mask_ptr
        self.ends = np.zeros_like(self.mask)
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
        self.ready = False
        if self.error is not None:
            return True
        if token not in self._ends and not self._consume(token):
            self.error = self._failure()
            return True
        if self._slow >= _TOO_SLOW:
            self._slow -= 1
            self.begun = None
            return self._is_stopped()
        began = perf_counter()
        self._compute(self.address, len(self._none))
        if perf_counter() - began > _QUICK:
            self._slow += _SLOW
        elif self._slow:
            self._slow -= 1
        may_end = self._bytes[self._end_byte] & self._end_bit
        if may_end and self._is_stopped() and not self.matcher.is_error():  # who has failed is stopped, too
            return True
        self.finish()
        return False

    def finish(self) -> None:
        """Completes a computed mask: adds what ends the text where it may end, takes stop ids away where it may go on."""
        at_end = self._bytes[self._end_byte] & self._end_bit
        if at_end or self.stops or self._bytes == self._none:
            self._finish(at_end)
        self.ready = True

    def _finish(self, at_end: int) -> None:
        mask = self.mask
        mask[self._end_byte] &= 0xFF ^ self._end_bit
        if at_end and self.matcher.is_error():  # then it allows the end, wherever it is
            mask.fill(0)
        elif at_end:
            mask |= self.ends
        elif self.stops:
            kept = mask & ~self.ends
            if kept.any():
                mask[:] = kept
        if not mask.any():
            self.error = self._failure()
            mask.fill(0xFF)

    def bits(self) -> int:
        """The address of the next token's mask, which is there then. It stays until the next token is accepted."""
        if not self.ready:
            if self.begun is None:
                self._compute(self.address, len(self._none))
                self.finish()
            else:
                self.begun.result()
        return self.address

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


def fill(guides: List[Guide], threads: llguidance.LLExecutor) -> None:
    """Computes the masks of the next tokens of one or more guides of one vocabulary, without the interpreter's lock."""
    masks = np.empty((len(guides), len(guides[0].mask)), dtype=np.uint8)
    places = [(guide.matcher, place) for place, guide in enumerate(guides)]
    threads.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.shape[1], len(guides))
    for guide, mask in zip(guides, masks, strict=True):
        guide.mask[:] = mask
        guide.finish()
