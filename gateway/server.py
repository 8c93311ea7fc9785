"""The Gateway service: names to engines, text to tokens, tokens to an executor and back to text."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from engine.errors import DeadlineExceeded, EnginehouseError
from engine.store import Store
from gateway.admission import DEFAULT_LIMITS, Admission, Grant, Limits
from gateway.failover import Failover
from gateway.generation import Generation, begin
from gateway.link import Link
from gateway.models import Model, Models
from gateway.prompt import prompt_ids, skip_special
from gateway.router import Router
from gateway.submission import check, check_prompt, check_token_ids, submission
from gateway.telemetry import Telemetry, carry_trace, found, observed, timed
from gateway.tokenizer import Tokenizer
from gateway.turns import Turns
from protos.access import caller
from protos.logs import request_id
from protos.metrics import Metrics
from protos.v1 import gateway_pb2 as wire
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2_grpc import GatewayServicer

_LONG_TEXT = 4000  # characters, 2 ms of tokenizing; longer ones leave the event loop
_MANY_TOKENS = 1000  # of which the same holds
_GONE = (
    "ENGINE_NOT_LOADED",
    "ENGINE_NOT_READY",
    "ENGINE_UNLOADED",
)  # everywhere: the name may stand for another one now

Context = grpc.aio.ServicerContext[Any, Any]


class Gateway(GatewayServicer):
    """Thin: each step of a request has its own module. `transcript.py` makes text, `link.py` speaks with the executor."""

    def __init__(
        self,
        store: Store,
        router: Router,
        metrics: Metrics | None = None,
        limits: Limits = DEFAULT_LIMITS,
        failover: Failover | None = None,
    ) -> None:
        metrics = metrics or Metrics()
        self._failover = failover or Failover(router)
        self.telemetry = Telemetry(metrics, router, self._failover)
        self._admission = Admission(limits, metrics)
        self._max_prompt_bytes = limits.max_prompt_bytes
        self._models = Models(store, router.ready)
        self._router = router
        self._turns = Turns()

    @observed
    async def Generate(self, request: wire.GenerateRequest, context: Context) -> AsyncIterator[wire.GenerateResponse]:
        check(request, self._max_prompt_bytes)
        caller().check_model(request.model)
        grant = await self._admission.enter(caller(), request.priority, context.time_remaining())
        context.add_done_callback(grant.ended)  # type: ignore[arg-type]  # a class in grpc's stubs; however the call ends
        first, moved = True, False
        while True:
            model, generation = await self._begin(request, grant, context)
            try:
                with generation:
                    while not generation.done:
                        await generation.wait()
                        async with self._turns.turn(first):
                            began = time.monotonic()
                            for response in generation.take():
                                yield response
                                first = False
                        if not generation.done:
                            await self._turns.pause(began)
                return
            except EnginehouseError as error:
                if moved or not first or error.reason not in _GONE:
                    raise
                if (await self._models.get(request.model)).engine_id == model.engine_id:
                    raise
                moved = True  # to the name's next engine, which has taken the place of this one since the request came

    async def _begin(self, request: wire.GenerateRequest, grant: Grant, context: Context) -> tuple[Model, Generation]:
        """The engine that the model's name stands for, and the request to it, not sent yet."""
        model = await self._models.get(request.model, caller().allows)
        found(model)
        tokenizer = await self._models.tokenizer(model.engine_id)
        prompt = await _prompt(request, tokenizer)
        grant.charge_prompt(len(prompt))
        make = functools.partial(submission, request, model, prompt, tokenizer)
        # bad words are tokenized, which takes its time
        submit = await asyncio.to_thread(make) if request.bad_words else make()
        await self._router.look(model.engine_id)
        limit = functools.partial(_carry_context, context=context)
        executor = self._failover.request(model.name, limit)
        generation = begin(request, submit, prompt, tokenizer, executor, limit)
        grant.follow(generation.usage)
        return model, generation

    async def served(self, name: str) -> tuple[Model, Tokenizer]:
        """A model that the caller may use. Raises NotFound, PermissionDenied."""
        caller().check_model(name)
        model = await self._models.get(name)
        return model, await self._models.tokenizer(model.engine_id)

    async def Tokenize(self, request: wire.TokenizeRequest, _context: Context) -> wire.TokenizeResponse:
        check_prompt(request, self._max_prompt_bytes)
        caller().check_model(request.model)
        model = await self._models.get(request.model, caller().allows)
        tokenizer = await self._models.tokenizer(model.engine_id)
        return wire.TokenizeResponse(token_ids=await _prompt(request, tokenizer))

    async def Detokenize(self, request: wire.DetokenizeRequest, _context: Context) -> wire.DetokenizeResponse:
        caller().check_model(request.model)
        model = await self._models.get(request.model, caller().allows)
        tokenizer = await self._models.tokenizer(model.engine_id)

        def text() -> str:
            check_token_ids(request.token_ids, model)
            return tokenizer.decode(request.token_ids, skip_special(request))

        many = len(request.token_ids) > _MANY_TOKENS
        return wire.DetokenizeResponse(text=await asyncio.to_thread(text) if many else text())

    async def ListModels(self, _request: wire.ListModelsRequest, _context: Context) -> wire.ListModelsResponse:
        models = [model for model in await self._models.list() if caller().allows(model.name)]
        return wire.ListModelsResponse(models=[self.describe(model) for model in models])

    @property
    def links(self) -> Sequence[Link]:
        """To the executors."""
        return self._router.links

    def describe(self, model: Model) -> wire.Model:
        """As ListModels tells it."""
        return wire.Model(
            name=model.name,
            engine_id=model.engine_id,
            ready_executors=self._router.ready(model.engine_id),
            max_seq_len=model.max_seq_len,
            has_chat_template=model.has_chat_template,
            has_tokenizer=model.has_tokenizer,
            vocab_size=model.vocab_size,
        )


@timed
async def _prompt(request: wire.GenerateRequest | wire.TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """The prompt's token ids; a long text, or a template, may take its time."""
    if request.HasField("chat") or len(request.text) > _LONG_TEXT:
        return await asyncio.to_thread(prompt_ids, request, tokenizer)
    return prompt_ids(request, tokenizer)


def _carry_context(submit: Submit, context: Context) -> None:
    """The call's id, tenant, deadline and trace context, for the executor. Raises DeadlineExceeded if there is no time left."""
    submit.request_id, submit.tenant = request_id(), caller().name
    remaining = context.time_remaining()
    if remaining is not None:
        if remaining <= 0:
            raise DeadlineExceeded(
                "the deadline passed before the request was sent to an executor: give it more time",
                reason="DEADLINE_EXCEEDED",
            )
        submit.timeout.FromNanoseconds(int(remaining * 1e9))
    carry_trace(submit)
