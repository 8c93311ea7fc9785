"""What an HTTP client is sent: JSON, or server-sent events, and errors in either."""

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.types import Send

from engine.errors import EnginehouseError
from gateway.http import errors
from gateway.http.context import HttpContext

_DONE = b"data: [DONE]\n\n"


class Answer:
    """One request's.

    Attributes:
        begun: its status has been sent.
    """

    def __init__(self, send: Send, context: HttpContext) -> None:
        self._send, self._context = send, context
        self.begun = False

    async def json(self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """All of it."""
        await self.bytes(msgspec.json.encode(body), "application/json", status, headers)

    async def bytes(self, body: bytes, kind: str, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """All of it, of a media type."""
        await self._begin(status, {"content-type": kind, "content-length": str(len(body)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def event(self, body: Any) -> None:
        """One of a stream's."""
        if not self.begun:
            await self._begin(
                200,
                {
                    "content-type": "text/event-stream; charset=utf-8",
                    "cache-control": "no-store",
                    "x-accel-buffering": "no",  # proxies would hold events back
                },
            )
        await self._send(
            {"type": "http.response.body", "body": b"data: " + msgspec.json.encode(body) + b"\n\n", "more_body": True}
        )

    async def end(self) -> None:
        """Of a stream."""
        await self._send({"type": "http.response.body", "body": _DONE})

    async def fail(self, error: EnginehouseError) -> None:
        """The error: as the answer, or as a stream's last event."""
        if self.begun:
            await self.event(errors.body(error))
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self.json(errors.body(error), errors.status(error), errors.headers(error))

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.begun = True
        shown = [(name.encode(), value.encode("latin-1")) for name, value in {**self._context.sent, **headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": shown})
