"""Stop strings, found in text that comes in pieces."""

import re
from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, and holds back an end that may still become one.

    The first is the one that ends first, of two that end together the longer: what comes out does not depend on how the
    text was cut into pieces.

    Attributes:
        matched: the stop string that was found; nothing may be pushed afterwards.
        end: how much of the text that was pushed last it took to find it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self.end = 0
        self._first = re.compile(f"[{re.escape(''.join({stop[0] for stop in stops}))}]")
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop string."""
        text, begin = self._held + text, len(self._held)
        held, end = len(self._held), begin
        while end < len(text):
            if not held:  # no stop string has begun: on to where one may
                found = self._first.search(text, end)
                if found is None:
                    break
                end = found.start()
            held = 0
            for automaton in self._automata:
                length = automaton.step(text[end])
                if length == len(automaton.stop):
                    self.matched, self.end, self._held = automaton.stop, end + 1 - begin, ""
                    return text[: end + 1 - length]
                held = max(held, length)
            end += 1
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no text comes any more."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How much of the beginning of `stop` the text ends with (Knuth, Morris, Pratt 1977); constant time a character."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self._length = 0
        self._borders = [0] * len(stop)
        for n in range(1, len(stop)):
            self._borders[n] = self._next(self._borders[n - 1], stop[n])

    def step(self, char: str) -> int:
        self._length = self._next(self._length, char)
        return self._length

    def _next(self, length: int, char: str) -> int:
        while length and self.stop[length] != char:
            length = self._borders[length - 1]
        return length + (self.stop[length] == char)
