"""Token ids to text, as they come: never half a character, and in the end what `decode` says of all of them.

Why not `tokenizers.decoders.DecodeStream`: it has no flush, so that what waits at the end is lost; over byte-fallback
vocabularies it raises on one random sequence in twenty, because a run of bytes reads differently when it grows; and a
run of invalid bytes costs it time quadratic in its length.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_HOLD = 16  # tokens whose text ends in U+FFFD and may still become a character


class Detokenizer(Protocol):
    """One request's text: all deltas and the flush, one after another, are the text of all its tokens."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that the next tokens complete; may be empty."""

    def flush(self) -> str:
        """What still waited for its other half, as U+FFFD. Nothing may be pushed afterwards."""


class Silent:
    """For tokens that have no text."""

    def push(self, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        return ""

    def flush(self) -> str:
        return ""


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, filled as they are asked for; b"" for one that is left out."""

    def __init__(self, tokenizer: Tokenizer, left_out: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._left_out = left_out

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._left_out else self._tokenizer.id_to_token(token_id)
        self[token_id] = found = _bytes(token or "")
        return found


class ByteLevelDetokenizer:
    """For vocabularies whose tokens are bytes (GPT-2, Llama 3, Qwen): a table and a UTF-8 decoder."""

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        return self._utf8.decode(b"".join([table[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder: decodes new tokens behind an anchor, the tokens whose text went out last.

    The anchor gives new tokens their place within a text, so that a continuation keeps the space before its first word:
    the text is that of prompt and tokens less that of the prompt. The first anchor is the last ordinary token of the
    prompt; behind special tokens alone, text begins as `decode` begins one.

    A run of byte-fallback tokens waits for its end, since the decoder reads it as a whole: one invalid byte at the end
    turns all of its characters into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], left_out: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._left_out = left_out
        self._waiting: list[int] = []
        self._settle(next(([i] for i in reversed(prompt) if self._token(i) and not self._is_byte(i)), []))

    def push(self, token_ids: Sequence[int]) -> str:
        self._waiting += [token_id for token_id in token_ids if self._token(token_id)]
        if not self._waiting or self._is_byte(self._waiting[-1]):
            return ""
        text = self.flush()
        if not text or (text[-1] == "\ufffd" and len(self._waiting) < _LONGEST_HOLD):
            return ""
        self._settle(self._waiting)
        self._waiting = []
        return text

    def flush(self) -> str:
        return self._decode(self._anchor + self._waiting)[self._anchor_length :]

    def _settle(self, anchor: list[int]) -> None:
        self._anchor = anchor
        self._anchor_length = len(self._decode(anchor))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _token(self, token_id: int) -> str:
        """The token as it stands in the vocabulary; empty for one that makes no text."""
        return "" if token_id in self._left_out else self._tokenizer.id_to_token(token_id) or ""

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._token(token_id)) is not None


def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_ALPHABET = _alphabet()


def _bytes(token: str) -> bytes:
    """The bytes that a byte-level decoder makes of a token; an added token may hold characters outside of the alphabet."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()


def piece_bytes(token: str) -> bytes:
    """The bytes of a token by itself in sentencepiece's vocabularies, where U+2581 is a space and <0x0A> a byte."""
    if _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
