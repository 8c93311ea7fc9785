"""python -m gateway: the gateway as a process."""

import argparse
import sys

import uvloop

from engine.backends import open_store
from gateway.router import Router
from gateway.server import Gateway
from protos import tracing
from protos.calls import Calls
from protos.metrics import Metrics
from protos.options import add_drain, add_options
from protos.rpc import main, serve
from protos.v1.gateway_pb2_grpc import add_GatewayServicer_to_server

_PATIENCE = 5.0  # seconds that a request waits for a store that is away, if what it needs is not known yet


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8500")
    return text


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
    add_drain(parser)
    tracing.add_options(parser)
    add_options(parser)
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> None:
    router = Router(arguments.executor)
    tracing.configure("gateway", arguments.traces)
    metrics = Metrics()
    gateway = Gateway(open_store(arguments.store, _PATIENCE), router, metrics)
    router.start()
    with metrics.served("gateway", arguments.host, arguments.metrics_port):
        await serve(
            "gateway",
            lambda server: add_GatewayServicer_to_server(gateway, server),
            arguments.host,
            arguments.port,
            on_stop=router.stop,
            grace=arguments.drain_seconds,
            calls=Calls(metrics),
        )


if __name__ == "__main__":
    given = _arguments()
    sys.exit(main("gateway", _run(given), given, uvloop.new_event_loop))
