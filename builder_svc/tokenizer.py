"""Tokenizers in one form: tokenizer.json, and a tokenizer_config.json of special tokens and chat template.

transformers' AutoTokenizer says what a checkpoint's files mean, because that is what models are used with: which of its files
counts, which class reads it, which tokens tokenizer_config.json adds, whether a text begins with bos_token. What it has read
is written down as tokenizer.json, so that the gateway needs nothing but the `tokenizers` library to encode the same.

`clean_up_tokenization_spaces` is left out. transformers takes the spaces before punctuation out of decoded text where a
checkpoint asks for it, though not for BPE; a stream would have to take back what it has sent.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from builder_svc import qwen_tiktoken
from builder_svc.checkpoint.gguf_file import GgufFile
from builder_svc.checkpoint.huggingface import read_json
from engine.errors import FailedPrecondition, InvalidArgument

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NormalizedTokenizer:
    """What an engine carries of a tokenizer.

    Attributes:
        tokenizer_json: for the `tokenizers` library.
        config_json: {"chat_template": str or null}, and the text of each special token that a template may name, such as
            "bos_token".
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


@dataclass(frozen=True)
class _Loaded:
    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | None


def normalize(path: Path, vocab_size: int, gguf: GgufFile | None = None) -> NormalizedTokenizer:
    """The tokenizer of a checkpoint directory, or of a GGUF file.

    A tokenizer.json beside a GGUF file counts instead of what the file holds: somebody has put it there, and a GGUF names
    the rules by which text is split without having them. The chat template is the GGUF's if the directory has none.

    Args:
        path: the checkpoint's directory.
        vocab_size: the rows of the model's embedding. Added tokens beyond them, such as Gemma 3's of images in its text models,
            are left out: their text is then encoded like any other.
        gguf: the checkpoint, if it is a GGUF file.

    Raises:
        FailedPrecondition: there is none, or none that can be brought into this form.
        InvalidArgument: its files are damaged, or it makes token ids that the model does not have.
    """
    file = path / "tokenizer.json"
    if file.is_file():
        loaded = _read(file)
        if gguf and loaded.chat_template is None:
            loaded = replace(loaded, chat_template=_gguf_template(gguf))
    elif gguf:
        file, loaded = gguf.path, _convert_gguf(gguf)
    else:
        loaded = _convert(path)
    data = _within(vocab_size, loaded, file)
    config = {**loaded.special_tokens, "chat_template": loaded.chat_template}
    return NormalizedTokenizer(data, json.dumps(config, ensure_ascii=False, indent=1).encode())


def _read(file: Path) -> _Loaded:
    """A directory with a tokenizer.json."""
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InvalidArgument(
            f"{file} is no tokenizer ({error}): download it again", reason="TOKENIZER_INVALID"
        ) from None
    config = file.parent / "tokenizer_config.json"
    if config.exists():
        read_json(config)
    try:
        return _transformers(file.parent)
    except Exception as error:
        log.info("transformers has no class for %s (%s): taking it as it stands", file, error)
    try:  # the class is the checkpoint's own code, or unknown
        return _transformers(file.parent, generic=True)
    except Exception as error:
        raise InvalidArgument(
            f"the files beside {file} do not fit it ({type(error).__name__}: {error}): download tokenizer_config.json, "
            "special_tokens_map.json and added_tokens.json again",
            reason="TOKENIZER_INVALID",
        ) from None


def _convert(path: Path) -> _Loaded:
    """The older formats."""
    if (path / qwen_tiktoken.FILE).is_file():
        return _Loaded(*qwen_tiktoken.read(path))
    if not has_tokenizer(path):
        raise FailedPrecondition(
            f"{path} holds no tokenizer. Put the model's tokenizer.json beside its config.json",
            reason="TOKENIZER_NOT_FOUND",
        )
    try:
        return _transformers(path)
    except Exception as error:
        raise FailedPrecondition(
            f"{path} holds no tokenizer.json, and its tokenizer could not be converted ({type(error).__name__}: {error}). "
            "Put the model's tokenizer.json beside its config.json",
            reason="TOKENIZER_NOT_FOUND",
        ) from None


