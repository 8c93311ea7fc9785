"""An engine's tokenizer: text and conversations to token ids, token ids to text."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import tokenizers

from engine.errors import FailedPrecondition
from gateway.chat import ChatTemplate
from gateway.detokenize import ByteLevelDetokenizer, Detokenizer, Silent, TokenBytes, WindowDetokenizer, piece_bytes


class TokenizerConfig(msgspec.Struct, frozen=True):
    """An engine's tokenizer_config.json.

    Attributes:
        special_tokens: the text of each by the name that chat templates know it by, such as "bos_token".
    """

    chat_template: str | None = None
    special_tokens: dict[str, str] = {}

    @staticmethod
    def from_json(data: bytes) -> "TokenizerConfig":
        """Raises msgspec.MsgspecError for what the builder does not write."""
        fields = msgspec.json.decode(data, type=dict[str, str | None])
        template = fields.pop("chat_template", None)
        return TokenizerConfig(template, {name: token for name, token in fields.items() if token is not None})


class _Decoder(msgspec.Struct):
    type: str = ""
    decoders: list["_Decoder"] = []

    def steps(self) -> list[str]:
        return [step for inner in self.decoders for step in inner.steps()] if self.decoders else [self.type]


class _TokenizerFile(msgspec.Struct):
    """The part of tokenizer.json that decides how tokens become text."""

    decoder: _Decoder | None = None


class Tokenizer:
    """Safe to use from several threads."""

    def __init__(self, file: bytes, config: TokenizerConfig) -> None:
        """Reads tokenizer.json. Raises FailedPrecondition if it is none."""
        try:
            decoder = msgspec.json.decode(file, type=_TokenizerFile).decoder
            self._tokenizer = tokenizers.Tokenizer.from_str(file.decode())
        except Exception as error:  # the library raises bare Exception
            raise FailedPrecondition(
                f"the engine's tokenizer.json cannot be read ({error}): build the engine again",
                reason="TOKENIZER_INVALID",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = config
        special = frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)
        self._left_out = {True: special, False: frozenset[int]()}  # by skip_special_tokens
        self._bytes: dict[bool, TokenBytes] | None = None
        if decoder and decoder.steps() == ["ByteLevel"]:
            self._bytes = {skip: TokenBytes(self._tokenizer, left_out) for skip, left_out in self._left_out.items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with or without such as a beginning-of-sequence token."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """A conversation as text, up to where the assistant speaks; encode it without special tokens.

        Args:
            tools: as `ChatTemplate.render` takes them.

        Raises:
            FailedPrecondition: the model has no chat template, or a broken one.
            InvalidArgument: the template refuses this conversation.
        """
        return self._chat_template.render(messages, tools=tools)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids by themselves."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """One token by itself; half a character where the vocabulary's tokens are bytes."""
        if self._bytes:
            return self._bytes[False][token_id]
        return piece_bytes(self._tokenizer.id_to_token(token_id) or "")

    @property
    def tool_call_tag(self) -> str | None:
        """How the model's template has tools called: "tool_call" for <tool_call>{...}</tool_call>, as Hermes and Qwen do; None
        for one that is not known, or knows of no tools."""
        return "tool_call" if "<tool_call>" in (self._config.chat_template or "") else None

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """For tokens that continue a prompt."""
        if self._bytes:
            return ByteLevelDetokenizer(self._bytes[skip_special_tokens])
        return WindowDetokenizer(self._tokenizer, prompt, self._left_out[skip_special_tokens])

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        config = self._config
        if config.chat_template is None:
            raise FailedPrecondition(
                "the model has no chat template: send text or token ids instead of a chat",
                reason="CHAT_TEMPLATE_MISSING",
            )
        return ChatTemplate(config.chat_template, config.special_tokens)


class NoTokenizer(Tokenizer):
    """Of an engine without one: token ids go in and out, and there is no text."""

    def __init__(self, engine_id: str) -> None:
        self._engine_id = engine_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002
        """Raises FailedPrecondition."""
        raise self._missing("send the prompt as token ids, and no bad words")

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:  # noqa: ARG002
        """Raises FailedPrecondition."""
        raise self._missing("send the prompt as token ids")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:  # noqa: ARG002
        """Raises FailedPrecondition."""
        raise self._missing("its token ids have no text")

    def token_bytes(self, token_id: int) -> bytes:  # noqa: ARG002
        """None."""
        return b""

    @property
    def tool_call_tag(self) -> str | None:
        """None."""
        return None

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer:  # noqa: ARG002
        """Gives no text."""
        return Silent()

    def _missing(self, remedy: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"engine {self._engine_id[:12]} has no tokenizer: {remedy}; or build it of a directory that holds one",
            reason="TOKENIZER_MISSING",
        )
