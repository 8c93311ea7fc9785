"""`python -m protos.probe HOST:PORT`: asks a service for its health (grpc.health.v1), and tells it by its exit status.

For health checks of containers and scripts, which then need no program that is not there already.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from engine.errors import EnginehouseError
from protos.dial import Credentials, why_not
from protos.options import add_tls_options
from protos.tls import ClientTls, TlsFiles, first_name

# A proxy that the environment names is for the outside: what is asked here is this very process' neighbour.
_OPTIONS = [("grpc.enable_http_proxy", 0)]


def probe(
    address: str, service: str = "", timeout: float = 3.0, tls: ClientTls | None = None, host: str | None = None
) -> str:
    """Asks once.

    Args:
        address: HOST:PORT.
        service: such as "enginehouse.v1.Gateway"; empty for the server as a whole.
        timeout: seconds for the connection and the answer together.
        tls: for a service that speaks TLS.
        host: whom its certificate must be for; by default that of the address.

    Returns:
        "SERVING", another state's name, or why there was no answer: "UNAVAILABLE: ...".
    """
    options: list[tuple[str, Any]] = [*_OPTIONS, *([("grpc.ssl_target_name_override", host)] if host else [])]
    channel = (
        grpc.secure_channel(address, tls.credentials(), options=options)
        if tls
        else grpc.insecure_channel(address, options=options)
    )
    with channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            known = why_not(error.details(), address, Credentials(tls))
            return f"{error.code().name}: {known or error.details()}"
    return HealthCheckResponse.ServingStatus.Name(answer.status)


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8400")
    return text


def main(arguments: list[str] | None = None) -> int:
    """The process: prints the state; its exit status is 0 if that is SERVING, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m protos.probe", description="Asks a service for its health: exit status 0 if it serves, else 1."
    )
    parser.add_argument("address", type=_address, metavar="HOST:PORT")
    parser.add_argument(
        "--service", default="", metavar="NAME", help="such as enginehouse.v1.Gateway [the server as a whole]"
    )
    parser.add_argument("--timeout", default=3.0, type=float, metavar="SECONDS", help="for the answer [%(default)g]")
    add_tls_options(
        parser,
        cert="the certificate to show (mutual TLS); without --tls-ca also the one that is asked for, as of the service itself",
        ca="speak TLS, and trust this authority, whose certificate must be for the host of the address",
    )
    parsed = parser.parse_args(arguments)
    try:
        files = TlsFiles.of(parsed.tls_cert, parsed.tls_key, parsed.tls_ca)
        host = None
        if files and files.cert and not files.ca:  # what the environment of a service's own container says
            files, host = replace(files, ca=files.cert), first_name(files.cert)
        tls = ClientTls(files) if files else None
    except EnginehouseError as error:
        print(error.message)
        return 1
    state = probe(parsed.address, parsed.service, parsed.timeout, tls, host)
    print(state)
    return 0 if state == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
