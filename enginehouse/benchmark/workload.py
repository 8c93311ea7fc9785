"""What a benchmark asks: prompts, lengths and the times at which requests begin, all decided by a seed."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidArgument

Prompt = str | list[int]

# Shown to the model's own tokenizer, to learn ids that text has.
SAMPLE_TEXT = (
    "".join(map(chr, range(32, 127)))
    + " the of and to in that was his he it with is for as had you not be her on at by which have or from this him but all"
    + " she they were my are me one their so an said them we who would been will no when there if more out up into do any your"
    + " what has man could other than our some very time upon about may its only now like little then can made should did us"
    + " such great before must two these see know over much down after first good men own never most old shall day where those"
    + " return import class def while for print self value index list data type string number function error result file"
)


@dataclass(frozen=True)
class Length:
    """A number of tokens, drawn uniformly from low to high, both included."""

    low: int
    high: int

    @staticmethod
    def parse(text: str) -> "Length":
        """ "128" or "64-256". Raises ValueError."""
        low, dash, high = text.partition("-")
        if not (low.isascii() and low.isdigit() and (not dash or (high.isascii() and high.isdigit()))):
            raise ValueError(f"{text!r} is neither a number of tokens nor LOW-HIGH, such as 128 or 64-256")
        length = Length(int(low), int(high) if dash else int(low))
        if not 1 <= length.low <= length.high < 2**31:
            raise ValueError(f"{text!r}: lengths are at least 1, the lower one first")
        return length

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Ask:
    """One request: its prompt, and how many tokens to generate at most."""

    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests without end, the same ones for the same seed and label.

    Attributes:
        ids: token ids from which synthetic prompts are drawn, each as likely as any other.
        shared_prefix: tokens with which all synthetic prompts begin; the rest of each is its own.
        prompts: instead of synthetic ones; used in turn, and again from the first.
    """

    seed: int
    input_len: Length
    output_len: Length
    ids: Sequence[int] = ()
    shared_prefix: int = 0
    prompts: Sequence[Prompt] = ()

    def asks(self, label: str) -> Iterator[Ask]:
        """The requests of a part of the benchmark; parts with different labels share no prompt but the prefix."""
        rng = random.Random(f"{self.seed}/{label}")
        prefix = random.Random(f"{self.seed}/prefix").choices(self.ids, k=self.shared_prefix) if self.ids else []
        number = 0
        while True:
            if self.prompts:
                prompt: Prompt = self.prompts[number % len(self.prompts)]
            else:
                prompt = prefix + rng.choices(self.ids, k=self.input_len.draw(rng) - self.shared_prefix)
            yield Ask(prompt, self.output_len.draw(rng))
            number += 1

    def arrivals(self, rate: float, label: str) -> Iterator[float]:
        """Seconds from the start at which requests begin: a Poisson process of `rate` requests/s."""
        rng = random.Random(f"{self.seed}/{label}/arrivals")
        at = 0.0
        while True:
            yield at
            at += rng.expovariate(rate)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: a text a line, or with the suffix .jsonl a JSON value a line.

    That is a string, an array of token ids, or an object with one of them as "prompt", "text" or "token_ids". Empty lines
    are left out.

    Raises:
        InvalidArgument: no prompt, or a line that is none of these; says which.
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other separators as they are
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8 text: {error}", reason="PROMPTS_INVALID") from None
    found: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_parse(line, f"{path}:{number}") if path.suffix == ".jsonl" else line)
    if not found:
        raise InvalidArgument(f"{path} holds no prompt: write one a line", reason="PROMPTS_INVALID")
    return found


def _parse(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(f"{where} is not JSON: {error}", reason="PROMPTS_INVALID") from None
    if isinstance(value, dict):
        value = next((value[key] for key in ("prompt", "text", "token_ids") if key in value), None)
    ids = isinstance(value, list) and all(type(token) is int and 0 <= token < 2**32 for token in value)
    if not value or not (isinstance(value, str) or ids):
        raise InvalidArgument(
            f'{where}: give a string, an array of token ids, or an object with "prompt", "text" or "token_ids"',
            reason="PROMPTS_INVALID",
        )
    return value  # type: ignore[no-any-return]  # checked above
