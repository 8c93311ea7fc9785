"""`GenerationExecutor`: an engine in a worker process of this program's own."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from builder_svc.tensorrt_names import also_takes
from engine.artifact import Engine
from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, Unavailable
from engine.lifetime import at_end
from enginehouse.llm.generator import Generator, Job, LoopThread, Params
from enginehouse.llm.outputs import RequestOutput
from enginehouse.llm.result import GenerationResult
from enginehouse.llm.sampling import SamplingParams
from enginehouse.llm.stream import Stream
from enginehouse.llm.worker import LocalWorker
from enginehouse.process import service_environment
from gateway.generation import begin
from gateway.models import Model
from gateway.prompt import prompt_ids
from gateway.submission import submission
from gateway.tokenizer import NoTokenizer, Tokenizer
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import GenerateRequest

_UNLIMITED = 1 << 30  # requests that may wait: they are this program's own
_STOP_PAUSE, _WHOLE_PAUSE = 0.016, 1.0  # seconds in which tokens gather that nobody reads before the end


@also_takes(
    ignored=("sink_token_length",), off={"max_attention_window": None, "host_cache_size": 0, "onboard_blocks": True}
)
@dataclass(kw_only=True)
class KvCacheConfig:
    """How much memory keys and values get; by default what the engine can use, at most half of what is free.

    Attributes:
        max_tokens: so many tokens of all sequences together, on each rank.
        free_gpu_memory_fraction: at most this part of the device's free memory (on the CPU, of the machine's), in (0, 1]; with
            max_tokens, the less of both.
        enable_block_reuse: whether sequences share what their prompts have in common.

    Raises:
        InvalidArgument: (a ValueError) names the value and what is allowed.

    Example:
        >>> from enginehouse import LLM, KvCacheConfig
        >>> with LLM("examples/demo-model", kv_cache_config=KvCacheConfig(max_tokens=4096)) as llm:
        ...     llm.get_stats().total_kv_blocks
        256
    """

    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = None
    enable_block_reuse: bool = True

    def arguments(self) -> list[str]:
        """Of the worker processes."""
        options = [] if self.enable_block_reuse else ["--no-block-reuse"]
        if self.max_tokens is not None:
            if type(self.max_tokens) is not int or self.max_tokens < 1:
                raise InvalidArgument(f"max_tokens of the KV cache is {self.max_tokens!r}: give a number, at least 1")
            options += ["--kv-tokens", str(self.max_tokens)]
        if (share := self.free_gpu_memory_fraction) is not None:
            if not 0 < share <= 1:
                raise InvalidArgument(f"free_gpu_memory_fraction is {share!r}: give a number above 0, at most 1")
            options += ["--kv-share", str(share)]
        return options


@dataclass(frozen=True)
class ExecutorStats:
    """How busy an executor is, and what it has done since it was made. Counts are told about once a second.

    Attributes:
        running: requests in the batch.
        waiting: requests that were not begun, or were preempted.
        queued_tokens: known tokens that are not computed yet.
        free_kv_blocks: of the KV cache, 16 tokens each, those that nobody uses.
        total_kv_blocks: all of them.
        prompt_tokens: of requests that were begun.
        cached_tokens: of these, found in the prefix cache.
        completion_tokens: that were made.
        preemptions: sequences that gave their blocks back to go on later.

    Example:
        >>> from enginehouse import LLM
        >>> with LLM("examples/demo-model") as llm:
        ...     llm.get_stats().running
        0
    """

    running: int
    waiting: int
    queued_tokens: int
    free_kv_blocks: int
    total_kv_blocks: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int


class Skipped(NoTokenizer):
    """Of a program that wants token ids alone."""

    def _missing(self, remedy: str) -> FailedPrecondition:
        return FailedPrecondition(f"there is no tokenizer, as it was asked for: {remedy}", reason="TOKENIZER_SKIPPED")


class GenerationExecutor(Generator):
    """Runs an engine. Token ids in, token ids out; `LLM` puts text around it.

    To be ended by `shutdown`, or used in a `with` block; one that is forgotten ends with its last reference, or with the
    program.

    Example:
        >>> from enginehouse import AutoModelForCausalLM, GenerationExecutor, SamplingParams, build
        >>> engine = build(AutoModelForCausalLM.from_hugging_face("examples/demo-model"))
        >>> with GenerationExecutor.create(engine) as executor:
        ...     output = executor.generate([0, 1082, 261, 2178], SamplingParams(max_tokens=5))
        >>> len(output.outputs[0].token_ids)
        5
    """

    def __init__(
        self,
        engine: Engine,
        *,
        kv_cache_config: KvCacheConfig | None = None,
        tokenizer: Tokenizer | None = None,
        name: str = "",
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """What `create` does, for an engine that is at hand.

        Args:
            tokenizer: makes text; by default there is none.
            name: what errors call the model.
            progress: called with (bytes loaded, bytes in all).
        """
        if not isinstance(kv_cache_config, KvCacheConfig | None):
            raise InvalidArgument(f"the KV cache's settings are {kv_cache_config!r}: give a KvCacheConfig")
        manifest = engine.manifest
        self.engine = engine
        arguments = (kv_cache_config or KvCacheConfig()).arguments()
        arguments += ["--store", engine.store.url, "--device", manifest.fingerprint.device]
        arguments += ["--max-waiting", str(_UNLIMITED), "--log-level", "warning"]
        arguments += ["--trust-native"] if engine.ours else []  # this process has compiled what code there is
        self._tokenizer = tokenizer or Skipped(engine.engine_id)
        self._model = Model(
            name=name or engine.engine_id[:12],
            engine_id=engine.engine_id,
            vocab_size=manifest.model.vocab_size,
            max_seq_len=manifest.limits.max_seq_len,
            has_chat_template=False,
            has_tokenizer=not isinstance(self._tokenizer, NoTokenizer),
            has_token_table=manifest.token_table is not None,
        )
        self._worker = LocalWorker(engine.engine_id, len(manifest.ranks), arguments, service_environment())
        super().__init__()
        self._process = os.getpid()
        self._close = at_end(self, _closer(self._thread, self._worker))
        try:
            loading = self._thread.submit(self._worker.start())
            while not wait([loading], timeout=0.1).done:
                progress(*self._worker.progress)
            loading.result()
        except BaseException:
            self.shutdown()
            raise
        size = sum(file.size for file in manifest.files())
        progress(size, size)

    @staticmethod
    def create(
        engine: Engine | str | Path,
        executor_config: KvCacheConfig | None = None,
        model_world_size: int = 1,
        world_size: int = 0,  # noqa: ARG004
        mpi_session: object = None,  # noqa: ARG004
        reuse_mpi_comm: bool = False,  # noqa: ARG004
    ) -> "GenerationExecutor":
        """Loads an engine.

        Args:
            engine: what `build` gave, or an engine directory.
            executor_config: the KV cache's settings.
            model_world_size: ranks, as many as the engine has; left at 1, that is not checked.
            world_size, mpi_session, reuse_mpi_comm: taken for scripts that give them; there is no MPI.

        Raises:
            NotFound: no engine there.
            FailedPrecondition: it needs another device than this machine has, or more memory.
            InvalidArgument: (a ValueError) the engine has another number of ranks.
            Unavailable: the worker process cannot be started, or has died.
        """
        if not isinstance(engine, Engine):
            engine = Engine.from_dir(engine)
        if model_world_size not in (1, ranks := len(engine.manifest.ranks)):
            raise InvalidArgument(f"model_world_size is {model_world_size}, but the engine was built for {ranks} ranks")
        return GenerationExecutor(engine, kv_cache_config=executor_config)

    @overload
    def generate(
        self, prompt_token_ids: Sequence[int], sampling_params: SamplingParams | None = None
    ) -> RequestOutput: ...

    @overload
    def generate(
        self, prompt_token_ids: Sequence[Sequence[int]], sampling_params: Params = None
    ) -> list[RequestOutput]: ...

    def generate(self, prompt_token_ids: Any, sampling_params: Params = None) -> RequestOutput | list[RequestOutput]:
        """Completes token ids, or each of a list of them.

        Raises:
            InvalidArgument: (a ValueError) names the value and what is allowed; nothing has been sent then.
            EnginehouseError: what a request has failed with.
        """
        return self.complete(prompt_token_ids, sampling_params)

    def generate_async(
        self, prompt_token_ids: Sequence[int], sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> GenerationResult:
        """Begins with a completion, and gives what it can be waited for with. Raises InvalidArgument at once."""
        return self.start(prompt_token_ids, sampling_params, streaming)

    def get_stats(self) -> ExecutorStats:
        """How busy it is. Raises Unavailable when it has ended."""
        self.check_open()
        load, counted = self._worker.load, self._worker.counted
        return ExecutorStats(
            load.running,
            load.waiting,
            load.queued_tokens,
            load.free_kv_blocks,
            load.total_kv_blocks,
            counted.prompt_tokens,
            counted.cached_tokens,
            counted.completion_tokens,
            counted.preemptions,
        )

    @property
    def worker_pid(self) -> int:
        """The process that runs the engine."""
        return self._worker.pid

    def shutdown(self) -> None:
        """Ends the worker process; requests that are under way fail with Unavailable."""
        self._close()

    def check_open(self) -> None:
        if os.getpid() != self._process:
            raise Unavailable(
                f"it belongs to process {self._process}, and this is a fork of it, {os.getpid()}: make one here",
                reason="EXECUTOR_FORKED",
            )
        if self._worker.error:
            raise self._worker.error

    def _prepare(self, request: GenerateRequest, number: int, *, streaming: bool) -> Job:
        ids = prompt_ids(request, self._tokenizer)
        submit = submission(request, self._model, ids, self._tokenizer)
        submit.request_id = f"llm-{number}"
        return Job(request, submit, ids, Stream(), streaming, number)

    def _follow(self, job: Job) -> Coroutine[Any, Any, None]:
        return _follow(job, self._worker, self._tokenizer)


async def _follow(job: Job, worker: LocalWorker, tokenizer: Tokenizer) -> None:
    submit = job.submit or Submit()
    pause = 0.0 if job.streaming else _STOP_PAUSE if job.request.stop else _WHOLE_PAUSE
    with begin(job.request, submit, job.prompt_token_ids, tokenizer, worker, lambda _: None) as generation:
        try:
            while not generation.done:
                await generation.wait(pause)
                if responses := generation.take():
                    job.stream.push(responses)
        except asyncio.CancelledError:  # what has come so far is the reader's
            with contextlib.suppress(EnginehouseError):
                job.stream.push(generation.take())
            raise


def _closer(thread: LoopThread, worker: LocalWorker) -> Callable[[], None]:
    def close() -> None:
        stopping = thread.submit(worker.stop())
        if not thread.inside:  # a collection of garbage may happen there
            stopping.result(timeout=10)
        thread.stop()

    return close
