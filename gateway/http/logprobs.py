"""Log-probabilities in the two forms of OpenAI's API."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gateway.tokenizer import Tokenizer
from protos.v1.common_pb2 import Logprobs


class Row(NamedTuple):
    """One token's; `top` has the most probable ones, the best first."""

    token_id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


def rows(token_ids: Sequence[int], logprobs: Logprobs) -> Iterator[Row]:
    """Of tokens that are aligned with them."""
    for at, (token_id, logprob) in enumerate(zip(token_ids, logprobs.logprobs, strict=False)):
        part = slice(at * logprobs.top, (at + 1) * logprobs.top)
        yield Row(token_id, logprob, list(zip(logprobs.top_token_ids[part], logprobs.top_logprobs[part], strict=True)))


class ChatLogprobs:
    """Those of chats: {"content": [{"token", "logprob", "bytes", "top_logprobs"}, ...]}."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def show(self, found: Sequence[Row]) -> dict[str, Any]:
        """Of some tokens."""
        return {
            "content": [
                {**self._token(row.token_id, row.logprob), "top_logprobs": [self._token(*one) for one in row.top]}
                for row in found
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


class TextLogprobs:
    """Those of completions, in columns; counts where each token begins in its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.restart()

    def restart(self) -> None:
        """The next token is the text's first."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def show(self, found: Sequence[Row]) -> dict[str, Any]:
        """Of the next tokens."""
        offsets = []
        for row in found:
            offsets.append(self._offset)
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(row.token_id)))
        return {
            "tokens": [self._text(row.token_id) for row in found],
            "token_logprobs": [_finite(row.logprob) for row in found],
            "top_logprobs": [self._top(row) for row in found],
            "text_offset": offsets,
        }

    def _top(self, row: Row) -> dict[str, float | None] | None:
        """Of several tokens with the same text, such as halves of a character, the best."""
        return {self._text(token): _finite(logprob) for token, logprob in reversed(row.top)} or None

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI's API says -9999 for what is all but impossible."""
    return None if logprob is None else max(logprob, -9999.0)
