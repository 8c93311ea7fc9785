"""Normalized tokenizers in the gateway against transformers on the same files: ids, text, text that is streamed."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import regex
from gguf import GGUFWriter
from tokenizer_files import (
    KINDS,
    MARKERS,
    QWEN_SPLIT,
    TEXTS,
    byte_fallback,
    byte_level,
    save,
    write,
    write_gguf,
    write_qwen_tiktoken,
)
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from builder_svc.auto import open_model
from builder_svc.checkpoint.gguf_file import GgufFile
from builder_svc.checkpoint.reader import open_gguf
from builder_svc.tokenizer import normalize
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument
from gateway.tokenizer import Tokenizer, TokenizerConfig
from tests.conftest import save_tokenizer

MANY = 10_000  # rows of an embedding, more than any tokenizer here has ids
ALL = "".join(TEXTS)


def served(path: Path, vocab_size: int = MANY, gguf: Path | None = None) -> Tokenizer:
    """The tokenizer as a gateway has it."""
    made = normalize(path, vocab_size, GgufFile(gguf) if gguf else None)
    return Tokenizer(made.tokenizer_json, TokenizerConfig.from_json(made.config_json))


def config(path: Path, gguf: Path | None = None) -> dict[str, Any]:
    return json.loads(normalize(path, MANY, GgufFile(gguf) if gguf else None).config_json)


def check_equal(ours: Tokenizer, theirs: Any) -> None:
    """Ids with and without special tokens, text with and without them, and the stream of single tokens."""
    for text in [*TEXTS, ALL]:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == ids, text
            for skip in (True, False):
                decoded = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip) == decoded
                check_stream(ours, ids, skip, decoded)


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool, expected: str) -> None:
    """No piece goes beyond what is expected, so that no half character has gone out."""
    detokenizer = tokenizer.detokenizer([], skip)
    text = ""
    for token_id in ids:
        text += detokenizer.push([token_id])
        assert expected.startswith(text)
    assert text + detokenizer.flush() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check_equal(served(tmp_path), theirs)
    found = {name: token for name, token in config(tmp_path).items() if name != "chat_template"}
    assert found == theirs.special_tokens_map


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_does_not_wait(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path)
    tokenizer = served(tmp_path)
    ids = tokenizer.encode(TEXTS[0], False)
    detokenizer = tokenizer.detokenizer([], True)
    for token_id in ids:
        assert detokenizer.push([token_id]) or not tokenizer.decode([token_id], True).strip()
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gguf_equals_transformers(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, kind, template="{{ bos_token }}{{ messages }}")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    (tmp_path / "tokenizer_config.json").write_text("of another model")
    check_equal(served(tmp_path, gguf=file), theirs)
    found = config(tmp_path, gguf=file)
    assert found == {**theirs.special_tokens_map, "chat_template": "{{ bos_token }}{{ messages }}"}
    assert (found["bos_token"], found["eos_token"]) == ("<s>", "</s>")


def test_a_tokenizer_json_beside_a_gguf_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, "llama", template="of the gguf")
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert served(tmp_path, gguf=file).encode(ALL, True) == byte_level().encode(ALL).ids
    assert config(tmp_path, gguf=file)["chat_template"] == "of the gguf"
    (tmp_path / "chat_template.jinja").write_text("of the directory")
    assert config(tmp_path, gguf=file)["chat_template"] == "of the directory"


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([], "model.gguf holds no tokenizer. Put the"), (["a"], "the tokenizer in .*model.gguf could not")],
)
def test_a_tokenizer_json_beside_a_gguf_file_without_one(tokens: list[str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    if tokens:
        writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FailedPrecondition, match=says):
        normalize(tmp_path, MANY, GgufFile(file))
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert config(tmp_path, gguf=file)["chat_template"] is None


def test_a_gguf_without_a_tokenizer_takes_the_one_beside_it(tmp_path: Path) -> None:
    """Whether the file is named or its directory, and with dummy weights, too."""
    gguf_models.make_model(tmp_path / "hf", "Llama", {})
    file = tmp_path / "gguf/model.gguf"
    file.parent.mkdir()
    gguf_models.write_gguf(file, "llama", tmp_path / "hf")
    for dummy in (False, True):
        with pytest.raises(FailedPrecondition, match="Put the tokenizer.json .* beside it"):
            open_model(file, dummy).tokenizer()
    save_tokenizer(file.parent)
    found = [open_model(path, dummy).tokenizer() for path in (file, file.parent) for dummy in (False, True)]
    assert found[0] and found == [found[0]] * 4


def test_qwen_tiktoken(tmp_path: Path) -> None:
    """Against tiktoken's algorithm, which the checkpoint's own code runs."""
    ranks = write_qwen_tiktoken(tmp_path)
    special = ["<|endoftext|>", *MARKERS, *(f"<|extra_{n}|>" for n in range(205))]

    def pieces(text: str) -> list[int]:
        ids = []
        for match in regex.finditer(QWEN_SPLIT, text):
            piece = match.group().encode()
            parts = [piece] if piece in ranks else [piece[n : n + 1] for n in range(len(piece))]
            while True:
                joined = [ranks.get(parts[n] + parts[n + 1], MANY) for n in range(len(parts) - 1)]
                if min(joined, default=MANY) == MANY:
                    break
                n = joined.index(min(joined))
                parts[n : n + 2] = [parts[n] + parts[n + 1]]
            ids += [ranks[part] for part in parts]
        return ids

    tokenizer = served(tmp_path)
    for text in [*TEXTS, ALL, "qzxj<|extra_0|><|extra_204|><|endoftext|>"]:
        expected = []
        for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", unicodedata.normalize("NFC", text)):
            expected += [len(ranks) + special.index(part)] if part in special else pieces(part)
        for add in (True, False):
            assert tokenizer.encode(text, add) == expected
        check_stream(tokenizer, expected, False, unicodedata.normalize("NFC", text))
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    assert tokenizer.render(messages) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *messages[:1]]
    assert tokenizer.render(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.parametrize("spoil", ["", "aGk= x\n", "!!! 0\n", "aGk=\n", "AA== 1\n"])
def test_a_damaged_qwen_tiktoken(spoil: str, tmp_path: Path) -> None:
    write_qwen_tiktoken(tmp_path)
    file = tmp_path / "qwen.tiktoken"
    file.write_text(file.read_text()[: 100 if spoil else 0] + "\n" + spoil)
    with pytest.raises(InvalidArgument, match="qwen.tiktoken") as error:
        normalize(tmp_path, MANY)
    assert error.value.reason == "TOKENIZER_INVALID"


TEMPLATE_FILES: dict[str, tuple[dict[str, Any], dict[str, str], str | None]] = {
    "a string in tokenizer_config.json": ({"chat_template": "one"}, {}, "one"),
    "several by name": (
        {"chat_template": [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "no"}]},
        {},
        "two",
    ),
    "several, none the default": ({"chat_template": [{"name": "rag", "template": "no"}]}, {}, None),
    "a file, which counts before tokenizer_config.json": (
        {"chat_template": "no"},
        {"chat_template.jinja": "three\n"},
        "three\n",
    ),
    "a file and a directory of others": (
        {},
        {"chat_template.jinja": "four", "additional_chat_templates/tool_use.jinja": "no"},
        "four",
    ),
    "a directory alone": ({}, {"additional_chat_templates/default.jinja": "five"}, "five"),
    "none": ({}, {}, None),
}


@pytest.mark.parametrize("where", TEMPLATE_FILES)
def test_where_chat_templates_are_found(where: str, tmp_path: Path) -> None:
    fields, files, expected = TEMPLATE_FILES[where]
    save(tmp_path, byte_level(), "llama", tokenizer_class="PreTrainedTokenizerFast", **fields)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert config(tmp_path)["chat_template"] == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if expected is not None:
        assert theirs.get_chat_template() == expected


def test_the_checkpoints_own_code_is_not_run(tmp_path: Path) -> None:
    code = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    (tmp_path / "tokenization_own.py").write_text(code)
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    save(tmp_path, byte_level(), "own", bos_token="<s>", **own)
    assert served(tmp_path).encode(ALL, True) == byte_level(special=[*MARKERS, "<s>"]).encode(ALL).ids
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FailedPrecondition, match="holds no tokenizer.json, and its tokenizer could not be converted"):
        normalize(tmp_path, MANY)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_added_tokens_beyond_the_embedding_are_left_out(in_vocabulary: bool, tmp_path: Path) -> None:
    tokenizer = byte_fallback(prefix=False)
    size = tokenizer.get_vocab_size()
    without = tokenizer.encode("a <image> b").ids
    if in_vocabulary:
        data = json.loads(tokenizer.to_str())
        data["model"]["vocab"]["<image>"] = size
        tokenizer = Library.from_str(json.dumps(data))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    save(tmp_path, tokenizer, "gemma3_text", tokenizer_class="PreTrainedTokenizerFast", image_token="<image>")
    assert served(tmp_path, size + 1).encode("a <image> b", True) != without
    assert served(tmp_path, size).encode("a <image> b", True) == without
    for reason in ("eos_token", "bos_token"):
        save(tmp_path, tokenizer, "gemma3_text", tokenizer_class="PreTrainedTokenizerFast", **{reason: "<image>"})
        with pytest.raises(InvalidArgument, match=f"token id {size}, but the model's vocab_size is {size}"):
            normalize(tmp_path, size)
    with pytest.raises(InvalidArgument, match=f"token id {size}, but the model's vocab_size is {size - 1}"):
        normalize(tmp_path, size - 1)


@pytest.mark.parametrize(
    ("files", "kind", "reason", "says"),
    [
        ({}, FailedPrecondition, "TOKENIZER_NOT_FOUND", "Put the model's tokenizer.json beside"),
        ({"tokenizer.model": "x"}, FailedPrecondition, "TOKENIZER_NOT_FOUND", "could not be converted"),
        ({"tokenizer.json": "{}"}, InvalidArgument, "TOKENIZER_INVALID", "tokenizer.json is no tokenizer"),
        ({"model.gguf": "GGUF"}, DataLoss, "WEIGHTS_DAMAGED", "model.gguf is damaged"),
    ],
)
def test_what_cannot_be_normalized(
    files: dict[str, str], kind: type[Exception], reason: str, says: str, tmp_path: Path
) -> None:
    write(tmp_path / "config.json", {"model_type": "llama"})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=says) as error:
        normalize(tmp_path, MANY, open_gguf(tmp_path))
    assert error.value.reason == reason  # type: ignore[attr-defined]


def test_damaged_files_beside_tokenizer_json(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), "llama")
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(InvalidArgument, match="special_tokens_map.json"):
        normalize(tmp_path, MANY)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidArgument, match="tokenizer_config.json is not valid JSON"):
        normalize(tmp_path, MANY)
