"""What every service does around its servicer: errors to gRPC status and back, health, binding, an orderly end."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from engine.errors import EnginehouseError, Internal, InvalidArgument, Unavailable
from protos import logs
from protos.access import EVERYBODY, Access
from protos.calls import Call, Calls
from protos.cut import Cuttable, Scissors
from protos.v1.common_pb2 import Failure

DOMAIN = "enginehouse"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
# Without SO_REUSEPORT a second server on a port fails to bind; with it, it would silently take half of the connections.
_SERVER_OPTIONS = CHANNEL_OPTIONS + [("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 10_000)]

# A status travels in HTTP/2 trailers, twice and partly percent-encoded; past 8 KiB the client would see another error.
_MAX_STATUS_TEXT, _MAX_METADATA_VALUE = 1500, 200

_LAST_MOMENTS = 1.0  # seconds in which calls that are cut hear of it

ALIVE = "alive"  # the name whose health says that the process works, also while it ends: no reason to kill it

log = logging.getLogger(__name__)


def to_failure(error: BaseException) -> Failure:
    """The wire form of an error; one that is not ours is INTERNAL, with its type."""
    known = error if isinstance(error, EnginehouseError) else Internal(f"{type(error).__name__}: {error}")
    message = known.message.encode(errors="backslashreplace").decode()  # a file name may be no valid Unicode
    failure = Failure(code=known.code, reason=known.reason, message=message, metadata=known.metadata)
    if known.retry_after is not None:
        failure.retry_delay.FromNanoseconds(int(known.retry_after * 1e9))
    return failure


def from_failure(failure: Failure) -> EnginehouseError:
    """The error that `to_failure` was given."""
    kind = _BY_CODE.get(failure.code, EnginehouseError)
    delay = failure.retry_delay
    return kind(
        failure.message,
        reason=failure.reason,
        metadata=dict(failure.metadata),
        code=failure.code,
        retry_after=delay.seconds + delay.nanos / 1e9 if failure.HasField("retry_delay") else None,
    )


def from_rpc_error(error: grpc.RpcError) -> EnginehouseError:
    """The error behind a failed call, with what the server gave of google.rpc.ErrorInfo and RetryInfo."""
    code = int(error.code().value[0])
    failure = Failure(code=code, reason=error.code().name, message=error.details() or error.code().name)
    status = _rich_status(error)
    for detail in status.details if status else []:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            failure.reason = info.reason
            failure.metadata.update(info.metadata)
        elif detail.Unpack(retry):
            failure.retry_delay.CopyFrom(retry.retry_delay)
    return from_failure(failure)


def _rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    metadata: Any = error.trailing_metadata()
    packed = dict(metadata or ()).get("grpc-status-details-bin")
    return status_pb2.Status.FromString(packed) if packed else None


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> None:
    """Ends the call with the error's status, google.rpc.ErrorInfo and, where it says when to retry, RetryInfo."""
    failure = to_failure(error)
    text = failure.message.encode()
    if len(text) > _MAX_STATUS_TEXT:
        failure.message = text[:_MAX_STATUS_TEXT].decode(errors="ignore") + " ..."
    metadata = {key: value[:_MAX_METADATA_VALUE] for key, value in failure.metadata.items()}
    if request_id := logs.request_id():
        metadata.setdefault("request_id", request_id)
    logs.note(reason=failure.reason)
    status = status_pb2.Status(code=failure.code, message=failure.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN, metadata=metadata))
    if failure.HasField("retry_delay"):
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=failure.retry_delay))
    await context.abort_with_status(rpc_status.to_status(status))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Lets servicers raise EnginehouseError; whatever else they raise is logged and becomes INTERNAL.

    Calls get their request id here, are counted and logged (`protos/calls.py`); those that nobody may make end here.
    """

    def __init__(self, calls: Calls | None = None, access: Access = EVERYBODY) -> None:
        self._calls = calls or Calls()
        self._access = access
        self._scissors = Scissors()

    def cut(self, error: EnginehouseError) -> None:
        """Ends all calls that run, with this error."""
        self._scissors.cut(error)

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method, calls = handler_call_details.method, self._calls
        scissors, access = self._scissors, self._access

        async def fail(context: Any, error: Exception) -> None:
            if isinstance(error, grpc.aio.AbortError):
                raise error
            if not isinstance(error, EnginehouseError):
                log.exception("%s failed", method)
            await abort(context, error)

        read = _reader(handler)

        def unary(inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def call(request: Any, context: Any) -> Any:
                with Call(calls, method, context) as observed:
                    try:
                        with Cuttable(scissors):
                            await observed.begin()
                            access.check(method, context)
                            return await inner(read(request), context)
                    except Exception as error:
                        return await fail(context, error)

            return call

        def stream(inner: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncIterator[Any]]:
            async def call(request: Any, context: Any) -> AsyncIterator[Any]:
                with Call(calls, method, context) as observed:
                    try:
                        with Cuttable(scissors) as cuttable:
                            await observed.begin()
                            access.check(method, context)
                            # a lost call ends the servicer's, too
                            async with aclosing(inner(read(request), context)) as responses:
                                async for response in responses:
                                    cuttable.pause()
                                    yield response
                                    cuttable.go_on()
                    except Exception as error:
                        await fail(context, error)

            return call

        shape = ("stream_" if handler.request_streaming else "unary_") + (
            "stream" if handler.response_streaming else "unary"
        )
        wrap = stream if handler.response_streaming else unary
        make = getattr(grpc, f"{shape}_rpc_method_handler")
        return make(wrap(getattr(handler, shape)), None, handler.response_serializer)


def _reader(handler: Any) -> Callable[[Any], Any]:
    """Makes messages of what a call's handler is given, bytes or a stream of them. Raises InvalidArgument for what is none.

    grpc would do it before the handler, and end the call with UNKNOWN.
    """

    def read(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            raise InvalidArgument(
                f"the request cannot be read ({error}): check the client's .proto files, and that its texts are UTF-8",
                reason="REQUEST_MALFORMED",
            ) from None

    async def each(stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in stream:
            yield read(data)

    return each if handler.request_streaming else read


class Beside(Protocol):
    """Another server of the same process, which ends with the service."""

    async def stop(self) -> None:
        """Takes no more requests, and returns when those that run have ended."""

    def cut(self, error: EnginehouseError) -> None:
        """Ends those that run, with this error."""


async def serve(
    service: str,
    register: Callable[[grpc.aio.Server], None],
    host: str,
    port: int,
    *,
    on_stop: Callable[[], Awaitable[None]],
    before_stop: Callable[[], Awaitable[None]] | None = None,
    grace: float = 5.0,
    calls: Calls | None = None,
    access: Access = EVERYBODY,
    limits: Sequence[tuple[str, int]] = (),
    beside: Sequence[Beside] = (),
) -> None:
    """Serves until SIGTERM or SIGINT, then stops taking calls, lets running ones end within `grace` seconds, and returns.

    What has not ended by then ends with UNAVAILABLE. A second signal ends every wait.

    Prints one line "enginehouse <service> listening on <host>:<port>" to stdout; port 0 takes a free one.

    Args:
        service: "builder", "executor" or "gateway".
        register: adds the servicers.
        before_stop: called when the signal has come, while calls run and new ones still come; makes those end that would not
            by themselves. May be cancelled.
        on_stop: called after the last call has ended.
        calls: what counts them.
        access: who may call.
        limits: gRPC's options for the server, beside those that all services have.
        beside: what serves already, and stops when this does.

    Raises:
        Unavailable: the port cannot be bound.
    """
    interceptor = ErrorInterceptor(calls, access)
    options = {**dict(_SERVER_OPTIONS), **dict(limits)}
    server = grpc.aio.server(interceptors=[interceptor], options=list(options.items()))
    register(server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    try:
        place = f"{host}:{port}"
        bound = (
            server.add_secure_port(place, access.server.credentials())
            if access.server
            else server.add_insecure_port(place)
        )
    except RuntimeError:
        bound = 0
    if not bound:
        raise Unavailable(
            f"cannot listen on {host}:{port}; is the port taken? Choose another with --port", reason="PORT_TAKEN"
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    ready = ("", f"enginehouse.v1.{service.capitalize()}")
    for name in (*ready, ALIVE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    print(f"enginehouse {service} listening on {host}:{bound}", flush=True)
    await stop.wait()
    stop.clear()
    for name in ready:
        await checks.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    if before_stop:
        await _within(None, stop, asyncio.ensure_future(before_stop()))
    ended = asyncio.gather(server.stop(grace + _LAST_MOMENTS), *(other.stop() for other in beside))
    await _within(grace, stop, asyncio.shield(ended))
    error = Unavailable(f"the {service} was stopped before the call had ended: send it again", reason="SERVICE_STOPPED")
    interceptor.cut(error)
    for other in beside:
        other.cut(error)
    await ended
    await on_stop()


async def _within(seconds: float | None, stop: asyncio.Event, work: "asyncio.Future[Any]") -> None:
    """Waits for some work, at most so many seconds and until `stop` is set; then it is cancelled."""
    signalled = asyncio.ensure_future(stop.wait())
    either: list[asyncio.Future[Any]] = [work, signalled]
    await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if not work.cancel():
        work.result()


def main(
    service: str,
    run: Awaitable[None],
    options: argparse.Namespace | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Runs a service's coroutine as a process; the exit status. An EnginehouseError is one line on stderr, no traceback.

    Args:
        options: as `logs.configure` takes them.
    """
    logs.configure(service, options)

    async def body() -> None:
        await run

    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(body())
    except EnginehouseError as error:
        if logs.is_json():
            log.error("%s", error.message, extra=logs.fields(reason=error.reason))
        else:
            print(f"{service}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before serve() could handle it
        return 130
    return 0


def _subclasses(kind: type[EnginehouseError]) -> list[type[EnginehouseError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _subclasses(child))]


_BY_CODE = {kind.code: kind for kind in reversed(_subclasses(EnginehouseError))}
