"""Tokenizers as checkpoints have them, small: one directory maker for each kind that is in use."""

import base64
import io
import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Scripts, a family of emoji, combining and zero-width characters, code, runs of whitespace, controls.
TEXTS = [
    "Hello world! The quick brown fox doesn't jump; it's 12345 and 3.14 already.",
    "  two leading spaces,   three within\t\ttabs \n\n\n  and trailing  ",
    "def f(x):\n    if x != 0:\r\n        return {'a': [1, 2]}  # comment\n\n",
    "Größe naïve café Ελληνικά Русский עברית العربية हिन्दी ไทย 한국어",
    "你好,世界。日本語のテキスト 𠮷野家",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽🙂🙂 x🙂y",
    "e\u0301 n\u0303 \u1e9b\u0323 a\u200db \u00a0\u2003nbsp \ufeffbom \x00\x07 \ufffd",
    "",
    " ",
    "▁ already ▁▁there Ġ too <0x41> </w> ##ing",
    "<s>system</s><|im_start|>user\nhi<|im_end|> <|im_start|> x <tool> a<tool>b <TOOL> <mask> y",
]
CORPUS = TEXTS[:7] * 3
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace("|\\p{N}|", "|\\p{N}{1,3}|")
NAMED = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARKERS = ["<|im_start|>", "<|im_end|>"]


