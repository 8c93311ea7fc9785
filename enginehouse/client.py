"""Clients of the three services for asyncio: an `async with` block each, errors as EnginehouseError."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from engine.errors import InvalidArgument, Unavailable
from enginehouse.connection import ServiceClient, not_unicode
from enginehouse.upload import Progress, upload
from protos import tracing
from protos.v1 import builder_pb2, executor_pb2, gateway_pb2
from protos.v1.builder_pb2_grpc import BuilderStub
from protos.v1.common_pb2 import BeamSearch, GuidedDecoding, OutputOptions, SamplingParams, StoppingCriteria, TokenIds
from protos.v1.executor_pb2_grpc import ExecutorStub
from protos.v1.gateway_pb2_grpc import GatewayStub

Prompt = str | Sequence[int] | Sequence[gateway_pb2.ChatMessage]
"""Text, token ids or a conversation."""

_WRITE_FAILED = "Internal error from Core"


class GatewayClient(ServiceClient):
    """Prompts in, text and tokens out.

    Example:
        >>> import asyncio
        >>> from enginehouse import GatewayClient
        >>> async def complete(prompt):
        ...     async with GatewayClient("127.0.0.1:8400") as gateway:
        ...         return "".join([response.text async for response in gateway.generate("demo", prompt)])
        >>> asyncio.run(complete("In the beginning")) != ""
        True
    """

    service = "gateway"
    remedy = ": start a cluster with `enginehouse up`, or say where one is with --gateway HOST:PORT"

    def _connect(self, channel: grpc.aio.Channel) -> None:
        self._stub = GatewayStub(channel)

    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        stopping: StoppingCriteria | None = None,
        stop: Sequence[str] = (),
        output: OutputOptions | None = None,
        n: int | None = None,
        best_of: int | None = None,
        beam_search: BeamSearch | None = None,
        echo: bool = False,
        bad_words: Sequence[str] = (),
        guided_decoding: GuidedDecoding | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        """New text and tokens as they come; a completion's last message has its finish.

        Of several completions each message says by its `index` which one it is of. Ending the iteration (or cancelling
        the task) cancels the request.

        Args:
            sampling: how tokens are chosen.
            stopping: when to end by tokens.
            stop: strings that end the text.
            output: log-probabilities that are wanted, of the completion and of the prompt.
            n: completions, 1 to 16.
            best_of: how many are made, of which the n with the highest log-probability a token are given.
            beam_search: searches for the most probable text; n of its hypotheses are given, the best first.
            echo: the prompt comes first in each completion, without log-probabilities.
            bad_words: texts that are never written.
            guided_decoding: what each completion's text must be.
            priority: higher runs first.

        Raises:
            InvalidArgument: text that is not valid Unicode, a token id that is none, and whatever the gateway refuses.
        """
        try:
            request = gateway_pb2.GenerateRequest(
                model=model,
                sampling=sampling,
                stopping=stopping,
                stop=stop,
                output=output,
                n=n,
                best_of=best_of,
                beam_search=beam_search,
                echo=echo,
                bad_words=bad_words,
                guided_decoding=guided_decoding,
                priority=priority,
            )
            if isinstance(prompt, str):
                request.text = prompt
            elif prompt and isinstance(prompt[0], gateway_pb2.ChatMessage):
                request.chat.messages.extend(prompt)  # type: ignore[arg-type]  # one kind throughout
            else:
                request.token_ids.CopyFrom(TokenIds(ids=prompt))  # type: ignore[arg-type]
        except UnicodeEncodeError as error:
            raise not_unicode(error) from None
        except ValueError as error:
            raise InvalidArgument(f"{error}: token ids, limits and seeds are numbers of their range, from 0") from None
        return self.send(request)

    def send(self, request: gateway_pb2.GenerateRequest) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        """What `generate` makes of its arguments, as a request."""
        span = tracing.call("enginehouse.v1.Gateway/Generate")
        return self._replies(self._stub.Generate(request, metadata=span.headers if span else None), span)

    async def detokenize(self, model: str, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids by themselves."""
        request = gateway_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return (await self._reply(self._stub.Detokenize(request))).text

    async def models(self) -> list[gateway_pb2.Model]:
        """What is served, by name."""
        reply = await self._reply(self._stub.ListModels(gateway_pb2.ListModelsRequest()))
        return sorted(reply.models, key=lambda model: model.name)

    async def tokenize(self, model: str, text: str, *, special_tokens: bool = True) -> list[int]:
        """The model's token ids of a text, with those that begin a sequence or without."""
        request = gateway_pb2.TokenizeRequest(model=model, text=text, add_special_tokens=special_tokens)
        return list((await self._reply(self._stub.Tokenize(request))).token_ids)


