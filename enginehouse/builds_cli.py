"""What can be typed about the jobs of builders."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from enginehouse.options import check_address, with_data, with_json

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _with_builder(function: _Function) -> Callable[..., Any]:
    """Adds --builder and --data; the function gets `builder`, HOST:PORT."""

    @click.option(
        "--builder",
        metavar="HOST:PORT",
        envvar="ENGINEHOUSE_BUILDER",
        callback=check_address,
        help="A builder of the store.  [default: $ENGINEHOUSE_BUILDER, the running cluster's]",
    )
    @with_data
    @functools.wraps(function)
    def run(builder: str | None, data: str | None, **arguments: Any) -> Any:
        from enginehouse.commands.builds import find_builder
        from enginehouse.home import Home

        return function(builder=find_builder(builder, Home.find(data)), **arguments)

    return run


_build_id = click.argument("build_id", metavar="BUILD")


@click.group()
def builds() -> None:
    """Look at the jobs of builders, follow and end them.

    Jobs are kept in the store: any builder of it knows them all. BUILD is a job's id, as `builds ls` prints it. What is
    built in your own process (`enginehouse build` without --builder) is no job.
    """


@builds.command("ls")
@_with_builder
@with_json
def builds_ls(builder: str, as_json: bool) -> None:
    """List jobs, newest first.

    Those that wait or run, and the last 100 that have ended.
    """
    from enginehouse.commands import builds as command

    command.run_ls(builder, as_json=as_json)


@builds.command("logs")
@_build_id
@_with_builder
@with_json
def builds_logs(build_id: str, builder: str, as_json: bool) -> None:
    """Print what a build has printed and how far it is.

    Until it ends; the status is 1 if it failed. Ctrl-C leaves it running. With --json an object a line: {"time",
    "log"}, {"time", "phase", "done", "total", "unit"} or, of a change of the job's state, {"time"} and what `builds ls
    --json` says of a job.
    """
    from enginehouse.commands import builds as command

    command.run_logs(builder, build_id, as_json=as_json)


@builds.command("cancel")
@_build_id
@_with_builder
@with_json
def builds_cancel(build_id: str, builder: str, as_json: bool) -> None:
    """End a job, whichever builder has it. One that has ended stays as it is."""
    from enginehouse.commands import builds as command

    command.run_cancel(builder, build_id, as_json=as_json)
