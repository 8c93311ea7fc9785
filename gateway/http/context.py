"""An HTTP request as the Gateway service's code sees a call: the same identity, limits, logs and end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request


class HttpContext:
    """What servicers, and what is around them, use of grpc.aio's ServicerContext.

    Attributes:
        sent: the answer's headers that calls have, such as the request's id.
        gone: the client has left.
    """

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        """`metadata`: the request's headers, in lower case."""
        self._metadata = metadata
        self._callbacks: list[Callable[[Any], None]] = []
        self.sent: dict[str, str] = {}
        self.gone = False

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """The request's headers."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """None: HTTP clients tell no deadline; they leave."""
        return None

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """Kept until the answer begins."""
        self.sent |= dict(metadata)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Called when the request has ended in whatever way."""
        self._callbacks.append(callback)

    def done(self) -> None:
        """The request has ended."""
        for callback in self._callbacks:
            callback(self)

    def part(self) -> "HttpContext":
        """Of one of several calls that the request makes."""
        return HttpContext(self._metadata)

    def auth_context(self) -> dict[str, Any]:
        """Nothing: whether a client's certificate is good is seen by TLS, its names are not."""
        return {}


@contextlib.asynccontextmanager
async def cancelled_when_gone(request: Request, context: HttpContext) -> AsyncIterator[None]:
    """Cancels this task when the client leaves. The request's body must have been read."""
    task = asyncio.current_task()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        context.gone = True
        if task:
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
