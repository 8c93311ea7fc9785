"""Tokenizers in one form: tokenizer.json, and a tokenizer_config.json of three fields."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from builder_svc.checkpoint.huggingface import read_json
from engine.errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True)
class NormalizedTokenizer:
    """What an engine carries of a tokenizer.

    Attributes:
        tokenizer_json: for the `tokenizers` library.
        config_json: {"bos_token": str or null, "eos_token": str or null, "chat_template": str or null}.
    """

    tokenizer_json: bytes
    config_json: bytes

    def files(self) -> dict[str, bytes]:
        """By name, as engines and saved checkpoints have them."""
        return {"tokenizer.json": self.tokenizer_json, "tokenizer_config.json": self.config_json}


_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")


def has_tokenizer(path: Path) -> bool:
    """Whether a directory has files of a tokenizer, whatever they are worth."""
    return any(file.is_file() for pattern in _FILES for file in path.glob(pattern))


def normalize(path: Path, vocab_size: int) -> NormalizedTokenizer:
    """The tokenizer of a checkpoint directory.

    Raises:
        FailedPrecondition: there is none, or none that can be brought into this form.
        InvalidArgument: its files are damaged, or it makes token ids that the model does not have.
    """
    file = path / "tokenizer.json"
    data = file.read_bytes() if file.is_file() else _convert(path)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise InvalidArgument(
            f"{file} is no tokenizer ({error}): download it again", reason="TOKENIZER_INVALID"
        ) from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise InvalidArgument(
            f"{file} has token id {largest}, but the model's vocab_size is {vocab_size}: they do not belong together, "
            "take the tokenizer.json of these weights",
            reason="TOKENIZER_MISMATCH",
        )
    config_file = path / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    fields = {
        "bos_token": _content(config.get("bos_token")),
        "eos_token": _content(config.get("eos_token")),
        "chat_template": _chat_template(path, config),
    }
    return NormalizedTokenizer(data, json.dumps(fields, ensure_ascii=False, indent=1).encode())


def _convert(path: Path) -> bytes:
    """tokenizer.json from the older formats that transformers reads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False, local_files_only=True)
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            return (Path(directory) / "tokenizer.json").read_bytes()
    except Exception as error:
        raise FailedPrecondition(
            f"{path} holds no tokenizer.json, and its tokenizer could not be converted ({type(error).__name__}: {error}). "
            "Put the model's tokenizer.json beside its config.json",
            reason="TOKENIZER_NOT_FOUND",
        ) from None


def _content(token: Any) -> str | None:
    """A special token's text, which configs give as such or within an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
