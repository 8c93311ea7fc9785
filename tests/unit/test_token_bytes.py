"""The table of token bytes against the text that the gateway makes of the same tokens."""

from pathlib import Path

import pytest
from tokenizer_files import CORPUS, KINDS, TEXTS
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from builder_svc.token_bytes import engine_files, token_table
from builder_svc.tokenizer import normalize
from engine.errors import FailedPrecondition
from engine.token_table import FILE, TokenTable
from gateway.tokenizer import Tokenizer, TokenizerConfig

ROWS = 2000  # of logits, more than any tokenizer here has tokens


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_text(kind: str, tmp_path: Path) -> None:
    """Behind a prompt, as a completion stands there; special tokens are no text."""
    KINDS[kind](tmp_path)
    made = normalize(tmp_path, ROWS)
    served = Tokenizer(made.tokenizer_json, TokenizerConfig.from_json(made.config_json))
    files = engine_files(made, ROWS, (7,))
    table = TokenTable.from_bytes(files.pop(FILE))
    assert files == made.files()
    assert len(table.tokens) == ROWS
    library = Library.from_str(made.tokenizer_json.decode())
    added = library.get_added_tokens_decoder()
    assert set(table.special) == {i for i, token in added.items() if token.special} | {7}
    assert not any(table.tokens[library.get_vocab_size(with_added_tokens=True) :])
    prompt = served.encode("x", add_special_tokens=False)
    for text in [*TEXTS, *CORPUS]:
        ids = [i for i in served.encode(text, add_special_tokens=False) if i not in table.special]
        detokenizer = served.detokenizer(prompt, skip_special_tokens=True)
        told = detokenizer.push(ids) + detokenizer.flush()
        assert b"".join(table.tokens[i] for i in ids).decode() == told, text


def test_special_tokens_have_their_names(tmp_path: Path) -> None:
    KINDS["llama3"](tmp_path)
    made = normalize(tmp_path, ROWS)
    table = token_table(made.tokenizer_json, ROWS, ())
    assert table is not None
    assert {table.tokens[i] for i in table.special} == {b"<s>", b"</s>", b"<|im_start|>", b"<|im_end|>"}


@pytest.mark.parametrize("decoder", [None, decoders.BPEDecoder(), decoders.CTC()])
def test_a_token_whose_text_depends_on_what_follows_has_no_bytes(decoder: object) -> None:
    tokenizer = Library(models.BPE({"a": 0, "b": 1}, []))
    if decoder:
        tokenizer.decoder = decoder
    assert token_table(tokenizer.to_str().encode(), 2, ()) is None


def test_without_a_tokenizer_there_is_nothing() -> None:
    assert engine_files(None, ROWS, (1,)) == {}


@pytest.mark.parametrize("data", [b"", b"\x81", TokenTable((b"a",), (1,)).to_bytes()])
def test_a_damaged_table_is_refused(data: bytes) -> None:
    with pytest.raises(FailedPrecondition, match="build the engine again"):
        TokenTable.from_bytes(data)
