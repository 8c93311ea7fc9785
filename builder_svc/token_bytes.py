"""The bytes of each token, from tokenizer.json: what guided output in an executor knows of a tokenizer.

Byte-level vocabularies (GPT-2, Llama 3, Qwen) name bytes by printable stand-ins. Of others the library's own decoder is asked
what a token adds behind another one, so that the space of a word's beginning is there; tokens that stand for one byte are read
by their name. A decoder whose text of a token depends on what follows has no table.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from builder_svc.tokenizer import NormalizedTokenizer
from engine.token_table import FILE, TokenTable

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOCAL = {
    "Replace",
    "ByteFallback",
    "Fuse",
    "Strip",
    "Metaspace",
    "WordPiece",
}  # a token's text depends on none behind it


def engine_files(tokenizer: NormalizedTokenizer | None, vocab_size: int, eos_ids: Iterable[int]) -> dict[str, bytes]:
    """A tokenizer's files as an engine has them, by name: with the table, if there can be one."""
    if tokenizer is None:
        return {}
    table = token_table(tokenizer.tokenizer_json, vocab_size, eos_ids)
    return tokenizer.files() | ({FILE: table.to_bytes()} if table else {})


def token_table(tokenizer_json: bytes, vocab_size: int, eos_ids: Iterable[int]) -> TokenTable | None:
    """The table of a normalized tokenizer; None where a token by itself has no bytes.

    Args:
        vocab_size: rows of the model's logits; those that no token has get no bytes.
        eos_ids: end-of-sequence tokens below vocab_size, which are special whatever the tokenizer says.
    """
    text = tokenizer_json.decode()
    tokenizer, steps = Tokenizer.from_str(text), _steps(json.loads(text).get("decoder"))
    added = tokenizer.get_added_tokens_decoder()
    if steps == ["ByteLevel"]:
        tokens = _byte_level(tokenizer, vocab_size)
    elif steps and set(steps) <= _LOCAL:
        tokens = _decoded(tokenizer, vocab_size, byte_fallback="ByteFallback" in steps)
    else:
        tokens = None
    if tokens is None:
        return None
    special = {token_id for token_id, token in added.items() if token.special} | set(eos_ids)
    for token_id in special:
        tokens[token_id] = (tokenizer.id_to_token(token_id) or "").encode()
    return TokenTable(tuple(tokens), tuple(sorted(special)))


def _steps(decoder: dict[str, Any] | None) -> list[str]:
    """The types of a decoder's steps, in order."""
    if decoder is None:
        return []
    inner = decoder.get("decoders")
    return [decoder["type"]] if inner is None else [step for one in inner for step in _steps(one)]


def _byte_level(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    alphabet = _alphabet()
    tokens = []
    for token_id in range(vocab_size):
        name = tokenizer.id_to_token(token_id) or ""
        try:
            tokens.append(bytes([alphabet[char] for char in name]))
        except KeyError:  # no stand-ins: it is what it is called
            tokens.append(name.encode())
    return tokens


def _alphabet() -> dict[str, int]:
    """The byte that each stand-in means: characters that print stand for themselves, others for the rest, in order."""
    stand_ins = set(ByteLevel.alphabet())
    rest = iter(sorted(char for char in stand_ins if ord(char) > 0xFF))
    return {(chr(byte) if chr(byte) in stand_ins else next(rest)): byte for byte in range(256)}


def _decoded(tokenizer: Tokenizer, vocab_size: int, *, byte_fallback: bool) -> list[bytes] | None:
    anchor = next((i for i in range(vocab_size) if _is_anchor(tokenizer, i)), None)
    if anchor is None:
        return None
    before, tokens = len(tokenizer.decode([anchor])), []
    for token_id in range(vocab_size):
        name = tokenizer.id_to_token(token_id)
        if name is None:
            tokens.append(b"")
        elif byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            tokens.append(bytes([int(match[1], 16)]))
        else:
            tokens.append(tokenizer.decode([anchor, token_id], skip_special_tokens=False)[before:].encode())
    return tokens


def _is_anchor(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether it is a letter that stays what it is, whatever follows."""
    text = tokenizer.decode([token_id])
    return len(text) == 1 and text.isascii() and text.isalpha()
