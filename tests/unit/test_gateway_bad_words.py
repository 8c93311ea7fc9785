"""Bad words as the token sequences that write them, for tokenizers that see words differently."""

import pytest
from gateway_harness import byte_level
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.errors import InvalidArgument
from gateway.bad_words import bad_token_ids
from gateway.tokenizer import Tokenizer as EngineTokenizer
from gateway.tokenizer import TokenizerConfig


def metaspace(scheme: str = "always") -> Tokenizer:
    """As Llama 2's: a text begins with a space of its own."""
    tokens = ["<unk>", "▁", "▁fox", "fox", "▁the", "f", "o", "x", "|", "▁|", "▁f", "▁fo", "fo"]
    merges = [("▁", "f"), ("▁f", "o"), ("▁fo", "x"), ("f", "o"), ("fo", "x"), ("▁", "|")]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def written(library: Tokenizer, *words: str) -> list[list[str]]:
    tokenizer = EngineTokenizer(library.to_str().encode(), TokenizerConfig())
    return [[library.id_to_token(i) for i in ids] for ids in bad_token_ids(words, tokenizer)]


def test_at_the_beginning_of_a_word_and_within_one() -> None:
    spaced = ["Ġ" + "fox"[0] + "fox"[1:]]
    inner = byte_level().encode("fox", add_special_tokens=False).tokens
    outer = byte_level().encode(" fox", add_special_tokens=False).tokens
    assert written(byte_level(), "fox") == written(byte_level(), " fox")[::-1] == [inner, outer]
    assert "".join(outer) == spaced[0]
    assert written(byte_level(), "fox", "fox", " fox") == [inner, outer]  # each once, and no <s>
    assert written(byte_level(), " ") == [["Ġ"]]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_where_a_tokenizer_puts_a_space_before_any_text(scheme: str) -> None:
    assert sorted(written(metaspace(scheme), "fox")) == [["fox"], ["▁fox"]]


def test_a_word_that_has_no_tokens() -> None:
    empty = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(InvalidArgument, match="the bad word 'fox' has no tokens"):
        written(empty, "fox")
