"""Texts that must not be generated, as the token sequences that would write them."""

from collections.abc import Iterator, Sequence

from engine.errors import InvalidArgument
from gateway.tokenizer import Tokenizer

MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 100  # characters

_ANCHORS = ("\n", "|", "1")  # what a tokenizer does not join with a word behind it


def check_bad_words(words: Sequence[str]) -> None:
    """Raises InvalidArgument for too many, an empty or a very long one."""
    if len(words) > MAX_BAD_WORDS:
        raise InvalidArgument(
            f"{len(words)} bad words: give at most {MAX_BAD_WORDS}, or sequences of tokens as sampling.bad_token_ids",
            reason="BAD_WORD_INVALID",
        )
    for word in words:
        if not 0 < len(word) <= MAX_BAD_WORD_LENGTH:
            raise InvalidArgument(
                f"a bad word has {len(word)} characters: give 1 to {MAX_BAD_WORD_LENGTH}, or leave it out",
                reason="BAD_WORD_INVALID",
            )


def bad_token_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The sequences of tokens by which the model usually writes these words, each once.

    A model could still spell a word with other, shorter tokens. Raises InvalidArgument for a word without tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        ways = dict.fromkeys(ids for ids in _ways(word, tokenizer) if ids)
        if not ways:
            raise InvalidArgument(
                f"the bad word {word!r} has no tokens in this model: leave it out", reason="BAD_WORD_INVALID"
            )
        found |= ways
    return list(found)


def _ways(word: str, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """At the beginning of a text, behind a space, and within a word."""
    yield tuple(tokenizer.encode(word, add_special_tokens=False))
    bare = word.lstrip(" ")
    if not bare:
        return
    yield tuple(tokenizer.encode(" " + bare, add_special_tokens=False))
    for anchor in _ANCHORS:  # where a tokenizer puts a space before any text, the word has to stand behind something
        before = tokenizer.encode(anchor, add_special_tokens=False)
        both = tokenizer.encode(anchor + bare, add_special_tokens=False)
        if before and both[: len(before)] == before:
            yield tuple(both[len(before) :])
            return
