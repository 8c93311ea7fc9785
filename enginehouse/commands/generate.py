"""`enginehouse generate`: a prompt in, text as it comes."""

import asyncio
import re
import sys
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from enginehouse.answer import Answer, Completion
from enginehouse.client import GatewayClient, Prompt
from enginehouse.commands.logprobs import print_logprobs
from protos.v1.common_pb2 import (
    BeamSearch,
    EarlyStopping,
    GuidedDecoding,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
)
from protos.v1.gateway_pb2 import GenerateResponse, Model

DEFAULT_MAX_TOKENS = 128
Show = Literal["text", "ids", "nothing"]


@dataclass(frozen=True)
class Choices:
    """What a person has chosen by options; None leaves it to the service."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    priority: int = 0
    n: int | None = None
    best_of: int | None = None
    beams: int | None = None
    length_penalty: float | None = None
    early_stopping: str | None = None
    diversity_rate: float | None = None
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guided_decoding: GuidedDecoding | None = None

    def arguments(self) -> dict[str, Any]:
        """For `GatewayClient.generate`."""
        sampling = SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            min_p=self.min_p or 0,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0,
            frequency_penalty=self.frequency_penalty or 0,
            logit_bias=dict(self.logit_bias),
            seed=self.seed,
        )
        stopping = StoppingCriteria(
            max_tokens=self.max_tokens, min_tokens=self.min_tokens or 0, ignore_eos=self.ignore_eos
        )
        beams = None
        if self.beams:
            early = f"EARLY_STOPPING_{(self.early_stopping or 'unspecified').upper()}"
            beams = BeamSearch(
                width=self.beams,
                length_penalty=self.length_penalty,
                early_stopping=EarlyStopping.Value(early),
                diversity_rate=self.diversity_rate or 0.0,
            )
        return {
            "sampling": sampling,
            "stopping": stopping,
            "stop": self.stop,
            "output": OutputOptions(logprobs=self.logprobs, prompt_logprobs=self.prompt_logprobs),
            "n": self.n,
            "best_of": self.best_of,
            "beam_search": beams,
            "echo": self.echo,
            "bad_words": self.bad_words,
            "guided_decoding": self.guided_decoding,
            "priority": self.priority,
        }


def run(
    prompt: str,
    choices: Choices,
    *,
    model: str | None,
    gateway: str,
    token_ids: bool,
    as_json: bool,
    stats: bool,
) -> None:
    """Streams the answer to stdout; what it took, and log-probabilities, go to stderr."""
    asyncio.run(_run(parse_prompt(prompt, token_ids), choices, model, gateway, as_json, stats))


async def _run(
    prompt: str | list[int], choices: Choices, model: str | None, address: str, as_json: bool, stats: bool
) -> None:
    async with GatewayClient(address) as gateway:
        name = model or only_model(await gateway.models()).name
        answer = Answer()
        show: Show = "nothing" if as_json else "text" if isinstance(prompt, str) else "ids"
        if choices.max_tokens is None:
            limited = replace(choices, max_tokens=max(DEFAULT_MAX_TOKENS, choices.min_tokens or 0))
            try:
                await stream(gateway, name, prompt, limited, answer, show)
            except InvalidArgument as error:
                if error.reason != "CONTEXT_TOO_LONG":
                    raise
                await stream(gateway, name, prompt, choices, answer, show)  # fewer fit: then as many as do
        else:
            await stream(gateway, name, prompt, choices, answer, show)
        if answer.prompt_logprobs:
            answer.name_prompt(await gateway.tokenize(name, prompt) if isinstance(prompt, str) else prompt)
        if as_json:
            print(answer.to_json(name))
        else:
            await print_logprobs(gateway, name, answer)
    if stats:
        print(answer.stats(), file=sys.stderr)


async def stream(
    gateway: GatewayClient,
    model: str,
    prompt: Prompt,
    choices: Choices,
    answer: Answer,
    show: Show = "text",
) -> None:
    """Fills `answer`, and prints it as it comes, with a line break at its end in any case.

    Raises:
        Unavailable: the stream ended without a finish.
    """
    count = choices.n or 1
    screen = _Screen(show, count)
    try:
        async with aclosing(gateway.generate(model, prompt, **choices.arguments())) as responses:
            async for response in responses:
                screen.show(response, answer.add(response))
    except EnginehouseError:
        screen.printed = screen.printed or "\n"  # there is no line to end
        raise
    finally:
        if not screen.printed.endswith("\n"):
            write("\n")
    if len(answer.completions) < count or not answer.finished():
        raise Unavailable(f"the gateway at {gateway.address} ended the stream without a finish")


class _Screen:
    """Prints completions one after another: the first as it comes, of the others what has come meanwhile behind it.

    Attributes:
        printed: what was printed last.
    """

    def __init__(self, show: Show, count: int) -> None:
        self.printed = "\n" if show == "nothing" else ""
        self._show, self._count = show, count
        self._current = -1
        self._ended: set[int] = set()
        self._waiting: dict[int, str] = {}

    def show(self, response: GenerateResponse, completion: Completion) -> None:
        """Prints what is new, as far as all completions before it have ended."""
        if self._show == "nothing":
            return
        ids = "".join(f"{token} " for token in response.token_ids)
        self._waiting[response.index] = self._waiting.get(response.index, "") + (
            ids if self._show == "ids" else response.text
        )
        if completion.finish is not None:
            self._ended.add(response.index)
        while self._current < 0 or (self._current in self._ended and self._current + 1 < self._count):
            self._write(self._waiting.pop(self._current, ""))
            self._begin(self._current + 1)
        self._write(self._waiting.pop(self._current, ""))

    def _begin(self, index: int) -> None:
        self._current = index
        if self._count > 1:
            line = "" if self.printed.endswith("\n") or index == 0 else "\n"
            self._write(f"{line}--- {index + 1} of {self._count} ---\n")

    def _write(self, text: str) -> None:
        self.printed = write(text) or self.printed


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
