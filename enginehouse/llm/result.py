"""A request on its way: to be waited for, iterated, awaited or cancelled."""

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from enginehouse.llm.outputs import CompletionOutput, RequestOutput, token_logprobs
from enginehouse.llm.stream import Stream


class GenerationResult:
    """What `generate_async` gives at once, while tokens are still to come.

    `.result()` and `await` give the whole output. Iterating, with `for` or `async for`, gives it as it grows if it is
    streamed (each output is a new object; steps that the reader was too slow for come as one), and once, whole, if not.
    The attributes of RequestOutput are here, too, as they were last read. A request whose result nobody holds any more is
    cancelled.

    Example:
        >>> from enginehouse import LLM, SamplingParams
        >>> with LLM("examples/demo-model") as llm:
        ...     results = [llm.generate_async(prompt) for prompt in ("In the beginning", "And it came")]
        ...     outputs = [result.result(timeout=60) for result in results]
        >>> [output.finished for output in outputs]
        [True, True]
    """

    def __init__(
        self,
        stream: Stream,
        output: RequestOutput,
        *,
        streaming: bool,
        include_stop: bool = False,
        end_id: int | None = None,
        cancel: Callable[[], object],
        keep: object,
    ) -> None:
        """Made by `generate_async`.

        Args:
            output: of the request, with a completion for each that will come.
            keep: what must live as long as the request does.
        """
        self._stream, self._output = stream, output
        self._streaming, self._include_stop, self._end_id = streaming, include_stop, end_id
        self._told: RequestOutput | None = None  # the last that an iteration gave
        self._keep = keep
        self._unseen = self._told_all = False
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._cancel = weakref.finalize(self, cancel)
        self._cancel.atexit = False

    def __repr__(self) -> str:
        return f"GenerationResult(request_id={self.request_id}, finished={self.finished}, outputs={self.outputs})"

    @property
    def request_id(self) -> int:
        """Unique in this process."""
        return self._output.request_id

    @property
    def prompt(self) -> str | None:
        """The prompt's text, if it was one."""
        return self._output.prompt

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt as the model reads it."""
        return self._output.prompt_token_ids

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The completions as the last output had them, or as they were last read."""
        return (self._told or self._output).outputs

    @property
    def finished(self) -> bool:
        """Whether all has been read."""
        return self._output.finished

    def done(self) -> bool:
        """Whether the request has ended, well or not."""
        self._read()
        return self.finished or self._error is not None

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the end.

        Args:
            timeout: seconds; the request goes on when they are over.

        Raises:
            TimeoutError: it has not ended in that time.
            EnginehouseError: what the request has failed with, every time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._complete():
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            news = self._stream.wait()
            try:
                news.result(left)
            except TimeoutError:
                news.cancel()
                raise TimeoutError(
                    f"request {self.request_id} has not ended within {timeout:g} s: wait longer, or cancel() it"
                ) from None
        return self._output

    async def aresult(self) -> RequestOutput:
        """The same in an event loop, any one. To cancel the task that waits does not cancel the request."""
        while not self._complete():
            await asyncio.wrap_future(self._stream.wait())
        return self._output

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        while (output := self._next()) is None:
            self._stream.wait().result()
        if not output:
            raise StopIteration
        return output[0]

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while (output := self._next()) is None:
            await asyncio.wrap_future(self._stream.wait())
        if not output:
            raise StopAsyncIteration
        return output[0]

    def cancel(self) -> None:
        """Ends the request: completions that have not ended have the finish_reason "cancelled". Nothing if it has ended."""
        if not self.done():
            self._cancel()

    def _next(self) -> list[RequestOutput] | None:
        """The next output of an iteration: [output], [] at its end, None if it must wait."""
        if self._told_all:
            return []
        self._read()
        unseen = self._unseen and self._streaming
        if self._error and not unseen:
            self._told_all = True
            raise self._error
        if not (self.finished or unseen):
            return None
        self._told_all = self.finished
        return [self._snapshot()]

    def _complete(self) -> bool:
        self._read()
        if self._error:
            raise self._error
        if self.finished:
            self._told = None
        return self.finished

    def _read(self) -> None:
        """Takes what has come."""
        with self._lock:
            news, output = self._stream.take(), self._output
            for response in news.responses:
                self._unseen = True
                output.outputs[response.index].add(response, self._include_stop, self._end_id)
                output.cached_tokens = response.usage.cached_tokens
                if response.HasField("prompt_logprobs"):
                    output.prompt_logprobs = (output.prompt_logprobs or []) + token_logprobs(response.prompt_logprobs)
            if self.finished or not (news.responses or news.ended):
                return
            output.finished = all(completion.finish_reason for completion in output.outputs)
            if news.ended and not output.finished:
                self._error = news.error
                if news.error is None:
                    for completion in output.outputs:
                        completion.finish_reason = completion.finish_reason or "cancelled"
                    output.finished = True

    def _snapshot(self) -> RequestOutput:
        self._unseen, now = False, self._output
        self._told = RequestOutput(
            now.request_id,
            now.prompt,
            now.prompt_token_ids,
            [completion.snapshot() for completion in now.outputs],
            now.finished,
            now.prompt_logprobs,
            now.cached_tokens,
        )
        return self._told
