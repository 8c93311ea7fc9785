"""The HTTP server on the gateway's event loop: its port, TLS, and an end that lets requests end first."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from engine.errors import EnginehouseError, InvalidArgument, Unavailable
from gateway.http.endpoint import Surroundings

_LAST_MOMENTS = 1  # seconds in which requests that are cut hear of it


class _Server(uvicorn.Server):
    """Leaves signals to who runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Listener:
    """Serves an application.

    Attributes:
        url: where.
    """

    def __init__(self, app: ASGIApp, around: Surroundings, host: str, port: int, grace: float) -> None:
        """Takes the port; 0 takes a free one. `grace`: seconds that requests may take to end, before they are cut.

        Raises:
            Unavailable: the port is taken.
            InvalidArgument: clients shall be known by the names in their certificates, which HTTP's are not.
        """
        access = around.access
        if access.names:
            raise InvalidArgument(
                "--http-port and --allow-client exclude each other: HTTP clients are known by API keys (--api-keys)",
                reason="HTTP_CLIENT_NAMES",
            )
        self._around, self._grace = around, grace
        host = host.strip("[]")
        self._socket = _bind(host, port)
        tls = access.server
        self._server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=round(grace) + _LAST_MOMENTS,
                ssl_context_factory=(lambda _config, _default: tls.context()) if tls else None,
            )
        )
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{shown}:{self._socket.getsockname()[1]}"
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to serve, on the running event loop."""
        self._task = asyncio.create_task(self._server.serve([self._socket]), name="http")

    async def stop(self) -> None:
        """Takes no more requests, and returns when those that run have ended."""
        self._server.should_exit = True
        if self._task:
            await self._task
        self._socket.close()

    def cut(self, error: EnginehouseError) -> None:
        """Ends those that run."""
        self._around.scissors.cut(error)


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        what = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise Unavailable(
            f"cannot listen on {host} port {port}: {what}; choose another port with --http-port (0 for any that is free)",
            reason="PORT_TAKEN",
        ) from None
