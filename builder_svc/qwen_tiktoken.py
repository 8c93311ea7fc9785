"""Qwen's first tokenizer (`QWenTokenizer`), which others read with the checkpoint's own code: qwen.tiktoken as a tokenizer.json.

The file has a token a line, base64 of its bytes and its rank, which is its id and says when its two parts are joined: a
tiktoken vocabulary (github.com/openai/tiktoken). Patterns, special tokens and the conversation's format are code there.
"""

import base64
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import InvalidArgument

FILE = "qwen.tiktoken"

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
_CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def read(path: Path) -> tuple[Tokenizer, dict[str, str], str]:
    """The tokenizer of a checkpoint directory, its special tokens by name, and its chat template.

    Raises:
        InvalidArgument: the file is damaged.
    """
    ranks = _ranks(path / FILE)
    printable = _printable()
    spelled = {token: "".join(printable[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = _parts(token, ranks)
        if len(parts) == 2:
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    # tiktoken looks a piece of text up as a whole first, which matters for tokens that no two parts make
    tokenizer = Tokenizer(models.BPE({spelled[t]: rank for t, rank in ranks.items()}, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    config = path / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return tokenizer, {"eos_token": _SPECIAL[0], "pad_token": _SPECIAL[0]}, template or _CHAT_TEMPLATE


def _ranks(file: Path) -> dict[bytes, int]:
    """The file's tokens and ranks."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InvalidArgument(
                f"{file}: line {number} is no token and rank: {line[:40]!r}. Download it again",
                reason="TOKENIZER_INVALID",
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise InvalidArgument(f"{file} is incomplete: download it again", reason="TOKENIZER_INVALID")
    return ranks


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What a token is made of last: joins its bytes, lowest rank first, until only the token itself remains to be joined."""
    parts = [token[n : n + 1] for n in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(parts[n] + parts[n + 1], len(ranks)) for n in range(len(parts) - 1)]
        lowest = min(found)
        if lowest >= ranks[token]:
            break
        n = found.index(lowest)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts


def _printable() -> list[str]:
    """What byte-level vocabularies write for each byte: itself where it is printable Latin-1, else a letter from U+0100 on."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]
