"""Completions as OpenAI's API shows them: piece by piece, and as a whole."""

from collections.abc import Sequence
from typing import Any, Protocol

from gateway.http.logprobs import ChatLogprobs, Row, TextLogprobs, rows
from gateway.http.tools import FoundCall, ToolCalls
from gateway.tokenizer import Tokenizer
from protos.v1.common_pb2 import FINISH_REASON_LENGTH
from protos.v1.gateway_pb2 import GenerateResponse

Json = dict[str, Any]


class Choice(Protocol):
    """One completion."""

    def push(self, response: GenerateResponse) -> list[Json]:
        """News, as the `choices` of one chunk each."""

    def whole(self) -> Json:
        """All that was pushed, as an answer's choice."""


class TextChoice:
    """Of /v1/completions.

    Args:
        logprobs: whether they were asked for. echo: the prompt comes first, without a finish.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool, echo: bool) -> None:
        self._index = index
        self._logprobs = TextLogprobs(tokenizer) if logprobs else None
        self._echo = echo
        self._prompt: list[int] = []
        self._prompt_rows: list[Row] = []
        self._texts: list[str] = []
        self._rows: list[Row] = []
        self._finish: str | None = None

    def push(self, response: GenerateResponse) -> list[Json]:
        found = list(rows(response.token_ids, response.logprobs))
        if self._echo and self._logprobs:
            if not self._prompt:
                self._prompt, self._prompt_rows = list(response.token_ids), [Row(response.token_ids[0], None, ())]
                self._texts.append(response.text)
                return []  # until its log-probabilities are there, too
            known = len(self._prompt_rows)
            self._prompt_rows += rows(self._prompt[known:], response.prompt_logprobs)
            if not (response.token_ids or response.HasField("finish")):
                return []
            found = self._prompt_rows + found
            text, self._echo = self._texts.pop() + response.text, False
        else:
            text = response.text
        self._texts.append(text)
        self._rows += found
        self._finish = _finish(response)
        shown = self._logprobs.show(found) if self._logprobs else None
        return [{"index": self._index, "text": text, "logprobs": shown, "finish_reason": self._finish}]

    def whole(self) -> Json:
        text = "".join(self._texts)
        logprobs = None
        if self._logprobs:
            self._logprobs.restart()
            logprobs = self._logprobs.show(self._rows)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self._finish}


class ChatChoice:
    """Of /v1/chat/completions.

    Args:
        tag: how the model calls the tools that it was offered, if it was offered any.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool, tag: str | None) -> None:
        self._index = index
        self._logprobs = ChatLogprobs(tokenizer) if logprobs else None
        self._tools = ToolCalls(tag) if tag else None
        self._begun = False
        self._texts: list[str] = []
        self._calls: list[FoundCall] = []
        self._rows: list[Row] = []
        self._finish: str | None = None

    def push(self, response: GenerateResponse) -> list[Json]:
        found = list(rows(response.token_ids, response.logprobs))
        self._rows += found
        deltas = [self._delta(part) for part in self._parts(response)]
        if not self._begun:
            self._begun = True
            deltas = [{"role": "assistant", "content": "", "refusal": None}, *deltas]
        self._finish = _finish(response)
        if self._finish == "stop" and self._calls:
            self._finish = "tool_calls"
        if (found and self._logprobs and not deltas) or self._finish:
            deltas.append({})
        shown: list[Json] = [
            {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if shown:
            shown[-1]["finish_reason"] = self._finish
            if self._logprobs and found:
                shown[-1]["logprobs"] = self._logprobs.show(found)
        return shown

    def whole(self) -> Json:
        text = "".join(self._texts)
        message: Json = {"role": "assistant", "content": text or (None if self._calls else ""), "refusal": None}
        if self._calls:
            message["tool_calls"] = [call.show() for call in self._calls]
        logprobs = self._logprobs.show(self._rows) if self._logprobs else None
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self._finish}

    def _parts(self, response: GenerateResponse) -> Sequence[str | FoundCall]:
        if not self._tools:
            return [response.text] if response.text else []
        parts = self._tools.push(response.text)
        return parts + self._tools.flush() if response.HasField("finish") else parts

    def _delta(self, part: str | FoundCall) -> Json:
        if isinstance(part, str):
            self._texts.append(part)
            return {"content": part}
        self._calls.append(part)
        return {"tool_calls": [{"index": len(self._calls) - 1, **part.show()}]}


def _finish(response: GenerateResponse) -> str | None:
    if not response.HasField("finish"):
        return None
    return "length" if response.finish.reason == FINISH_REASON_LENGTH else "stop"