def _gguf_template(gguf: GgufFile) -> str | None:
    """Of a file whose tokenizer is missing or unreadable, too: that is why another one lies beside it."""
    template = gguf.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def _convert_gguf(gguf: GgufFile) -> _Loaded:
    file = gguf.path
    if "tokenizer.ggml.tokens" not in gguf.metadata:
        raise FailedPrecondition(
            f"{file} holds no tokenizer. Put the tokenizer.json and tokenizer_config.json of the model that it was made of "
            "beside it",
            reason="TOKENIZER_NOT_FOUND",
        )
    with tempfile.TemporaryDirectory() as directory:  # transformers would mix it with other files of its directory
        (Path(directory) / file.name).symlink_to(file.resolve())
        try:
            return _transformers(Path(directory), generic=True, gguf_file=file.name)
        except Exception as error:
            raise FailedPrecondition(
                f"the tokenizer in {file} could not be converted ({type(error).__name__}: {error}). Put the tokenizer.json "
                "and tokenizer_config.json of the model that it was made of beside it",
                reason="TOKENIZER_NOT_FOUND",
            ) from None


def _transformers(path: Path, generic: bool = False, **options: Any) -> _Loaded:
    """What transformers reads, executing no code of the checkpoint's.

    Args:
        generic: its class for any tokenizer.json or GGUF, not the one that the checkpoint's configs name.
    """
    from transformers import AutoTokenizer, TokenizersBackend

    reader: Any = TokenizersBackend
    if not generic:
        reader, options["config"] = AutoTokenizer, _model(path)
    with _quiet():
        tokenizer = reader.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    if not isinstance(tokenizer, TokenizersBackend):
        raise TypeError(f"{type(tokenizer).__name__} is written in Python and has no tokenizer.json")
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name; the others are for tools and documents
        template = template.get("default")
    return _Loaded(tokenizer.backend_tokenizer, tokenizer.special_tokens_map, template)


def _model(path: Path) -> Any:
    """What AutoTokenizer asks of a model's config: names. transformers' own configs take 2 s to import, and refuse some files."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    file = path / "config.json"
    values = read_json(file) if file.exists() else {}
    model_type = str(values.get("model_type", ""))
    names = {"model_type": model_type, "tokenizer_class": values.get("tokenizer_class")}
    return type(CONFIG_MAPPING_NAMES.get(model_type, "PreTrainedConfig"), (), names)()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice to its own users."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)


def _within(vocab_size: int, loaded: _Loaded, file: Path) -> bytes:
    """tokenizer.json without the added tokens that the model has no rows for."""
    largest = max(loaded.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    text = loaded.tokenizer.to_str()
    if largest < vocab_size:
        return text.encode()
    data: dict[str, Any] = json.loads(text)
    beyond = {token["content"] for token in data["added_tokens"] if token["id"] >= vocab_size}
    needed = {loaded.special_tokens.get("bos_token"), loaded.special_tokens.get("eos_token")}
    base = {token: i for token, i in loaded.tokenizer.get_vocab(with_added_tokens=False).items() if token not in beyond}
    if beyond & needed or max(base.values(), default=-1) >= vocab_size:
        raise InvalidArgument(
            f"{file} has token id {largest}, but the model's vocab_size is {vocab_size}: they do not belong together, "
            "take the tokenizer.json of these weights",
            reason="TOKENIZER_MISMATCH",
        )
    log.warning("%s: left out, since the model has no rows for them: %s", file, ", ".join(sorted(beyond)))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in beyond]
    if isinstance(data["model"]["vocab"], dict):
        data["model"]["vocab"] = base
    return json.dumps(data, ensure_ascii=False).encode()
