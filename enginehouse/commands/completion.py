"""`enginehouse completion`: the script with which a shell asks this program what could be typed next."""

import click
from click.shell_completion import get_completion_class

from engine.errors import Internal

PROGRAM = "enginehouse"


def run(main: click.Command, shell: str) -> None:
    """Prints click's script for the shell."""
    kind = get_completion_class(shell)
    if kind is None:
        raise Internal(f"click knows no shell {shell!r}")
    click.echo(kind(main, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source())
