"""python -m gateway: the gateway as a process."""

import argparse
import functools
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvloop

from engine.backends import open_store
from gateway.admission import DEFAULT_LIMITS, Limits
from gateway.failover import PATIENCE, Failover
from gateway.link import Link
from gateway.router import Router
from gateway.server import Gateway
from protos import tracing
from protos.access import Access
from protos.calls import Calls
from protos.dial import Credentials
from protos.metrics import Metrics
from protos.options import add_client_options, add_drain, add_options, port
from protos.rpc import Beside, main, serve
from protos.v1.gateway_pb2_grpc import add_GatewayServicer_to_server

_PATIENCE = 5.0  # seconds that a request waits for a store that is away, if what it needs is not known yet


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8500")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is no limit: give 1 to {2**31 - 1}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to 3600")
    return seconds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m gateway", description="Prompt -> executor -> text, over gRPC.")
    parser.add_argument(
        "--store", required=True, metavar="URL", help="where the engines are: a directory, file:// or s3://"
    )
    parser.add_argument(
        "--executor",
        required=True,
        action="append",
        type=_address,
        metavar="HOST:PORT",
        help="an executor; repeat it for more. Those that are down are connected when they come up",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    parser.add_argument("--port", default=8400, type=int, help="port to listen on, 0 for a free one [%(default)s]")
    for option, default, meaning in (
        ("--max-streams", DEFAULT_LIMITS.max_streams, "Generate calls under way, of all tenants; more of them wait"),
        ("--max-waiting", DEFAULT_LIMITS.max_waiting, "Generate calls that may wait; more are refused"),
        ("--max-prompt-bytes", DEFAULT_LIMITS.max_prompt_bytes, "of a prompt's text"),
        ("--max-message-bytes", 16 * 1024 * 1024, "of a request"),
        ("--max-streams-per-connection", 1000, "calls at a time on one connection; a client holds more of them back"),
    ):
        parser.add_argument(option, type=_count, default=default, metavar="N", help=f"{meaning} [%(default)s]")
    parser.add_argument(
        "--http-port",
        type=port,
        metavar="PORT",
        help="answer OpenAI's HTTP API there, on the same host, and show a page at /; 0 takes a free one [no HTTP]",
    )
    parser.add_argument("--builder", type=_address, metavar="HOST:PORT", help="whose builds the page shows [none]")
    add_client_options(parser, "executor")
    add_client_options(parser, "builder")
    parser.add_argument(
        "--failover-patience",
        default=PATIENCE,
        type=_seconds,
        metavar="SECONDS",
        help="how long a request that has lost its executor waits for another one that has its engine [%(default)s]",
    )
    add_drain(parser)
    tracing.add_options(parser)
    add_options(parser)
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> None:
    access = Access.of("gateway", arguments)
    credentials = _credentials(arguments, "executor")
    router = Router(arguments.executor, link=functools.partial(Link, credentials=credentials))
    tracing.configure("gateway", arguments.traces)
    metrics = Metrics()
    access.watch(metrics)
    limits = Limits(arguments.max_streams, arguments.max_waiting, arguments.max_prompt_bytes)
    failover = Failover(router, arguments.failover_patience)
    gateway = Gateway(open_store(arguments.store, _PATIENCE), router, metrics, limits, failover)
    router.start()
    with metrics.served("gateway", arguments.host, arguments.metrics_port):
        async with _http(gateway, access, arguments) as beside:
            await serve(
                "gateway",
                lambda server: add_GatewayServicer_to_server(gateway, server),
                arguments.host,
                arguments.port,
                on_stop=router.stop,
                grace=arguments.drain_seconds,
                calls=Calls(metrics),
                access=access,
                limits=(
                    ("grpc.max_receive_message_length", arguments.max_message_bytes),
                    ("grpc.max_concurrent_streams", arguments.max_streams_per_connection),
                ),
                beside=beside,
            )


@asynccontextmanager
async def _http(gateway: Gateway, access: Access, arguments: argparse.Namespace) -> AsyncIterator[Sequence[Beside]]:
    """The HTTP server, if one is wanted."""
    if arguments.http_port is None:
        yield ()
        return
    from gateway.http.app import application  # with libraries that nothing else needs
    from gateway.http.endpoint import Surroundings
    from gateway.http.listener import Listener
    from gateway.http.status import Status

    around = Surroundings(access, arguments.max_message_bytes)
    status = Status(gateway, arguments.builder, _credentials(arguments, "builder"))
    app = application(gateway, around, status)
    listener = Listener(app, around, arguments.host, arguments.http_port, arguments.drain_seconds)
    print(f"enginehouse gateway http on {listener.url}", flush=True)
    listener.start()
    try:
        yield (listener,)
    finally:
        await listener.stop()
        await status.close()


def _credentials(arguments: argparse.Namespace, of: str) -> Credentials:
    """As `add_client_options` reads them."""
    cert, key, ca, secret = (
        getattr(arguments, f"{of}_{name}") for name in ("tls_cert", "tls_key", "tls_ca", "api_key_file")
    )
    return Credentials.of(cert, key, ca, secret, f"--{of}-tls")


if __name__ == "__main__":
    given = _arguments()
    sys.exit(main("gateway", _run(given), given, uvloop.new_event_loop))
