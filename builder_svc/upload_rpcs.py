"""The upload half of the service `Builder`: OfferCheckpoint and UploadFile of protos/v1/builder.proto."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc

from builder_svc.uploads import OfferedFile, Uploads
from engine.errors import InvalidArgument
from protos.v1.builder_pb2 import (
    MissingFile,
    OfferCheckpointRequest,
    OfferCheckpointResponse,
    UploadFileRequest,
    UploadFileResponse,
)

MAX_DATA = 4 * 1024 * 1024  # bytes of one message

Context = grpc.aio.ServicerContext[Any, Any]
_Result = TypeVar("_Result")


class UploadServicer:
    """Takes checkpoints. Nothing blocks the event loop, and of each upload one message is in memory.

    Args:
        on_bytes: called with the size of each message's bytes that have come.
    """

    def __init__(self, uploads: Uploads, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        self._uploads = uploads
        self._on_bytes = on_bytes

    async def OfferCheckpoint(self, request: OfferCheckpointRequest, _context: Context) -> OfferCheckpointResponse:
        files = [OfferedFile(file.name, file.sha256, file.size) for file in request.files]
        offer = await asyncio.get_running_loop().run_in_executor(self._uploads.offers, self._uploads.offer, files)
        missing = [MissingFile(sha256=digest, offset=offset) for digest, offset in offer.missing.items()]
        return OfferCheckpointResponse(checkpoint=offer.checkpoint, missing=missing)

    async def UploadFile(self, requests: AsyncIterator[UploadFileRequest], _context: Context) -> UploadFileResponse:
        messages = aiter(requests)
        first = await anext(messages, UploadFileRequest())
        if not first.HasField("header"):
            raise InvalidArgument("an upload begins with a header", reason="HEADER_MISSING")
        header = first.header
        file = self._uploads.receive(header.sha256, header.size, header.offset)
        if await self._in_thread(self._uploads.is_whole, header.sha256, header.size):
            return UploadFileResponse()
        try:
            await self._in_thread(file.open)
            async for message in messages:
                data = read_data(message)
                await self._in_thread(file.write, data)
                self._on_bytes(len(data))
            await self._in_thread(self._uploads.finish, file)
        finally:
            file.break_off()  # what still runs for a call that was lost
            closing = self._uploads.pool.submit(file.close)  # no second cancel calls it off: the file's lock is held
            await asyncio.shield(asyncio.wrap_future(closing))
        return UploadFileResponse()

    async def _in_thread(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._uploads.pool, function, *arguments)


def read_data(message: UploadFileRequest) -> bytes:
    """The bytes in a message that follows the header. Raises InvalidArgument."""
    if message.WhichOneof("part") != "data":
        raise InvalidArgument("after an upload's header come its bytes and nothing else", reason="DATA_MISSING")
    if len(message.data) > MAX_DATA:
        raise InvalidArgument(
            f"{len(message.data)} bytes in one message: send {MAX_DATA} at most", reason="MESSAGE_TOO_LARGE"
        )
    return message.data
