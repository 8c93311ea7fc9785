"""What a gateway has answered so far: completions, log-probabilities, usage, times."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from protos.v1.common_pb2 import FinishInfo, FinishReason, Logprobs, Usage
from protos.v1.gateway_pb2 import GenerateResponse


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and those of the most probable tokens in its place, the most probable first.

    Attributes:
        token_id: None for a token of the prompt, until `Answer.name_prompt` has said which they are.
    """

    token_id: int | None
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        top = [{"token_id": token_id, "logprob": round(logprob, 6)} for token_id, logprob in self.top]
        return {"token_id": self.token_id, "logprob": round(self.logprob, 6), "top": top}


def rows(logprobs: Logprobs, token_ids: list[int] | None = None) -> Iterator[TokenLogprob]:
    """A message's columns, token by token."""
    for place, logprob in enumerate(logprobs.logprobs):
        part = slice(place * logprobs.top, (place + 1) * logprobs.top)
        top = zip(logprobs.top_token_ids[part], logprobs.top_logprobs[part], strict=True)
        yield TokenLogprob(token_ids[place] if token_ids else None, logprob, tuple(top))


@dataclass
class Completion:
    """One text. With --echo the prompt is part of text and token_ids, but not of logprobs."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: FinishInfo | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cumulative_logprob: float | None = None

    def add(self, response: GenerateResponse) -> None:
        """Takes the next message."""
        self.text += response.text
        self.token_ids += response.token_ids
        if response.HasField("logprobs"):
            self.logprobs += rows(response.logprobs, list(response.token_ids))
        if response.HasField("cumulative_logprob"):
            self.cumulative_logprob = response.cumulative_logprob
        if response.HasField("finish"):
            self.finish = response.finish

    def reason(self) -> str:
        """Why it ended: "length", "stop (end of text)", 'stop ("###")'."""
        if self.finish is None:
            return "unknown"
        name = FinishReason.Name(self.finish.reason).removeprefix("FINISH_REASON_").lower()
        matched = self.finish.WhichOneof("matched")
        if matched == "eos_token_id":
            return f"{name} (end of text)"
        if matched == "stop_token_id":
            return f"{name} (token {self.finish.stop_token_id})"
        return f"{name} ({json.dumps(self.finish.stop_string)})" if matched else name

    def to_json(self) -> dict[str, Any]:
        """For --json; log-probabilities where they were asked for."""
        kind = self.finish.WhichOneof("matched") if self.finish else None
        told: dict[str, Any] = {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish": self.reason().split(" ")[0],
            "matched": getattr(self.finish, kind) if kind else None,
        }
        if self.cumulative_logprob is not None:
            told["cumulative_logprob"] = round(self.cumulative_logprob, 6)
        if self.logprobs:
            told["logprobs"] = [row.to_json() for row in self.logprobs]
        return told


@dataclass
class Answer:
    """All completions of a request. Times are in seconds since it was sent."""

    completions: list[Completion] = field(default_factory=lambda: [Completion()])
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    first_token: float | None = None
    first_count: int = 0
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        """Of the first completion."""
        return self.completions[0].text

    def add(self, response: GenerateResponse) -> Completion:
        """Takes the next message of the stream; the completion that it is of."""
        self.seconds = time.monotonic() - self._began
        while response.index >= len(self.completions):
            self.completions.append(Completion())
        completion = self.completions[response.index]
        completion.add(response)
        self.prompt_logprobs += rows(response.prompt_logprobs)
        if response.HasField("usage"):
            self.usage = response.usage
        if self.first_token is None and self.usage.completion_tokens:
            self.first_token, self.first_count = self.seconds, self.usage.completion_tokens
        return completion

    def name_prompt(self, token_ids: Sequence[int]) -> None:
        """Says of which tokens the prompt's log-probabilities are: of all but the first."""
        named = zip(self.prompt_logprobs, token_ids[1:], strict=False)
        self.prompt_logprobs = [replace(row, token_id=token_id) for row, token_id in named]

    def finished(self) -> bool:
        """Whether each completion has said how it ended."""
        return all(completion.finish is not None for completion in self.completions)

    def rate(self) -> float | None:
        """Tokens a second after the first; None when there were too few to say."""
        later = self.usage.completion_tokens - self.first_count
        if self.first_token is None or later < 1 or self.seconds <= self.first_token:
            return None
        return later / (self.seconds - self.first_token)

    def reason(self) -> str:
        """Why it ended, once for each reason."""
        return ", ".join(dict.fromkeys(completion.reason() for completion in self.completions))

    def stats(self) -> str:
        """One line for a person."""
        rate, first = self.rate(), self.first_token
        speed = f" ({rate:.1f} tokens/s)" if rate else ""
        wait = f", first token after {first * 1000:.0f} ms" if first is not None else ""
        cached = f" ({self.usage.cached_tokens} cached)" if self.usage.cached_tokens else ""
        return (
            f"{self.usage.completion_tokens} tokens in {self.seconds:.2f} s{speed}{wait}; "
            f"prompt {self.usage.prompt_tokens} tokens{cached}; finish: {self.reason()}"
        )

    def to_json(self, model: str) -> str:
        """Everything, on one line: the first completion, and all of them as `completions` where there are several."""
        rate = self.rate()
        told: dict[str, Any] = {"model": model, **self.completions[0].to_json()}
        if len(self.completions) > 1:
            told["completions"] = [completion.to_json() for completion in self.completions]
        if self.prompt_logprobs:
            told["prompt_logprobs"] = [row.to_json() for row in self.prompt_logprobs]
        told |= {
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "cached_tokens": self.usage.cached_tokens,
                "completion_tokens": self.usage.completion_tokens,
            },
            "seconds": round(self.seconds, 4),
            "first_token_seconds": round(self.first_token, 4) if self.first_token is not None else None,
            "tokens_per_second": round(rate, 2) if rate else None,
        }
        return json.dumps(told, ensure_ascii=False)
