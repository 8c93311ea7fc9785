"""What the clients of all services have in common: a channel with the caller's credentials, and errors in words."""

from collections.abc import AsyncGenerator, Awaitable
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import grpc

from engine.errors import EnginehouseError, InvalidArgument, Unavailable
from enginehouse.credentials import Given, find
from protos import tracing
from protos.dial import why_not
from protos.rpc import CHANNEL_OPTIONS, from_rpc_error

Reply = TypeVar("Reply")


class ServiceClient:
    """One of them: an `async with` block around its channel."""

    service: ClassVar[str]
    remedy: ClassVar[str] = ""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ) -> None:
        """`address` is host:port; nothing is connected before the first call.

        Args:
            api_key: who is calling.  [$ENGINEHOUSE_API_KEY]
            tls_ca: PEM file of the authority whose servers are trusted, "system" for public ones; speaks TLS.
                [$ENGINEHOUSE_TLS_CA; no TLS]
            tls_cert: PEM file of the certificate that the server is shown (mutual TLS).  [$ENGINEHOUSE_TLS_CERT]
            tls_key: its private key.  [$ENGINEHOUSE_TLS_KEY]

        Raises:
            InvalidArgument, FailedPrecondition: a file is not there, or not what it should be.
        """
        self.address = address
        self._credentials = find(Given(api_key, None, tls_ca, tls_cert, tls_key))

    async def __aenter__(self) -> Self:
        options: list[tuple[str, int]] = list(CHANNEL_OPTIONS)
        if is_loopback(self.address):
            options.append(("grpc.enable_http_proxy", 0))  # $http_proxy leads nowhere near this machine's own services
        self._channel = self._credentials.channel(self.address, options)
        self._connect(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    def _connect(self, channel: grpc.aio.Channel) -> None:
        raise NotImplementedError

    async def _reply(self, call: Awaitable[Reply]) -> Reply:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._known(error) from None

    async def _replies(
        self, call: "grpc.aio.UnaryStreamCall[Any, Reply]", span: tracing.Span | None = None
    ) -> AsyncGenerator[Reply, None]:
        received, reason = False, ""
        try:
            async for reply in call:
                received = True
                yield reply
        except grpc.aio.AioRpcError as error:
            known = self._known(error, lost=received)
            reason = known.reason
            raise known from None
        finally:
            call.cancel()
            if span:
                span.end(reason)

    def _known(self, error: grpc.aio.AioRpcError, *, lost: bool = False) -> EnginehouseError:
        """The service's own error in its own words, or what is wrong with the connection."""
        own = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata())
        if own or error.code() is not grpc.StatusCode.UNAVAILABLE:
            return from_rpc_error(error)
        if lost:
            return Unavailable(f"lost the {self.service} at {self.address}", reason="CONNECTION_LOST")
        if known := why_not(error.details() or "", self.address, self._credentials):
            return Unavailable(f"the {self.service} at {known}", reason="TLS_FAILED")
        return Unavailable(f"no {self.service} answers at {self.address}{self.remedy}", reason="NOT_REACHABLE")


def not_unicode(error: UnicodeEncodeError) -> InvalidArgument:
    """What to say of text that cannot be sent, such as a command line's bytes that are no UTF-8."""
    near = error.object[max(error.start - 20, 0) : error.start + 20]
    return InvalidArgument(f"text that is not valid Unicode, at {near!r}: give it as UTF-8", reason="TEXT_INVALID")


def is_loopback(address: str) -> bool:
    """Whether a host:port is on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or host.startswith("127.") or host == "::1"
