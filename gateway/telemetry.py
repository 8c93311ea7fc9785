"""The gateway's metrics, and what its log says of a request: both as the client sees it."""

import functools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from engine.errors import EnginehouseError
from protos import logs, tracing
from protos.calls import status
from protos.histogram import FIRST_TOKEN, INTER_TOKEN, REQUEST, TOKENIZE
from protos.metrics import Metrics
from protos.v1.common_pb2 import FINISH_REASON_CANCELLED, FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishReason
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import GenerateRequest, GenerateResponse

if TYPE_CHECKING:
    from gateway.failover import Failover
    from gateway.models import Model
    from gateway.router import Router

_UNKNOWN = "unknown"  # a name that no model has is anybody's word and becomes no label
_LOST = ("EXECUTOR_LOST", "EXECUTOR_DRAINING", "ENGINE_LOST", "ENGINE_UNLOADED")
_FINISHES = {FINISH_REASON_STOP: "stop", FINISH_REASON_LENGTH: "length", FINISH_REASON_CANCELLED: "cancelled"}

Generate = TypeVar("Generate", bound=Callable[..., AsyncIterator[GenerateResponse]])
P = ParamSpec("P")
T = TypeVar("T")


class Telemetry:
    """Counts requests by the name of their model."""

    def __init__(self, metrics: Metrics, router: "Router", failover: "Failover") -> None:
        counter, histograms = metrics.counter, metrics.histograms
        self.requests = counter("gateway_requests_total", "Requests that have ended, by gRPC status.", "model", "code")
        self.lost = counter(
            "gateway_requests_lost_total", "Requests that failed because their executor or engine went away.", "model"
        )
        self.first_token = histograms(
            "gateway_time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN, "model"
        )
        self.inter_token = histograms(
            "gateway_inter_token_latency_seconds",
            "Between two responses of a completion, over the tokens of the later one, once for each.",
            INTER_TOKEN,
            "model",
        )
        self.duration = histograms(
            "gateway_request_duration_seconds", "From a request's arrival to its end.", REQUEST, "model"
        )
        self.tokenizing = histograms(
            "gateway_tokenize_seconds", "To make token ids of a request's prompt, the chat template included.", TOKENIZE
        )
        self.prompt_tokens = counter("gateway_prompt_tokens_total", "Tokens of the prompts.", "model")
        self.cached_tokens = counter(
            "gateway_cached_prompt_tokens_total", "Of these, found in an executor's prefix cache.", "model"
        )
        self.completion_tokens = counter(
            "gateway_completion_tokens_total", "Tokens of the completions, as usage tells them.", "model"
        )
        self.open = 0
        self.tokens = 0  # of completions, as they go out
        self.first_tokens: deque[tuple[float, float]] = deque(
            maxlen=1000
        )  # when the latest came, and seconds they took
        metrics.gauge("gateway_streams_open", "Generate calls under way.", lambda: {(): self.open})
        metrics.gauge(
            "gateway_executor_connected",
            "1 if the executor is connected and answers.",
            lambda: {(link.address,): float(link.connected) for link in router.links},
            "executor",
        )
        metrics.gauge(
            "gateway_executor_requests",
            "Requests of this gateway at the executor.",
            lambda: {(link.address,): float(link.num_requests) for link in router.links},
            "executor",
        )
        metrics.gauge(
            "gateway_executor_circuit",
            "0 closed, 1 half-open, 2 open: the executor failed several requests in a row.",
            lambda: {
                (link.address, engine[:12]): float(circuit.state)
                for link in router.links
                for engine, circuit in list(link.circuits.items())
            },
            "executor",
            "engine",
        )
        retries = counter(
            "gateway_retries_total",
            "Requests sent to another executor, by why the one before failed.",
            "model",
            "reason",
        )
        self.resumed = resumed = counter(
            "gateway_streams_resumed_total",
            "Completions that went on at another executor behind their tokens.",
            "model",
        )
        self.resumed_tokens = resumed_tokens = counter(
            "gateway_resumed_tokens_total", "Tokens that they had, which the other executor was given.", "model"
        )
        expected = counter(
            "gateway_expected_cached_prompt_tokens_total",
            "Prompt tokens that the chosen executor was believed to have in its prefix cache.",
            "model",
        )

        def resume(model: str, tokens: int) -> None:
            resumed.add(model)
            resumed_tokens.add(model, by=tokens)

        failover.on_retry, failover.on_resume = retries.add, resume
        failover.on_choice = lambda model, tokens: expected.add(model, by=tokens)
        self._losses = counter("gateway_executor_losses_total", "Connections that were lost.", "executor")
        for link in router.links:
            self._losses.add(link.address, by=0)
            link.on_loss = functools.partial(self._losses.add, link.address)