class BuilderClient(ServiceClient):
    """Builds as jobs.

    Example:
        >>> import asyncio
        >>> from enginehouse import BuilderClient
        >>> async def count():
        ...     async with BuilderClient("127.0.0.1:8401") as builder:
        ...         return len(await builder.builds())
        >>> asyncio.run(count())
        0
    """

    service = "builder"

    def _connect(self, channel: grpc.aio.Channel) -> None:
        self._stub = BuilderStub(channel)

    async def submit(self, spec: builder_pb2.BuildSpec, model: str = "") -> builder_pb2.Build:
        """Queues a build, whose engine gets the name `model` unless it is empty."""
        return await self._reply(self._stub.SubmitBuild(builder_pb2.SubmitBuildRequest(spec=spec, model=model)))

    def watch(self, build_id: str, first: int = 0) -> AsyncGenerator[builder_pb2.BuildEvent, None]:
        """The job's events from the number `first` on; the last one has its final state."""
        request = builder_pb2.WatchBuildRequest(build_id=build_id, from_sequence=first)
        return self._replies(self._stub.WatchBuild(request))

    async def builds(self) -> list[builder_pb2.Build]:
        """Jobs that are open and the last that have ended, newest first."""
        return list((await self._reply(self._stub.ListBuilds(builder_pb2.ListBuildsRequest()))).builds)

    async def cancel(self, build_id: str, timeout: float = 60) -> builder_pb2.Build:
        """Ends a job; one that has ended stays as it is.

        Args:
            timeout: seconds; a job whose builder has died ends within half a minute.

        Raises:
            Unavailable: it has not ended in that time.
        """
        request = builder_pb2.CancelBuildRequest(build_id=build_id)
        try:
            return await asyncio.wait_for(self._reply(self._stub.CancelBuild(request)), timeout)
        except TimeoutError:
            raise Unavailable(
                f"build {build_id} has not ended within {timeout:g} s; it was asked to, and ends when its builder, or the "
                "store, is back: look with `enginehouse builds ls`",
                reason="CANCEL_PENDING",
            ) from None

    async def upload(self, path: Path, progress: Progress = lambda *_: None, weights: bool = True) -> str:
        """Brings a checkpoint, a directory or a GGUF file, to the builder; gives what stands for it in `BuildSpec.checkpoint`.

        What is there already is not sent again: after an interruption, repeat the call. A build with dummy weights needs no
        weights. Raises what `enginehouse.upload` says.
        """
        return await upload(self, path, progress, weights)

    async def offer(self, files: Sequence[builder_pb2.CheckpointFile]) -> builder_pb2.OfferCheckpointResponse:
        """Says what a checkpoint consists of; the answer, what of it is missing."""
        return await self._reply(self._stub.OfferCheckpoint(builder_pb2.OfferCheckpointRequest(files=files)))

    async def send_file(self, header: builder_pb2.UploadFileHeader, parts: AsyncIterator[bytes]) -> None:
        """Sends a file's bytes from the header's offset on, as fast as they are taken. An error of `parts` breaks it off."""
        call = self._stub.UploadFile()
        try:
            await call.write(builder_pb2.UploadFileRequest(header=header))
            async for data in parts:
                await call.write(builder_pb2.UploadFileRequest(data=data))
            await call.done_writing()
            await call
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):  # it may have ended because all is there
            await self._outcome(call)
        finally:
            call.cancel()

    async def _outcome(self, call: "grpc.aio.StreamUnaryCall[Any, Any]") -> None:
        """How a call has ended that the builder ended while we wrote.

        grpc.aio says INTERNAL of the write that fails by that, until the builder's own status comes a moment later.
        """
        for _ in range(100):
            try:
                await call
                return
            except grpc.aio.AioRpcError as error:
                if error.details() != _WRITE_FAILED:
                    raise self._known(error, lost=True) from None
            await asyncio.sleep(0.01)
        raise Unavailable(f"lost the builder at {self.address}", reason="CONNECTION_LOST")


class ExecutorClient(ServiceClient):
    """Engines in and out of an executor's memory.

    Example:
        >>> import asyncio
        >>> from enginehouse import ExecutorClient
        >>> async def device():
        ...     async with ExecutorClient("127.0.0.1:8411") as executor:
        ...         return (await executor.status()).device
        >>> asyncio.run(device())
        'cpu'
    """

    service = "executor"

    def _connect(self, channel: grpc.aio.Channel) -> None:
        self._stub = ExecutorStub(channel)

    def load(
        self, engine: str, *, kv_memory: int = 0, evict: bool = False
    ) -> AsyncGenerator[executor_pb2.LoadEngineProgress, None]:
        """Loads an engine, by id or by model name; the last message holds its status, ready to serve.

        Args:
            kv_memory: bytes of KV cache that each rank gets; 0 leaves it to the executor.
            evict: where it does not fit, engines without requests make room, the one used longest ago first.

        Raises:
            ResourceExhausted: it does not fit; the message has the numbers.
        """
        is_id = re.fullmatch("[0-9a-f]{64}", engine)
        try:
            named = {"engine_id" if is_id else "model": engine}
            request = executor_pb2.LoadEngineRequest(kv_memory_bytes=kv_memory, evict=evict, **named)
        except UnicodeEncodeError as error:
            raise not_unicode(error) from None
        return self._replies(self._stub.LoadEngine(request))

    async def unload(self, engine_id: str, drain: float = 0) -> None:
        """Frees an engine's memory.

        Args:
            drain: seconds that its requests may take to end, while it takes no new ones; then they are cancelled.

        Raises:
            FailedPrecondition: it is not loaded.
        """
        request = executor_pb2.UnloadEngineRequest(engine_id=engine_id)
        request.drain.FromNanoseconds(int(drain * 1e9))
        await self._reply(self._stub.UnloadEngine(request))

    async def status(self) -> executor_pb2.ExecutorStatus:
        """What is loaded, and how busy it is."""
        return await self._reply(self._stub.GetStatus(executor_pb2.GetStatusRequest()))
