"""`enginehouse generate`: a prompt in, text as it comes."""

import asyncio
import json
import re
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from enginehouse.client import GatewayClient, Prompt
from protos.v1.common_pb2 import FinishInfo, FinishReason, SamplingParams, StoppingCriteria, Usage
from protos.v1.gateway_pb2 import GenerateResponse, Model

DEFAULT_MAX_TOKENS = 128
Show = Literal["text", "ids", "nothing"]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to end; None leaves it to the service."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def params(self) -> SamplingParams:
        """The wire's sampling parameters."""
        return SamplingParams(temperature=self.temperature, top_k=self.top_k or 0, top_p=self.top_p, seed=self.seed)

    def criteria(self) -> StoppingCriteria:
        """The wire's stopping criteria."""
        return StoppingCriteria(max_tokens=self.max_tokens)


@dataclass
class Answer:
    """What has come so far. Times are in seconds since the request was sent."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    finish: FinishInfo | None = None
    first_token: float | None = None
    first_count: int = 0
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def add(self, response: GenerateResponse) -> None:
        """Takes the next message of the stream."""
        self.seconds = time.monotonic() - self._began
        self.text += response.text
        self.token_ids += response.token_ids
        if self.first_token is None and response.token_ids:
            self.first_token, self.first_count = self.seconds, len(response.token_ids)
        if response.HasField("usage"):
            self.usage = response.usage
        if response.HasField("finish"):
            self.finish = response.finish

    def rate(self) -> float | None:
        """Tokens a second after the first; None when there were too few to say."""
        later = len(self.token_ids) - self.first_count
        if self.first_token is None or later < 1 or self.seconds <= self.first_token:
            return None
        return later / (self.seconds - self.first_token)

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
        """Everything, on one line."""
        rate = self.rate()
        return json.dumps(
            {
                "model": model,
                "text": self.text,
                "token_ids": self.token_ids,
                "finish": self.reason().split(" ")[0],
                "matched": _matched(self.finish),
                "usage": {
                    "prompt_tokens": self.usage.prompt_tokens,
                    "cached_tokens": self.usage.cached_tokens,
                    "completion_tokens": self.usage.completion_tokens,
                },
                "seconds": round(self.seconds, 4),
                "first_token_seconds": round(self.first_token, 4) if self.first_token is not None else None,
                "tokens_per_second": round(rate, 2) if rate else None,
            },
            ensure_ascii=False,
        )


def run(
    prompt: str,
    sampling: Sampling,
    *,
    model: str | None,
    gateway: str,
    token_ids: bool,
    as_json: bool,
    stats: bool,
) -> None:
    """Streams the answer to stdout; what it took goes to stderr."""
    asyncio.run(_run(parse_prompt(prompt, token_ids), sampling, model, gateway, token_ids, as_json, stats))


async def _run(
    prompt: Prompt, sampling: Sampling, model: str | None, address: str, token_ids: bool, as_json: bool, stats: bool
) -> None:
    async with GatewayClient(address) as gateway:
        name = model or only_model(await gateway.models()).name
        answer = Answer()
        show: Show = "nothing" if as_json else "ids" if token_ids else "text"
        if sampling.max_tokens is None:
            limited = replace(sampling, max_tokens=DEFAULT_MAX_TOKENS)
            try:
                await stream(gateway, name, prompt, limited, answer, show)
            except InvalidArgument as error:
                if error.reason != "CONTEXT_TOO_LONG":
                    raise
                await stream(gateway, name, prompt, sampling, answer, show)  # fewer fit: then as many as do
        else:
            await stream(gateway, name, prompt, sampling, answer, show)
    if as_json:
        print(answer.to_json(name))
    if stats:
        print(answer.stats(), file=sys.stderr)


async def stream(
    gateway: GatewayClient,
    model: str,
    prompt: Prompt,
    sampling: Sampling,
    answer: Answer,
    show: Show = "text",
) -> None:
    """Fills `answer`, and prints it as it comes, with a line break at its end in any case.

    Raises:
        Unavailable: the stream ended without a finish.
    """
    responses = gateway.generate(
        model, prompt, sampling=sampling.params(), stopping=sampling.criteria(), stop=sampling.stop
    )
    printed = "\n" if show == "nothing" else ""
    try:
        async with aclosing(responses):
            async for response in responses:
                answer.add(response)
                if show == "text":
                    printed = write(response.text) or printed
                elif show == "ids":
                    printed = write("".join(f"{token} " for token in response.token_ids)) or printed
    except EnginehouseError:
        printed = printed or "\n"  # there is no line to end
        raise
    finally:
        if not printed.endswith("\n"):
            write("\n")
    if answer.finish is None:
        raise Unavailable(f"the gateway at {gateway.address} ended the stream without a finish")


def write(text: str) -> str:
    """Prints now and without a line break; returns the text."""
    sys.stdout.write(text)
    sys.stdout.flush()
    return text


def only_model(models: list[Model]) -> Model:
    """The one model that executors have loaded. Raises FailedPrecondition, which names them, when there are more."""
    served = [model for model in models if model.ready_executors]
    if not served:
        raise NotFound("no model is loaded: start one with `enginehouse up NAME=CHECKPOINT`", reason="NO_MODEL")
    if len(served) > 1:
        names = ", ".join(model.name for model in served)
        raise FailedPrecondition(f"several models are served: choose one with --model: {names}", reason="MODEL_NEEDED")
    return served[0]


def parse_prompt(prompt: str, token_ids: bool) -> str | list[int]:
    """The text itself, stdin's for "-" (less one line break at its end), or token ids between spaces or commas."""
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"stdin is not UTF-8 text: {error}") from None
    if not token_ids:
        return prompt
    parts = re.split(r"[\s,]+", prompt.strip(" \t\r\n,[]"))
    for part in parts:
        if not (part.isascii() and part.isdigit() and int(part) < 2**32):
            raise InvalidArgument(f"{part!r} is no token id: with --token-ids the prompt is numbers, such as '12 345'")
    return [int(part) for part in parts]


def _matched(finish: FinishInfo | None) -> int | str | None:
    kind = finish.WhichOneof("matched") if finish else None
    return getattr(finish, kind) if kind else None
