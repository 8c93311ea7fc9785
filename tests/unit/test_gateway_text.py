"""Detokenizers, stop strings and both together."""

import pytest
from gateway_harness import byte_fallback, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.detokenize import Detokenizer
from gateway.stop import StopMatcher
from gateway.tokenizer import Tokenizer as EngineTokenizer
from gateway.tokenizer import TokenizerConfig
from gateway.transcript import Transcript


def word_piece() -> Tokenizer:
    words = ["[UNK]", "go", "##ing", "##es", "home", ".", "'s"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def suffixed() -> Tokenizer:
    words = ["lo", "hel", "lo</w>", "world</w>", "!</w>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


MAKERS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "word-piece": word_piece, "suffixed": suffixed}
LIBRARY = {kind: make() for kind, make in MAKERS.items()}
ENGINE = {kind: EngineTokenizer(library.to_str().encode(), TokenizerConfig()) for kind, library in LIBRARY.items()}
kinds = pytest.mark.parametrize("kind", MAKERS)


def steps(kind: str, most: int = 40) -> st.SearchStrategy[list[list[int]]]:
    """Token ids of one request, a few at a time; some are in no vocabulary."""
    ids = st.integers(0, LIBRARY[kind].get_vocab_size() + 1)
    return st.lists(st.lists(ids, max_size=5), max_size=most)


def run(detokenizer: Detokenizer, batches: list[list[int]]) -> str:
    return "".join([detokenizer.push(batch) for batch in batches]) + detokenizer.flush()


@kinds
@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_deltas_are_what_decode_says_of_all_tokens(kind: str, data: st.DataObject, skip: bool) -> None:
    batches = data.draw(steps(kind))
    everything = [token_id for batch in batches for token_id in batch]
    expected = LIBRARY[kind].decode(everything, skip_special_tokens=skip)
    assert run(ENGINE[kind].detokenizer([], skip), batches) == expected


@kinds
@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_continuation_is_the_text_of_all_less_that_of_the_prompt(kind: str, data: st.DataObject, skip: bool) -> None:
    library = LIBRARY[kind]
    words = [n for n in range(library.get_vocab_size()) if library.decode([n]).isascii() and library.decode([n])]
    prompt = [*sum(data.draw(steps(kind, 2)), []), data.draw(st.sampled_from(words))]
    if kind == "byte-fallback":
        prompt.append(library.token_to_id("▁hello"))  # a prompt that ends within a run of bytes has no text of its own
    batches = data.draw(steps(kind))
    everything = prompt + [token_id for batch in batches for token_id in batch]
    before = library.decode(prompt, skip_special_tokens=skip)
    after = library.decode(everything, skip_special_tokens=skip)
    assert before + run(ENGINE[kind].detokenizer(prompt, skip), batches) == after


@kinds
@settings(deadline=None)
@given(data=st.data())
def test_how_tokens_are_bundled_does_not_matter(kind: str, data: st.DataObject) -> None:
    batches = data.draw(steps(kind))
    stops = data.draw(st.lists(st.text("helo w!\ufffd", min_size=1, max_size=3), max_size=3))
    single = [[token_id] for batch in batches for token_id in batch]
    outcomes = []
    for way in (batches, single, [sum(batches, [])]):
        transcript = Transcript(ENGINE[kind].detokenizer([], True), stops)
        text, count = "", 0
        for batch in way:
            kept, piece = transcript.push(batch)
            text, count = text + piece, count + len(kept)
            if transcript.matched:
                break
        else:
            text += transcript.flush()
        outcomes.append((text, count, transcript.matched))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_character_split_over_tokens_comes_whole() -> None:
    ids = LIBRARY["byte-level"].encode("a😀b", add_special_tokens=False).ids
    assert len(ids) == 6
    detokenizer = ENGINE["byte-level"].detokenizer([], True)
    assert [detokenizer.push([token_id]) for token_id in ids] == ["a", "", "", "", "😀", "b"]
    assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_is_flushed() -> None:
    ids = LIBRARY["byte-level"].encode("a😀", add_special_tokens=False).ids[:-1]
    detokenizer = ENGINE["byte-level"].detokenizer([], True)
    assert "".join(detokenizer.push([token_id]) for token_id in ids) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_the_first_word_keeps_its_space_behind_a_prompt_and_loses_it_at_the_beginning() -> None:
    hello, world, bos = (LIBRARY["byte-fallback"].token_to_id(token) for token in ("▁hello", "▁world", "<s>"))
    tokenizer = ENGINE["byte-fallback"]
    assert tokenizer.detokenizer([bos, hello], True).push([world]) == " world"
    assert tokenizer.detokenizer([hello, bos], True).push([world]) == " world"
    assert tokenizer.detokenizer([bos], True).push([world]) == "world"
    first = tokenizer.detokenizer([bos], True)
    assert [first.push([hello]), first.push([bos]), first.push([world])] == ["hello", "", " world"]


def test_a_run_of_byte_tokens_waits_for_its_end() -> None:
    library, tokenizer = LIBRARY["byte-fallback"], ENGINE["byte-fallback"]
    run_ids = [library.token_to_id(f"<0x{byte:02X}>") for byte in "é😀".encode()]
    detokenizer = tokenizer.detokenizer([], True)
    assert [detokenizer.push([token_id]) for token_id in run_ids] == [""] * 6
    assert detokenizer.push([library.token_to_id("a")]) == "é😀a"


def test_invalid_bytes_for_a_long_time_cost_linear_time() -> None:
    for kind, token in (("byte-level", "ÿ"), ("byte-fallback", "<0xFF>"), ("byte-fallback", "\ufffd")):
        bad = LIBRARY[kind].token_to_id(token)
        detokenizer = ENGINE[kind].detokenizer([], True)
        assert run(detokenizer, [[bad]] * 20_000) == "\ufffd" * 20_000


@settings(deadline=None)
@given(st.text("ab]^", max_size=30), st.lists(st.text("ab]^", min_size=1, max_size=5), min_size=1), st.data())
def test_stop_strings_against_a_search_of_the_whole(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    matcher = StopMatcher(stops)
    out, longest = "", max(map(len, stops))
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += matcher.push(text[begin:end])
        if matcher.matched:
            break
        assert text.startswith(out)
        assert end - len(out) < longest  # no more is held back than could matter
    else:
        out += matcher.flush()
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if found:
        end, _, first = min(found)
        assert (matcher.matched, out) == (first, text[: end - len(first)])
    else:
        assert (matcher.matched, out) == (None, text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("fine\n") == "fine"
    assert matcher.push("so ") == "\nso "
    assert matcher.push("\n\nUse") == ""
    assert matcher.push("d\n") == "\n\nUsed"
    assert matcher.flush() == "\n"
