"""A running cluster, asked like an executor of one's own."""

import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from engine.errors import FailedPrecondition, NotFound, Unavailable
from engine.lifetime import at_end
from enginehouse.client import GatewayClient
from enginehouse.llm.generator import Generator, Job, LoopThread
from enginehouse.llm.stream import Stream
from protos.v1.gateway_pb2 import GenerateRequest


class RemoteTokenizer:
    """The model's tokenizer, at the gateway."""

    def __init__(self, client: GatewayClient, thread: LoopThread, model: str) -> None:
        self._client, self._thread, self._model = client, thread, model

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        work = self._client.tokenize(self._model, text, special_tokens=add_special_tokens)
        return self._thread.submit(work).result()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids by themselves."""
        return self._thread.submit(self._client.detokenize(self._model, token_ids, skip_special_tokens)).result()


class RemoteGenerator(Generator):
    """One model of a gateway.

    Args:
        client: of that gateway, not connected yet.
        text: whether prompts may be text, and completions have one.

    Raises:
        Unavailable: no gateway answers at the address.
        NotFound: it has no model of that name.
    """

    def __init__(self, client: GatewayClient, model: str, *, text: bool = True) -> None:
        super().__init__()
        self._model, self._text, self._process = model, text, os.getpid()
        self._client = client
        self._close = at_end(self, _closer(self._thread, self._client))
        try:
            self._thread.submit(_open(self._client)).result()
            models = {one.name: one for one in self._thread.submit(self._client.models()).result()}
            if model not in models:
                raise NotFound(
                    f"the gateway at {client.address} has no model {model!r}; there are: {', '.join(models) or 'none yet'}",
                    reason="MODEL_NOT_FOUND",
                )
        except BaseException:
            self.shutdown()
            raise
        self.tokenizer = RemoteTokenizer(self._client, self._thread, model)

    def shutdown(self) -> None:
        """Ends the connection; requests that are under way are cancelled."""
        self._close()

    def check_open(self) -> None:
        if os.getpid() != self._process:
            raise Unavailable(f"it belongs to process {self._process}: connect here", reason="EXECUTOR_FORKED")
        if not self._close.alive:
            raise Unavailable("it was shut down: connect again", reason="EXECUTOR_SHUT_DOWN")

    def _prepare(self, request: GenerateRequest, number: int, *, streaming: bool) -> Job:
        """What the model decides, the gateway checks when it gets the request."""
        if not (self._text or request.HasField("token_ids")):
            raise FailedPrecondition(
                "there is no tokenizer, as it was asked for: give the prompt as token ids", reason="TOKENIZER_SKIPPED"
            )
        request.model = self._model
        return Job(request, None, list(request.token_ids.ids), Stream(), streaming, number)

    def _follow(self, job: Job) -> Coroutine[Any, Any, None]:
        return _follow(job, self._client, text=self._text)


async def _open(client: GatewayClient) -> None:
    await client.__aenter__()


async def _follow(job: Job, client: GatewayClient, *, text: bool) -> None:
    async for response in client.send(job.request):
        if not text:
            response.text = ""
        job.stream.push([response])


def _closer(thread: LoopThread, client: GatewayClient) -> Callable[[], None]:
    def close() -> None:
        closing = thread.submit(client.__aexit__(None, None, None))
        if not thread.inside:
            closing.result(timeout=10)
        thread.stop()

    return close
