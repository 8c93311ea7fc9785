"""What is around every HTTP request: its id, its line in the log, who makes it, its errors, and its end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from engine.errors import EnginehouseError, InvalidArgument, Unavailable
from gateway.http.answer import Answer
from gateway.http.context import HttpContext
from gateway.http.errors import known
from protos import logs
from protos.access import Access
from protos.calls import Call, Calls
from protos.cut import Cuttable, Scissors

Handler = Callable[[Request, HttpContext, Answer], Awaitable[None]]

log = logging.getLogger(__name__)


class Surroundings:
    """What the endpoints of one server share.

    Attributes:
        access: who may make requests.
        max_bytes: of a request's body.
        scissors: end the requests that run.
    """

    def __init__(self, access: Access, max_bytes: int) -> None:
        self.access, self.max_bytes = access, max_bytes
        self.scissors = Scissors()
        self.calls = Calls()  # requests that generate are counted where all are, others not


class Endpoint:
    """An ASGI application of one path.

    Args:
        handlers: by method.
        open_to_all: needs no API key.
    """

    def __init__(self, around: Surroundings, handlers: dict[str, Handler], open_to_all: bool = False) -> None:
        self._around, self._handlers, self._open = around, handlers, open_to_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        request = Request(scope, receive, send)
        context = HttpContext(request.headers.items())
        answer = Answer(send, context)
        name = f"{request.method} {scope['path']}"
        try:
            with Call(self._around.calls, name, context) as call:
                try:
                    with Cuttable(self._around.scissors):
                        await call.begin()
                        await self._handle(request, context, answer)
                except EnginehouseError as error:
                    logs.note(reason=error.reason)
                    raise
                except Exception:
                    log.exception("%s failed", name)
                    raise
                finally:
                    context.done()
        except asyncio.CancelledError:
            if not context.gone:
                raise
        except Exception as error:
            await answer.fail(known(error))

    async def _handle(self, request: Request, context: HttpContext, answer: Answer) -> None:
        handler = self._handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            raise InvalidArgument(
                f"{request.url.path} does not take {request.method}: send {' or '.join(self._handlers)}",
                reason="METHOD_NOT_ALLOWED",
                metadata={"allow": ", ".join(self._handlers)},
            )
        if not self._open:
            self._around.access.check(request.url.path, context)
        await handler(request, context, answer)


async def read_json(request: Request, most: int) -> bytes:
    """All of a request's body. Raises InvalidArgument for more bytes and for what is not called JSON, Unavailable if the client
    leaves within it.

    A browser lets any site's page send other media types here without asking whether it may.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise InvalidArgument(
            f"the request's content type is {kind[:80]!r}: send 'Content-Type: application/json'",
            reason="MEDIA_TYPE_UNKNOWN",
        )
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Unavailable("the client left within its request", reason="CLIENT_GONE")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise InvalidArgument(
                f"the request has more than {most} bytes: make it smaller, or give the gateway a higher --max-message-bytes",
                reason="BODY_TOO_LARGE",
            )
        if not message.get("more_body"):
            return b"".join(parts)
