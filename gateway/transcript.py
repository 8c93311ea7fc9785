"""The text of one request: detokenizer and stop strings together."""

from collections.abc import Sequence
from itertools import accumulate

from gateway.detokenize import Detokenizer
from gateway.stop import StopMatcher


class Transcript:
    """Takes tokens, gives text that ends before the first stop string.

    The same tokens give the same text and the same end, however they were bundled on the way here.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops) if stops else None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.matched if self._stops else None

    def push(self, token_ids: Sequence[int]) -> tuple[Sequence[int], str]:
        """Tokens and new text; of the tokens, those behind the one that completed a stop string are left out."""
        if self._stops is None:
            return token_ids, self._detokenizer.push(token_ids)
        pieces = [self._detokenizer.push((token_id,)) for token_id in token_ids]
        text = self._stops.push("".join(pieces))
        if self._stops.matched:
            lengths = accumulate(map(len, pieces))
            count = next(count for count, length in enumerate(lengths, 1) if length >= self._stops.end)
            return token_ids[:count], text
        return token_ids, text

    def flush(self) -> str:
        """What was held back, when no token comes any more; this too may complete a stop string."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            return rest
        text = self._stops.push(rest)
        return text if self._stops.matched else text + self._stops.flush()