class Record:
    """One Generate call."""

    def __init__(self, telemetry: Telemetry, metadata: Iterable[tuple[str, Any]]) -> None:
        """`metadata`: of the call."""
        self._telemetry = telemetry
        self._began = time.monotonic()
        self._given = tracing.given(metadata)
        self._span = tracing.begin("enginehouse.v1.Gateway/Generate", self._given)
        self._tokenized = (0.0, 0.0)  # when that began and ended
        self._sent = 0.0
        self._engine: str | None = None
        self._model = _UNKNOWN
        self._first = 0.0  # when the first token came
        self._last: dict[int, float] = {}  # by completion: when its newest tokens came
        self._prompt = self._cached = self._completion = 0
        self._finishes: dict[int, str] = {}
        telemetry.open += 1

    def found(self, model: "Model") -> None:
        """The request's model is known."""
        self._model, self._engine = model.name, model.engine_id[:12]
        logs.note(model=model.name, engine=model.engine_id[:12])

    def tokenized(self, seconds: float) -> None:
        """The prompt's token ids are there."""
        now = time.monotonic()
        self._tokenized = (now - seconds, now)
        self._telemetry.tokenizing.of().observe(seconds)
        logs.note(tokenize_ms=logs.milliseconds(seconds))

    def carry(self, submit: Submit) -> None:
        """A request goes to an executor, with the trace context that its spans get."""
        self._sent = self._sent or time.monotonic()
        for key, value in self._given.items():
            submit.trace_context[key] = value
        if self._span:
            self._span.inject(submit.trace_context)

    def responded(self, response: GenerateResponse) -> None:
        """A response goes to the client. What is new is told by the usage: an echoed prompt has tokens, too."""
        usage, index = response.usage, response.index
        new = usage.completion_tokens - self._completion
        if new > 0:
            now = time.monotonic()
            self._telemetry.tokens += new
            self._completion = usage.completion_tokens
            last = self._last.get(index)
            if last is not None:
                self._telemetry.inter_token.of(self._model).observe((now - last) / new, new)
            if not self._first:
                self._first, self._prompt, self._cached = now, usage.prompt_tokens, usage.cached_tokens
                self._telemetry.first_token.of(self._model).observe(now - self._began)
                self._telemetry.first_tokens.append((now, now - self._began))
            self._last[index] = now
        if response.HasField("finish"):
            self._finishes[index] = _FINISHES.get(response.finish.reason, FinishReason.Name(response.finish.reason))

    def ended(self, code: str, reason: str) -> None:
        """The call has ended with a gRPC status and, if it failed, a reason; its line in the log gets what is known of it."""
        told, model, seconds = self._telemetry, self._model, time.monotonic() - self._began
        told.open -= 1
        told.requests.add(model, code)
        if reason in _LOST:
            told.lost.add(model)
        told.duration.of(model).observe(seconds)
        for rare in (told.lost, told.resumed, told.resumed_tokens):
            rare.add(model, by=0)  # there before it first happens
        told.prompt_tokens.add(model, by=self._prompt)
        told.cached_tokens.add(model, by=self._cached)
        told.completion_tokens.add(model, by=self._completion)

        logs.note(
            prompt_tokens=self._prompt or None,
            cached_tokens=self._cached if self._prompt else None,
            completion_tokens=self._completion,
            first_token_ms=logs.milliseconds(self._first - self._began) if self._first else None,
            finish=",".join(self._finishes[index] for index in sorted(self._finishes)) or None,
        )
        if self._span:
            self._tell(self._span, code, reason)

    def _tell(self, span: tracing.Span, code: str, reason: str) -> None:
        """Its span and their parts, of a request that has ended."""
        now = time.monotonic()
        span.child("tokenize", *self._tokenized, gen_ai__usage__input_tokens=self._prompt or None)
        span.child("first token", self._sent, self._first or now)
        span.child("stream", self._first, now)
        span.end(
            reason or ("" if code == "OK" else code),
            rpc__system="grpc",
            rpc__grpc__status_code=code,
            gen_ai__request__model=self._model,
            gen_ai__usage__input_tokens=self._prompt or None,
            gen_ai__usage__output_tokens=self._completion,
            gen_ai__response__finish_reasons=[self._finishes[index] for index in sorted(self._finishes)],
            enginehouse__engine=self._engine,
            enginehouse__cached_tokens=self._cached if self._prompt else None,
            enginehouse__request_id=logs.request_id(),
        )


_record: ContextVar[Record | None] = ContextVar("record", default=None)


def found(model: "Model") -> None:
    """Tells the current call's record of its model."""
    if record := _record.get():
        record.found(model)


def carry_trace(submit: Submit) -> None:
    """Gives a request that is sent the current call's trace context."""
    if record := _record.get():
        record.carry(submit)


def observed(generate: Generate) -> Generate:
    """Of the gateway's Generate: keeps a record of each call."""

    async def call(self: Any, request: GenerateRequest, context: Any) -> AsyncIterator[GenerateResponse]:
        began, record = time.monotonic(), Record(self.telemetry, context.invocation_metadata() or ())
        _record.set(record)
        error: BaseException | None = None
        try:
            async with aclosing(
                cast(AsyncGenerator[GenerateResponse, None], generate(self, request, context))
            ) as responses:
                async for response in responses:
                    record.responded(response)
                    yield response
        except BaseException as raised:
            error = raised
            raise
        finally:
            code = status(error, context, time.monotonic() - began)
            record.ended(code, error.reason if isinstance(error, EnginehouseError) else "")

    return cast(Generate, functools.wraps(generate)(call))


def timed(prompt: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Of what makes token ids of a prompt: measures it for the current call."""

    async def measured(*arguments: P.args, **named: P.kwargs) -> T:
        began = time.monotonic()
        made = await prompt(*arguments, **named)
        if record := _record.get():
            record.tokenized(time.monotonic() - began)
        return made

    return functools.wraps(prompt)(measured)