def save(directory: Path, tokenizer: Tokenizer | None, model_type: str, **config: Any) -> None:
    if tokenizer:
        tokenizer.save(str(directory / "tokenizer.json"))
    write(directory / "config.json", {"model_type": model_type})
    write(directory / "tokenizer_config.json", config)


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@cache
def byte_level_model(split: str | None = None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of 500 tokens, no special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split(split)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return _model(tokenizer)


@cache
def byte_fallback_model() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """<unk>, <s>, </s>, 256 bytes, characters of the first texts alone, merges: others are written in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=650, special_tokens=NAMED + BYTES, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:4], trainer)
    vocab, merges = _model(tokenizer)
    return vocab, merges


def _model(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _split(split: str | None) -> pre_tokenizers.PreTokenizer:
    if split is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), rest])


def byte_level(split: str | None = None, special: list[str] = MARKERS, **options: Any) -> Tokenizer:
    vocab, merges = byte_level_model(split)
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = _split(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def byte_fallback(prefix: bool) -> Tokenizer:
    """As LLaMA 2 and Gemma write them: spaces are normalized to ▁, with one before every text or not."""
    vocab, merges = byte_fallback_model()
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(NAMED)
    return tokenizer


def begins_with(tokenizer: Tokenizer, token: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def gpt2(directory: Path) -> None:
    save(directory, byte_level(special=["<|endoftext|>"]), "gpt2", tokenizer_class="GPT2Tokenizer")


def gpt2_without_tokenizer_json(directory: Path) -> None:
    vocab, merges = byte_level_model()
    save(directory, None, "gpt2", tokenizer_class="GPT2Tokenizer", add_bos_token=True, bos_token="<|endoftext|>")
    write(directory / "vocab.json", {**vocab, "<|endoftext|>": len(vocab)})
    text = "#version: 0.2\n" + "\n".join(f"{left} {right}" for left, right in merges)
    (directory / "merges.txt").write_text(text, encoding="utf-8")


def gpt_neox(directory: Path) -> None:
    """Its added tokens are runs of spaces, not special, and lie in normalized text."""
    tokenizer = byte_level(special=["<|endoftext|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(3, 0, -1)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    save(directory, tokenizer, "gpt_neox", tokenizer_class="GPTNeoXTokenizer")


def llama3(directory: Path) -> None:
    tokenizer = byte_level(LLAMA3_SPLIT, ["<s>", "</s>", *MARKERS], ignore_merges=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": True}
    save(directory, begins_with(tokenizer, "<s>"), "llama", tokenizer_class="PreTrainedTokenizerFast", **names)


def qwen2(directory: Path) -> None:
    tokenizer = byte_level(QWEN_SPLIT, ["<|endoftext|>", *MARKERS])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    save(directory, tokenizer, "qwen3", tokenizer_class="Qwen2Tokenizer", **names)


def only_tokenizer_json(directory: Path) -> None:
    byte_level(LLAMA3_SPLIT).save(str(directory / "tokenizer.json"))
    write(directory / "config.json", {"model_type": "llama"})


def gpt2_of_a_model_type_alone(directory: Path) -> None:
    gpt2_without_tokenizer_json(directory)
    (directory / "tokenizer_config.json").unlink()


def llama_of_a_model_type_alone(directory: Path) -> None:
    byte_fallback(prefix=True).save(str(directory / "tokenizer.json"))
    write(directory / "config.json", {"model_type": "llama"})


def llama2(directory: Path, **config: Any) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    save(directory, begins_with(byte_fallback(prefix=True), "<s>"), "llama", tokenizer_class="LlamaTokenizer", **names)


def llama2_legacy(directory: Path) -> None:
    llama2(directory, legacy=True, add_bos_token=False, add_eos_token=True)


def llama2_without_prefix(directory: Path) -> None:
    llama2(directory, add_prefix_space=False)


def mistral(directory: Path) -> None:
    """As its third version has it."""
    tokenizer = byte_fallback(prefix=True)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False, "add_prefix_space": True}
    save(directory, begins_with(tokenizer, "<s>"), "mistral", tokenizer_class="LlamaTokenizer", **names)


def phi3(directory: Path) -> None:
    """Special tokens that take the whitespace behind them, and a text that begins with none."""
    tokenizer = byte_fallback(prefix=True)
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, normalized=False, special=True) for token in MARKERS])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "add_bos_token": False}
    save(directory, tokenizer, "phi3", tokenizer_class="LlamaTokenizer", legacy=False, **names)


def gemma(directory: Path) -> None:
    tokenizer = byte_fallback(prefix=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    save(directory, begins_with(tokenizer, "<s>"), "gemma2", tokenizer_class="GemmaTokenizer", **names)


def added_tokens(directory: Path) -> None:
    """Tokens that tokenizer_config.json adds to those of tokenizer.json, each with rules of its own."""
    tokenizer = byte_level(special=["<s>", "</s>"])
    first = tokenizer.get_vocab_size()
    rules: list[dict[str, Any]] = [
        {"content": "<|im_start|>", "special": True, "rstrip": True},
        {"content": "<|im_end|>", "special": True, "lstrip": True, "rstrip": True},
        {"content": "<tool>", "special": False, "single_word": True},
        {"content": "<mask>", "special": True, "lstrip": True, "normalized": True},
    ]
    decoder = {
        str(first + n): {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **rule}
        for n, rule in enumerate(rules)
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "added_tokens_decoder": decoder}
    save(directory, begins_with(tokenizer, "<s>"), "llama", tokenizer_class="PreTrainedTokenizerFast", **names)


def older_files_for_tokens(directory: Path) -> None:
    """special_tokens_map.json and added_tokens.json instead of tokenizer_config.json."""
    gpt2_without_tokenizer_json(directory)
    save(directory, None, "gpt2", tokenizer_class="GPT2Tokenizer")
    first = len(byte_level_model()[0]) + 1
    write(directory / "added_tokens.json", {"<|im_start|>": first, "<|im_end|>": first + 1, "<tool>": first + 2})
    marker = {"content": "<|im_end|>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    write(directory / "special_tokens_map.json", {"bos_token": "<|im_start|>", "eos_token": marker})


@cache
def sentencepiece_model(kind: str) -> bytes:
    """A tokenizer.model of 500 pieces with byte fallback, "bpe" or "unigram"."""
    written = io.BytesIO()
    options = {
        "user_defined_symbols": ["<tool>"],
        "character_coverage": 0.98,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable([text.splitlines() or [""] for text in CORPUS[:4]]),
        model_writer=written, vocab_size=500, model_type=kind, byte_fallback=True, normalization_rule_name="identity",
        split_digits=True, remove_extra_whitespaces=False, **options,
    )  # fmt: skip
    return written.getvalue()


def sentencepiece_bpe(directory: Path) -> None:
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    save(directory, None, "llama", tokenizer_class="LlamaTokenizer", legacy=False, **names)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))


def sentencepiece_with_eos(directory: Path) -> None:
    sentencepiece_bpe(directory)
    save(
        directory, None, "llama", tokenizer_class="LlamaTokenizer", legacy=True, add_bos_token=True, add_eos_token=True
    )


def sentencepiece_unigram(directory: Path) -> None:
    save(directory, None, "llama", tokenizer_class="TokenizersBackend")
    (directory / "tokenizer.model").write_bytes(sentencepiece_model("unigram"))


KINDS: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        gpt2, gpt2_without_tokenizer_json, gpt_neox, llama3, qwen2, only_tokenizer_json, gpt2_of_a_model_type_alone,
        llama_of_a_model_type_alone, llama2, llama2_legacy,
        llama2_without_prefix, mistral, phi3, gemma, added_tokens, older_files_for_tokens, sentencepiece_bpe,
        sentencepiece_with_eos, sentencepiece_unigram,
    )
}  # fmt: skip


def write_gguf(file: Path, kind: str, template: str | None = None, architecture: str = "llama") -> None:
    """A GGUF that holds a tokenizer alone: kind "llama" (sentencepiece, scores) or "gpt2" (byte-level, merges)."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model(kind)
    if kind == "llama":
        vocab, merges = byte_fallback_model()
        tokens = sorted(vocab, key=vocab.__getitem__)
        order = {left + right: -float(n) for n, (left, right) in enumerate(merges)}
        types = [2 if n == 0 else 3 if n < 3 else 6 if n < 259 else 1 for n in range(len(tokens))]
        writer.add_token_scores([order.get(token, 0.0) for token in tokens])
        writer.add_add_bos_token(True)
        writer.add_unk_token_id(0)
    else:
        vocab, pairs = byte_level_model(QWEN_SPLIT)
        tokens = [*sorted(vocab, key=vocab.__getitem__), "<s>", "</s>", *MARKERS]
        types = [1] * len(vocab) + [3] * 4
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges([f"{left} {right}" for left, right in pairs])
        writer.add_add_bos_token(False)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_qwen_tiktoken(directory: Path) -> dict[bytes, int]:
    """A Qwen 1 checkpoint's tokenizer; its ranks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {char: byte for byte, char in bytes_to_unicode().items()}
    vocab, _ = byte_level_model(QWEN_SPLIT)
    tokens = [bytes(back[char] for char in token) for token in sorted(vocab, key=vocab.__getitem__)]
    tokens.append(b"qzxj")  # which no two tokens make
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (directory / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    save(
        directory,
        None,
        "qwen",
        tokenizer_class="QWenTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_qwen.Q", None]},
    )
    return {token: rank for rank, token in enumerate(tokens)}
