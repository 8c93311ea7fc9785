"""/v1/completions and /v1/chat/completions: requests to the Gateway service in this process, and their answers."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

import msgspec
from starlette.requests import Request

from engine.errors import InvalidArgument
from gateway.http.answer import Answer
from gateway.http.choices import ChatChoice, Choice, Json, TextChoice
from gateway.http.context import HttpContext, cancelled_when_gone
from gateway.http.convert import from_chat, from_completion
from gateway.http.endpoint import read_json
from gateway.http.requests import ChatRequest, Common, CompletionRequest
from gateway.server import Gateway
from gateway.submission import MAX_COMPLETIONS
from protos.logs import request_id
from protos.v1.common_pb2 import Usage
from protos.v1.gateway_pb2 import GenerateRequest, GenerateResponse

T = TypeVar("T")
Responses = AsyncGenerator[tuple[int, GenerateResponse], None]


class Generate:
    """Both endpoints."""

    def __init__(self, gateway: Gateway, max_bytes: int) -> None:
        self._gateway, self._max_bytes = gateway, max_bytes

    async def completions(self, request: Request, context: HttpContext, answer: Answer) -> None:
        """Text, or token ids, goes on."""
        asked = await self._read(request, CompletionRequest)
        requests = from_completion(asked)
        _model, tokenizer = await self._gateway.served(asked.model)
        logprobs, echo = asked.logprobs is not None, bool(asked.echo)
        choices = [TextChoice(index, tokenizer, logprobs, echo) for index in range(_count(asked) * len(requests))]
        head = _head(f"cmpl-{request_id()}", "text_completion", asked)
        async with cancelled_when_gone(request, context), aclosing(self._responses(requests, context)) as responses:
            await _tell(responses, answer, asked, head, head, choices, len(requests))

    async def chat(self, request: Request, context: HttpContext, answer: Answer) -> None:
        """A conversation goes on."""
        asked = await self._read(request, ChatRequest)
        made = from_chat(asked)
        _model, tokenizer = await self._gateway.served(asked.model)
        tag = tokenizer.tool_call_tag if made.chat.tools else None
        choices = [ChatChoice(index, tokenizer, bool(asked.logprobs), tag) for index in range(_count(asked))]
        whole = _head(f"chatcmpl-{request_id()}", "chat.completion", asked)
        chunk = {**whole, "object": "chat.completion.chunk"}
        async with cancelled_when_gone(request, context), aclosing(self._responses([made], context)) as responses:
            await _tell(responses, answer, asked, whole, chunk, choices, 1)

    async def _read(self, request: Request, kind: type[T]) -> T:
        return decode(await read_json(request, self._max_bytes), kind)

    async def _responses(self, requests: Sequence[GenerateRequest], context: HttpContext) -> Responses:
        """All of them at once, each response with the place of its request."""
        if len(requests) == 1:
            async with aclosing(self._one(requests[0], context)) as responses:
                async for response in responses:
                    yield 0, response
            return
        news: asyncio.Queue[tuple[int, GenerateResponse | Exception | None]] = asyncio.Queue(len(requests))

        async def follow(place: int, request: GenerateRequest) -> None:
            try:
                async with aclosing(self._one(request, context)) as responses:
                    async for response in responses:
                        await news.put((place, response))
                await news.put((place, None))
            except Exception as error:
                await news.put((place, error))

        tasks = [asyncio.create_task(follow(place, request)) for place, request in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                place, found = await news.get()
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield place, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: GenerateRequest, context: HttpContext) -> AsyncGenerator[GenerateResponse, None]:
        part = context.part()
        call = self._gateway.Generate(request, cast(Any, part))
        try:
            async with aclosing(cast(AsyncGenerator[GenerateResponse, None], call)) as responses:
                async for response in responses:
                    yield response
        finally:
            part.done()


async def _tell(
    responses: Responses,
    answer: Answer,
    asked: Common,
    whole: Json,
    chunk: Json,
    choices: Sequence[Choice],
    prompts: int,
) -> None:
    """Streams the choices as they come, or answers with all of them."""
    usages = [Usage()] * prompts
    each = len(choices) // prompts
    extra: Json = {"usage": None} if asked.includes_usage else {}
    async for place, response in responses:
        usages[place] = response.usage
        shown = choices[place * each + response.index].push(response)
        if asked.stream:
            for choice in shown:
                await answer.event({**chunk, "choices": [choice], **extra})
    if not asked.stream:
        await answer.json({**whole, "choices": [choice.whole() for choice in choices], "usage": _usage(usages)})
        return
    if asked.includes_usage:
        await answer.event({**chunk, "choices": [], "usage": _usage(usages)})
    await answer.end()


def decode(data: bytes, kind: type[T]) -> T:
    """A request's body. Raises InvalidArgument, which names the field."""
    try:
        found = msgspec.json.decode(data, type=kind)
        data.decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        said, _, path = str(error).partition(" - at `$.")
        raise InvalidArgument(
            f"the request cannot be read: {error}",
            reason="INVALID_REQUEST",
            metadata={"param": path.rstrip("`")} if path else {},
        ) from None
    return found


def _count(asked: Common) -> int:
    return 1 if asked.n is None else min(asked.n, MAX_COMPLETIONS)  # more of them are refused


def _head(name: str, kind: str, asked: Common) -> Json:
    return {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}


def _usage(usages: Sequence[Usage]) -> Json:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }
