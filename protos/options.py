"""What every service's command line has beside its own. Imports no grpc."""

import argparse

from protos import logs


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every service's command line has beside its own."""
    parser.add_argument(
        "--metrics-port",
        type=_port,
        metavar="PORT",
        help="answer Prometheus there, on the same host, at /metrics; 0 takes a free one [no metrics]",
    )
    logs.add_options(parser)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 0 to 65535")
    return int(text)
