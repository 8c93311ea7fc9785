"""What is told of every gRPC call that a service answers: its request id, its metrics, and one line in the log when it ends."""

import asyncio
import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from engine.errors import EnginehouseError, Internal
from protos import logs
from protos.histogram import CALL

if TYPE_CHECKING:  # prometheus_client comes with services that have metrics, not with clients
    from protos.metrics import Metrics

_POLLED = ("grpc.health.v1.Health/", "enginehouse.v1.Executor/GetStatus")  # so often that only their failures are news

log = logging.getLogger(__name__)

# By how much a client may give up before the server's clock says so: gRPC rounds the time that it sends up by a hundredth at
# most, and the server counts from when it arrives.
_ROUNDED, _ON_THE_WAY = 0.01, 0.02  # of the call's time; seconds


class Calls:
    """Counts calls. Without metrics, it only names and logs them."""

    def __init__(self, metrics: "Metrics | None" = None) -> None:
        self._ended = self._seconds = None
        if metrics:
            self._ended = metrics.counter(
                "grpc_calls_total", "Calls that have ended, by gRPC status.", "method", "code"
            )
            self._seconds = metrics.histograms(
                "grpc_call_duration_seconds", "From a call's beginning to its end.", CALL, "method"
            )

    def ended(self, method: str, code: str, seconds: float) -> None:
        """Counts a call."""
        if self._ended and self._seconds:
            self._ended.add(method, code)
            self._seconds.of(method).observe(seconds)


class Call:
    """One call, as a context around its handler.

    Args:
        method: "/package.Service/Method".
    """

    def __init__(self, calls: Calls, method: str, context: Any) -> None:
        self._calls, self._method, self._context = calls, method.removeprefix("/"), context
        self._notes: dict[str, object] = {}
        self._request_id = ""

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return self

    async def begin(self) -> None:
        """Names the request: as the client did in x-request-id, else anew. The client gets the name in initial metadata.

        Raises:
            InvalidArgument: the client's is none.
        """
        given = logs.given_request_id(self._context.invocation_metadata() or ())
        self._request_id = logs.new_request_id()
        logs.enter(self._request_id, self._notes)
        if given:
            self._request_id = logs.check_request_id(given)
            logs.enter(self._request_id, self._notes)
        await self._context.send_initial_metadata(((logs.REQUEST_ID_KEY, self._request_id),))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Does not rely on the task's context: a generator that nobody finishes is closed in another."""
        seconds = time.monotonic() - self._began
        code = status(error, self._context, seconds)
        self._calls.ended(self._method, code, seconds)
        level = logging.DEBUG if code == "OK" and self._method.startswith(_POLLED) else logging.INFO
        if log.isEnabledFor(level):
            fields = {"method": self._method, "code": code, "total_ms": logs.milliseconds(seconds), **self._notes}
            name = self._method.rpartition(".")[2]
            log.log(level, "%s %s", name, code, extra=logs.fields(**{"request_id": self._request_id, **fields}))


def status(error: BaseException | None, context: Any, seconds: float) -> str:
    """The name of the gRPC status with which a handler's end by this error, or without one, ends its call after so long."""
    if error is None:
        return grpc.StatusCode.OK.name
    if isinstance(error, asyncio.CancelledError | GeneratorExit):  # the client has left, or its time is over
        remaining = context.time_remaining()
        late = remaining is not None and remaining <= _ROUNDED * (seconds + remaining) + _ON_THE_WAY
        return (grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED).name
    if isinstance(error, grpc.aio.AbortError):
        code = context.code()
        return code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code, grpc.StatusCode.UNKNOWN.name)
    return _NAMES[error.code if isinstance(error, EnginehouseError) else Internal.code]


_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
