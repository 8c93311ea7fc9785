"""A tokenizer of the caller's own: any object with encode and decode."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import FailedPrecondition, InvalidArgument
from gateway.detokenize import Detokenizer
from gateway.tokenizer import Tokenizer

_ANCHOR = 6  # tokens before new ones, whose place in a text these need


class GivenTokenizer(Tokenizer):
    """Asks the caller's object.

    Raises:
        InvalidArgument: it has no encode or no decode.
    """

    def __init__(self, given: Any) -> None:
        for method in ("encode", "decode"):
            if not callable(getattr(given, method, None)):
                raise InvalidArgument(
                    f"the tokenizer {given!r} has no {method}: give a directory, or an object with encode(text) and decode(ids)"
                )
        self.given = given
        self._encode, self._encode_takes = given.encode, _takes(given.encode, "add_special_tokens")
        self._decode, self._decode_takes = given.decode, _takes(given.decode, "skip_special_tokens")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Its encode, which is told of special tokens if it wants to know."""
        options = {"add_special_tokens": add_special_tokens} if self._encode_takes else {}
        found = self._encode(text, **options)
        return [int(token) for token in getattr(found, "ids", found)]

    def token_bytes(self, token_id: int) -> bytes:
        """What its decode says of one."""
        return self.decode([token_id], False).encode()

    @property
    def tool_call_tag(self) -> str | None:
        """None: nothing is known of its template."""
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Its apply_chat_template. Raises FailedPrecondition if it has none."""
        apply = getattr(self.given, "apply_chat_template", None)
        if apply is None:
            raise FailedPrecondition(
                "the tokenizer that was given has no apply_chat_template: give text or token ids instead of a conversation",
                reason="CHAT_TEMPLATE_MISSING",
            )
        offered = {"tools": list(tools)} if tools else {}
        return str(apply(list(messages), tokenize=False, add_generation_prompt=True, **offered))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Its decode, which is told of special tokens if it wants to know."""
        options = {"skip_special_tokens": skip_special_tokens} if self._decode_takes else {}
        return str(self._decode(list(token_ids), **options))

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """For tokens that continue a prompt."""
        return _Incremental(lambda token_ids: self.decode(token_ids, skip_special_tokens), prompt)


class _Incremental:
    """Of decode alone: what new tokens add to the text of some before them; held back while it ends in half a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._before = list(prompt[-_ANCHOR:])
        self._waiting: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        self._waiting += token_ids
        text = self.flush()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before = (self._before + self._waiting)[-max(_ANCHOR, len(self._waiting)) :]
        self._waiting = []
        return text

    def flush(self) -> str:
        before = self._decode(self._before) if self._before else ""
        whole = self._decode(self._before + self._waiting)
        return whole[len(before) :]


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin, which does not tell
        return False
    return name in parameters
