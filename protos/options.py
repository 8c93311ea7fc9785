"""What every service's command line has beside its own. Imports no grpc."""

import argparse
import math
import os

from protos import logs
from protos.tls import CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE

KEYS_VARIABLE = "ENGINEHOUSE_API_KEYS"

DRAIN_SECONDS = 20.0  # with the seconds that follow it, less than the 30 that Kubernetes and Compose give


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every service's command line has beside its own."""
    parser.add_argument(
        "--metrics-port",
        type=port,
        metavar="PORT",
        help="answer Prometheus there, on the same host, at /metrics; 0 takes a free one [no metrics]",
    )
    _add_file(
        parser, "--tls-cert", CERT_VARIABLE, "speak TLS with this certificate and those that lead to its authority"
    )
    _add_file(parser, "--tls-key", KEY_VARIABLE, "the certificate's private key")
    _add_file(parser, "--tls-ca", CA_VARIABLE, "take only clients with a certificate of this authority (mutual TLS)")
    parser.add_argument(
        "--allow-client",
        action="append",
        default=[],
        metavar="NAME",
        help="of those, only clients whose certificate has this common, DNS or URI (SPIFFE) name; may be repeated [all]",
    )
    _add_file(parser, "--api-keys", KEYS_VARIABLE, "take only calls with one of these keys (`enginehouse keys add`)")
    parser.add_argument(
        "--insecure", action="store_true", help="let in everybody, on other addresses than this machine's own, too"
    )
    logs.add_options(parser)


def add_tls_options(parser: argparse.ArgumentParser, *, cert: str, ca: str) -> None:
    """--tls-cert, --tls-key and --tls-ca, with what they mean."""
    _add_file(parser, "--tls-cert", CERT_VARIABLE, cert)
    _add_file(parser, "--tls-key", KEY_VARIABLE, "the certificate's private key")
    _add_file(parser, "--tls-ca", CA_VARIABLE, ca)


def add_client_options(parser: argparse.ArgumentParser, of: str) -> None:
    """What a service says that is a client of others, such as --executor-tls-ca where `of` is "executor"."""

    def add(name: str, meaning: str) -> None:
        variable = f"ENGINEHOUSE_{of}_{name}".upper().replace("-", "_")
        _add_file(parser, f"--{of}-{name}", variable, meaning)

    add("tls-ca", f"speak TLS with {of}s, which this authority has signed")
    add("tls-cert", "the certificate that they are shown (mutual TLS)")
    add("tls-key", "its private key")
    add("api-key-file", f"a file with the API key that {of}s ask for")


def _add_file(parser: argparse.ArgumentParser, option: str, variable: str, meaning: str) -> None:
    parser.add_argument(
        option,
        metavar="FILE",
        default=os.environ.get(variable) or None,
        help=f"{meaning}; read again when it changes [${variable}]",
    )


def add_drain(parser: argparse.ArgumentParser) -> None:
    """Of services that stream tokens."""
    parser.add_argument(
        "--drain-seconds",
        type=_seconds,
        default=DRAIN_SECONDS,
        metavar="S",
        help="that requests which run may take to end after SIGTERM; a second signal cuts them short [%(default)g]",
    )


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds: give 0 or more")
    return found


def port(text: str) -> int:
    """Of an option that takes a port."""
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 0 to 65535")
    return int(text)
