"""The completions of one request: sent, followed, ranked, and cancelled when nobody wants them any more."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from gateway.completion import Completion
from gateway.inbox import Delta, Inbox
from gateway.prompt import skip_special
from gateway.submission import num_completions, sibling
from gateway.tokenizer import Tokenizer
from gateway.transcript import Transcript
from protos.v1.common_pb2 import Hypothesis, Usage
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import GenerateRequest, GenerateResponse


class Executor(Protocol):
    """Where requests go: a `failover.Request`, which has many executors, or a worker process of this one."""

    def send(self, submit: Submit, news: asyncio.Event) -> Inbox:
        """Sends a request and gives its inbox, which sets `news`. Raises Unavailable."""

    def cancel(self, inbox: Inbox) -> None:
        """Cancels a request that has not ended; does nothing for one that has."""


class Echo(NamedTuple):
    """The prompt, as it is said before each completion."""

    text: str
    token_ids: Sequence[int]


class Generation:
    """n completions, streamed.

    The first is sent when the context begins. The others follow when the executor has begun with it, and so find the
    prompt in the prefix cache instead of computing it once each. What has not ended when the context ends is cancelled.

    Attributes:
        usage: of all completions together.
        done: each has had its finish.
    """

    def __init__(
        self,
        request: GenerateRequest,
        submit: Submit,
        executor: Executor,
        transcript: Callable[[], Transcript],
        limit: Callable[[Submit], None],
        echo: Echo | None = None,
    ) -> None:
        """A checked request on its way.

        Args:
            submit: for the first completion.
            transcript: makes one for each completion.
            limit: writes into a Submit how much time is left. Raises DeadlineExceeded.
        """
        given, made = num_completions(request)
        self.usage = Usage(prompt_tokens=len(submit.token_ids))
        self.done = False
        self._given = given
        self._completions = [Completion(index, transcript()) for index in range(made)]
        self._num_submits = made
        self._shows_logprobs = request.output.HasField("logprobs")
        self._submit, self._executor, self._limit = submit, executor, limit
        self._news = asyncio.Event()
        self._inboxes: list[Inbox] = []
        self._echo = echo
        self._echoed: set[int] = set()

    def __enter__(self) -> Self:
        self._send()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for inbox in self._inboxes:
            self._executor.cancel(inbox)

    async def wait(self, patience: float = 0) -> None:
        """Waits for news; there may be nothing in them for the client.

        Args:
            patience: seconds in which to let them gather, unless all ends before. Whoever reads no text before its end need
                not be woken for every token.
        """
        await self._news.wait()
        if not patience:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not self._ended:
                    self._news.clear()
                    self._send_siblings()
                    await self._news.wait()

    def take(self) -> list[GenerateResponse]:
        """All news since the last call. Raises what any of the completions has failed with."""
        self._news.clear()
        self._send_siblings()
        self.usage.cached_tokens = self._inboxes[0].cached_tokens
        responses = self._take()
        if self._echo:
            return self._behind_prompt(responses, self._echo)
        return responses

    @property
    def _ended(self) -> bool:
        """Whether nothing more will come."""
        if any(inbox.failed for inbox in self._inboxes):
            return True
        return len(self._inboxes) == self._num_submits and all(inbox.closed for inbox in self._inboxes)

    def _send_siblings(self) -> None:
        """Where the first was refused, the others would be, too: an executor whose queue is full need not hear of them."""
        first = self._inboxes[0]
        if (first.started or first.closed) and not first.failed:
            while len(self._inboxes) < self._num_submits:
                self._send()

    def _take(self) -> list[GenerateResponse]:
        responses = []
        for completion, inbox in zip(self._completions, self._inboxes, strict=False):
            if inbox.pending and completion.finish is None:
                response = completion.respond(inbox.take(), self.usage)
                if completion.finish:
                    self._executor.cancel(inbox)  # where a stop string has ended it, the executor does not know
                    self.done = all(completion.finish for completion in self._completions)
                if not self._shows_logprobs:
                    response.ClearField("logprobs")
                responses.append(response)
        return responses

    def _send(self) -> None:
        submit = sibling(self._submit, len(self._inboxes)) if self._inboxes else self._submit
        self._limit(submit)  # last: what has taken time so far counts
        self._inboxes.append(self._executor.send(submit, self._news))

    def _behind_prompt(self, responses: list[GenerateResponse], echo: Echo) -> list[GenerateResponse]:
        """A message of its own, so that log-probabilities stay aligned with the tokens of theirs."""
        shown = []
        for response in responses:
            if response.index not in self._echoed:
                self._echoed.add(response.index)
                shown.append(
                    GenerateResponse(index=response.index, text=echo.text, token_ids=echo.token_ids, usage=self.usage)
                )
            shown.append(response)
        return shown


class BestOf(Generation):
    """Of best_of completions, the n with the highest mean log-probability a token; the best is number 0."""

    def __enter__(self) -> Self:
        self._kept: list[GenerateResponse] = []
        return super().__enter__()

    def _take(self) -> list[GenerateResponse]:
        self._kept += super()._take()
        if not self.done:
            return []
        best = sorted(self._completions, key=_mean_logprob, reverse=True)[: self._given]
        return [self._whole(completion, place) for place, completion in enumerate(best)]

    def _whole(self, completion: Completion, place: int) -> GenerateResponse:
        parts = [response for response in self._kept if response.index == completion.index]
        whole = GenerateResponse()
        for part in parts:
            whole.MergeFrom(part)
        whole.text, whole.index = "".join(part.text for part in parts), place
        whole.usage.CopyFrom(self.usage)
        whole.ClearField("prompt_logprobs")
        if place == 0:
            for response in self._kept:
                whole.prompt_logprobs.MergeFrom(response.prompt_logprobs)
        return whole


class Beams(Generation):
    """A beam search: one request to the executor, n of its hypotheses to the client, the best first."""

    def __enter__(self) -> Self:
        self._num_submits = 1
        return super().__enter__()

    def _take(self) -> list[GenerateResponse]:
        inbox = self._inboxes[0]
        if not inbox.pending or (delta := inbox.take()).finish is None:
            return []
        missing = [Hypothesis(finish=delta.finish)] * (self._given - len(delta.hypotheses))  # such as when cancelled
        responses = []
        for completion, found in zip(self._completions, [*delta.hypotheses, *missing], strict=False):
            response = completion.respond(Delta(found.token_ids, found.finish), self.usage)
            if found in delta.hypotheses:
                response.cumulative_logprob = found.cumulative_logprob
            responses.append(response)
        for response in responses:
            response.usage.CopyFrom(self.usage)
        self.done = True
        return responses


def _mean_logprob(completion: Completion) -> float:
    if not completion.num_tokens or completion.cumulative_logprob is None:
        return float("-inf")
    return completion.cumulative_logprob / completion.num_tokens


def begin(
    request: GenerateRequest,
    submit: Submit,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    executor: Executor,
    limit: Callable[[Submit], None],
) -> Generation:
    """A checked request as the kind of generation that it asks for, not sent yet.

    Args:
        submit: what `submission` has made of it.
        prompt: its token ids.
        limit: as `Generation` takes it.
    """
    skip = skip_special(request)
    kind, (given, made) = Generation, num_completions(request)
    if request.beam_search.width:
        kind = Beams
    elif made > given:
        kind = BestOf
    echo = (
        Echo(request.text or tokenizer.decode(prompt, skip), prompt) if request.echo else None
    )  # as it was given, or is read
    return kind(
        request, submit, executor, lambda: Transcript(tokenizer.detokenizer(prompt, skip), request.stop), limit, echo
    )
