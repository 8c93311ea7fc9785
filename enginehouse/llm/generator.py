"""From prompts to results, wherever the engine runs."""

import abc
import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self, TypeVar

from engine.errors import InvalidArgument
from enginehouse.llm.outputs import CompletionOutput, RequestOutput
from enginehouse.llm.result import GenerationResult
from enginehouse.llm.sampling import Prompt, SamplingParams
from enginehouse.llm.stream import Stream
from enginehouse.progress import Bars, stderr
from gateway.submission import num_completions
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import GenerateRequest

Params = SamplingParams | Sequence[SamplingParams] | None

_Result = TypeVar("_Result")
_numbers = itertools.count(1)


class LoopThread:
    """An event loop in a thread of its own, which ends with the program or by `stop`."""

    def __init__(self, name: str) -> None:
        started: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

        async def main() -> None:
            stop = asyncio.Event()
            started.put((asyncio.get_running_loop(), stop))
            await stop.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(main()), name=name, daemon=True)
        self._thread.start()
        self._loop, self._stop = started.get()

    def call(self, action: Callable[..., object], *arguments: object) -> None:
        """Calls it there, soon. Raises RuntimeError when the loop has ended."""
        self._loop.call_soon_threadsafe(action, *arguments)

    def submit(self, work: Coroutine[Any, Any, _Result]) -> "Future[_Result]":
        """Runs a coroutine there."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise

    @property
    def inside(self) -> bool:
        """Whether this is that thread."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """Cancels what runs there, and waits for its end unless it is called there."""
        self.call(self._stop.set)
        if not self.inside:
            self._thread.join(timeout=10)


@dataclass
class Job:
    """A checked request, not sent yet.

    Attributes:
        submit: as an executor gets it; None where a gateway makes it.
        prompt_token_ids: empty where a gateway alone knows them.
    """

    request: GenerateRequest
    submit: Submit | None
    prompt_token_ids: list[int]
    stream: Stream
    streaming: bool
    number: int
    task: "asyncio.Task[None] | None" = None

    def ended(self, _task: "asyncio.Task[None]") -> None:
        """Tells the reader that nothing more comes."""
        self.stream.end()


class Generator(abc.ABC):
    """Turns prompts into results; its subclasses say how a request is checked, and how it is followed."""

    def __init__(self) -> None:
        self._thread = LoopThread("enginehouse")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} has a connection, which cannot be pickled: make one in each process")

    @abc.abstractmethod
    def shutdown(self) -> None:
        """Ends it; requests that are under way fail."""

    @abc.abstractmethod
    def check_open(self) -> None:
        """Raises Unavailable when nothing can be sent any more."""

    @abc.abstractmethod
    def _prepare(self, request: GenerateRequest, number: int, *, streaming: bool) -> Job:
        """Checks a request against the model. Raises InvalidArgument."""

    @abc.abstractmethod
    def _follow(self, job: Job) -> Coroutine[Any, Any, None]:
        """Sends a job and pushes what comes into its stream. Runs on the loop."""

    def complete(
        self, inputs: Any, sampling_params: Params = None, use_tqdm: bool = False
    ) -> RequestOutput | list[RequestOutput]:
        """What `LLM.generate` does."""
        prompts, single = as_prompts(inputs)
        results = self._begin(prompts, as_params(sampling_params, len(prompts)), streaming=False)
        try:
            outputs = _gather(results, use_tqdm and not single)
        except BaseException:  # Ctrl-C, too: nobody would read the others
            for result in results:
                result.cancel()
            raise
        return outputs[0] if single else outputs

    def start(
        self, inputs: Prompt, sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> GenerationResult:
        """What `LLM.generate_async` does."""
        prompts, single = as_prompts(inputs)
        if not single:
            raise InvalidArgument(
                f"generate_async takes one prompt, not {len(prompts)}: call it for each, or give them to generate"
            )
        return self._begin(prompts, as_params(sampling_params, 1), streaming=streaming)[0]

    def _begin(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, streaming: bool
    ) -> list[GenerationResult]:
        """All of them are checked before the first is sent."""
        self.check_open()
        jobs = [
            self._prepare(chosen.to_request(prompt), next(_numbers), streaming=streaming)
            for prompt, chosen in zip(prompts, params, strict=True)
        ]
        results = [
            GenerationResult(
                job.stream,
                RequestOutput(
                    job.number,
                    job.request.text if job.request.HasField("text") else None,
                    job.prompt_token_ids,
                    [CompletionOutput(index) for index in range(num_completions(job.request)[0])],
                ),
                streaming=streaming,
                include_stop=chosen.include_stop_str_in_output,
                end_id=chosen.end_id,
                cancel=_canceller(self._thread, job),
                keep=self,
            )
            for job, chosen in zip(jobs, params, strict=True)
        ]
        try:
            self._thread.call(_start, self._follow, jobs)
        except RuntimeError:
            self.check_open()
            raise
        return results


def _start(follow: Callable[[Job], Coroutine[Any, Any, None]], jobs: Iterable[Job]) -> None:
    for job in jobs:
        job.task = asyncio.create_task(_guarded(follow, job))
        job.task.add_done_callback(job.ended)  # also of one that was cancelled before it ran


async def _guarded(follow: Callable[[Job], Coroutine[Any, Any, None]], job: Job) -> None:
    try:
        await follow(job)
    except Exception as error:
        job.stream.end(error)


def _canceller(thread: LoopThread, job: Job) -> Callable[[], None]:
    def cancel() -> None:
        if job.task and not job.task.done():
            job.task.cancel()

    def ask() -> None:
        if job.task and job.task.done():
            return
        try:
            thread.call(cancel)
        except RuntimeError:  # the loop has ended, and everything with it
            job.stream.end()

    return ask


def _gather(results: Sequence[GenerationResult], show: bool) -> list[RequestOutput]:
    console = stderr()
    if not show or not console.is_terminal:
        return [result.result() for result in results]
    with Bars(console) as bars:
        outputs: list[RequestOutput] = []
        for result in results:
            bars.update("generate", len(outputs), len(results), "prompts")
            outputs.append(result.result())
        return outputs


def as_prompts(inputs: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether it was a single one.

    Args:
        inputs: a text, token ids (a list, or an array), a conversation (messages with role and content), or a list of these.

    Raises:
        InvalidArgument: none of these.
    """
    inputs = _plain(inputs)
    if isinstance(inputs, str):
        return [inputs], True
    if not isinstance(inputs, Sequence) or isinstance(inputs, bytes):
        raise _no_prompt(inputs)
    if inputs and isinstance(_plain(inputs[0]), Integral | Mapping):
        return [inputs], True
    prompts: list[Any] = [_plain(prompt) for prompt in inputs]
    for prompt in prompts:
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise _no_prompt(prompt)
    return prompts, False


def as_params(params: Params, count: int) -> Sequence[SamplingParams]:
    """Those of each prompt. Raises InvalidArgument for another number of them."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidArgument(f"sampling_params is {params!r}: give a SamplingParams, or one for each prompt")
    if len(params) != count:
        raise InvalidArgument(
            f"{len(params)} sampling_params for {count} prompt{'' if count == 1 else 's'}: give one for each, or one for all"
        )
    return params


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists, {"prompt": text} and {"prompt_token_ids": ids} as what they hold."""
    if isinstance(value, Mapping):
        value = value.get("prompt_token_ids", value.get("prompt", value))
    return value.tolist() if hasattr(value, "tolist") else value


def _no_prompt(value: object) -> InvalidArgument:
    return InvalidArgument(
        f"{value!r} is no prompt: give text, token ids, a conversation (messages with role and content), or a list of these"
    )
