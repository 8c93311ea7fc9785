"""Calibration text: read, digested, and cut into sequences of token ids."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from builder_svc.quant_config import BUNDLED, CalibConfig
from engine.errors import FailedPrecondition, InvalidArgument, NotFound

_TEXTS = Path(__file__).parent / "texts"
CALIBRATION, HELD_OUT = _TEXTS / "calibration.txt.gz", _TEXTS / "held_out.txt.gz"
MIN_TOKENS = 2048
"""Of a calibration text. Fewer say too little of what activations are."""
_KINDS = (".txt", ".txt.gz", ".md", ".jsonl")


@dataclass(frozen=True)
class Text:
    """Documents, and the SHA-256 of them all, hexadecimal."""

    documents: tuple[str, ...]
    digest: str
    where: str


def read_text(dataset: str | Path) -> Text:
    """A text file, a .jsonl file or a directory of these, whose files are read in the order of their names.

    Raises:
        NotFound: nothing is there, or nothing of these kinds.
        InvalidArgument: no UTF-8, a line that is no object with "text", or no text at all.
    """
    path = CALIBRATION if dataset == BUNDLED else Path(dataset).expanduser()
    if not path.exists():
        raise NotFound(
            f"calibration data {str(dataset)!r}: no such file or directory; give a text or .jsonl file or a directory of these, "
            "or leave it out for the bundled text",
            reason="CALIBRATION_NOT_FOUND",
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.name.endswith(_KINDS))
    if not files:
        raise NotFound(f"{path} holds no {', '.join(_KINDS)} files", reason="CALIBRATION_NOT_FOUND")
    documents = tuple(document for file in files for document in _documents(file) if document.strip())
    if not documents:
        raise InvalidArgument(f"{path} is empty: give some text to calibrate with", reason="CALIBRATION_EMPTY")
    return Text(documents, hashlib.sha256("\f".join(documents).encode()).hexdigest(), str(path))


def _documents(file: Path) -> Iterator[str]:
    data = file.read_bytes()
    try:
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file} is no UTF-8 text (byte {error.start})", reason="CALIBRATION_INVALID") from None
    if file.suffix != ".jsonl":
        yield from text.split("\f")
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, str):
            raise InvalidArgument(
                f"{file}, line {number}: expected an object with a string 'text'", reason="CALIBRATION_INVALID"
            )
        yield found


class Tokens:
    """A text's tokens, one document after another.

    Attributes:
        ids: int64 [n].
        start: what the tokenizer begins every prompt with.
    """

    def __init__(self, text: Text, tokenizer_files: Mapping[str, bytes] | None) -> None:
        """Raises FailedPrecondition where there is no tokenizer."""
        if not tokenizer_files:
            raise FailedPrecondition(
                "calibration needs the model's tokenizer, and the checkpoint has none: put tokenizer.json beside it",
                reason="TOKENIZER_MISSING",
            )
        tokenizer = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        encoded = tokenizer.encode_batch(list(text.documents), add_special_tokens=False)
        self.ids = torch.tensor([token for one in encoded for token in one.ids], dtype=torch.int64)
        self.start: Sequence[int] = tokenizer.encode("").ids
        self.where = text.where

    def sequences(self, length: int, most: int | None = None, seed: int | None = None) -> Tensor:
        """int64 [count, length]: each begins as prompts do and goes on with tokens that no other one has.

        Args:
            most: how many at most; all by default. The last ones of those that there are may be left out.
            seed: of the choice and order; by default the order of the text.

        Raises:
            InvalidArgument: the text has fewer than MIN_TOKENS tokens, or not enough for one.
        """
        own = max(1, length - len(self.start))
        count = len(self.ids) // own
        if len(self.ids) < MIN_TOKENS or not count:
            raise InvalidArgument(
                f"{self.where} has {len(self.ids)} tokens, fewer than the {max(MIN_TOKENS, own)} that are needed: give more text",
                reason="CALIBRATION_TOO_SHORT",
            )
        rows = self.ids[: count * own].view(count, own)
        if seed is not None:
            rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
        rows = rows[:most]
        start = torch.tensor(self.start[: length - own], dtype=torch.int64)
        return torch.cat((start.expand(len(rows), -1), rows), 1)


def sequences(tokens: Tokens, calib: CalibConfig, longest: int) -> Tensor:
    """What a calibration runs on, int64 [samples, tokens]."""
    return tokens.sequences(min(calib.calib_max_seq_length, longest), calib.samples, calib.random_seed)
