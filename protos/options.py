"""What every service's command line has beside its own. Imports no grpc."""

import argparse
import math

from protos import logs

DRAIN_SECONDS = 20.0  # with the seconds that follow it, less than the 30 that Kubernetes and Compose give


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every service's command line has beside its own."""
    parser.add_argument(
        "--metrics-port",
        type=_port,
        metavar="PORT",
        help="answer Prometheus there, on the same host, at /metrics; 0 takes a free one [no metrics]",
    )
    logs.add_options(parser)


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


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 0 to 65535")
    return int(text)
