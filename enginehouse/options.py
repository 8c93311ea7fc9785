"""What commands have in common: options, and how their values are read."""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MOST = 2**32 - 1  # that the wire's numbers hold
JSON_WANTED = "enginehouse.json"  # key of what a click context and its relatives share: --json was given


def check_address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that takes HOST:PORT."""
    if value is not None:
        host, _colon, port = value.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 65536):
            raise click.BadParameter(f"{value!r} is not HOST:PORT, such as 127.0.0.1:8400")
    return value


def check_addresses(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """The same for an option that may be repeated."""
    for value in values:
        check_address(context, parameter, value)
    return values


def check_time(_: click.Context, __: click.Parameter, value: str) -> float:
    """Callback of an option that takes a time such as 24h; seconds."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd])", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no time: write it like 90s, 30m, 24h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def _note_json(context: click.Context, _: click.Parameter, wanted: bool) -> bool:
    """Errors, too, are then JSON."""
    context.meta[JSON_WANTED] = wanted or context.meta.get(JSON_WANTED, False)
    return wanted


with_data = click.option(
    "--data",
    metavar="DIR",
    help="The data folder: engines, logs, the running cluster.  [default: $ENGINEHOUSE_HOME, ~/.enginehouse]",
)
with_json = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_note_json,
    help="Print JSON; an error is JSON on stderr.",
)
with_gateway = click.option(
    "--gateway",
    metavar="HOST:PORT",
    envvar="ENGINEHOUSE_GATEWAY",
    callback=check_address,
    help="The gateway.  [default: $ENGINEHOUSE_GATEWAY, the running cluster's, 127.0.0.1:8400]",
)


def on_store(function: _Function) -> Callable[..., Any]:
    """Adds --store, --data and --json; the function gets `store`, the URL of the chosen one, and `as_json`.

    What stands before the subcommand (`models --store URL set ...`) counts, too.
    """

    @click.option("--store", metavar="URL", help="Where the engines are.  [default: store/ in the data folder]")
    @with_data
    @with_json
    @functools.wraps(function)
    def run(store: str | None, data: str | None, as_json: bool, **arguments: Any) -> Any:
        from enginehouse.home import Home

        group = click.get_current_context().parent
        before = group.params if group else {}
        url = store or before.get("store") or Home.find(data or before.get("data")).store
        return function(store=url, as_json=as_json or before.get("as_json", False), **arguments)

    return run
