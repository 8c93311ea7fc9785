"""How commands behave as a whole: errors, with and without --json, the groups of the main help, and examples.

With --json a command prints one JSON document on stdout: an array where it lists things, an object elsewhere; `builds logs`
prints an object a line as things happen. Names are snake_case, times are seconds or ISO 8601, sizes are bytes. An error is
the last line on stderr, {"error": {"code", "reason", "message", "metadata", "retry_after"}}, with the same exit status as
ever: 1, or 2 for what was typed wrong. Lines before it are progress and warnings for people.
"""

import json
from typing import Any

import click

from engine.errors import EnginehouseError
from enginehouse.examples import EXAMPLES
from enginehouse.options import JSON_WANTED

# google.rpc.Code by number
_CODES = {
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}

_TYPED_JSON = "enginehouse.typed_json"

SECTIONS = {
    "Serve": ("up", "load", "unload"),
    "Build": ("build", "quantize", "builds", "plan"),
    "Use": ("generate", "chat", "bench"),
    "Inspect": ("models", "engines", "completion"),
    "Secure": ("keys", "certs"),
}


class Failure(click.ClickException):
    """An error as a person or, with --json, a program reads it."""

    def __init__(self, message: str, fields: dict[str, Any] | None) -> None:
        super().__init__(message)
        self.fields = fields

    def show(self, file: Any = None) -> None:
        text = f"error: {self.message}" if self.fields is None else json.dumps({"error": self.fields})
        click.echo(text, err=True, file=file)


class UsageFailure(Failure):
    """What was typed wrong."""

    exit_code = 2


class Commands(click.Group):
    """Errors are one line and status 1; Ctrl-C is status 130. Usage errors are click's, with status 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        typed = args[: args.index("--")] if "--" in args else args
        ctx.meta[_TYPED_JSON] = "--json" in typed  # a wrong option may be found before --json is read
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            if ctx.meta.get(_TYPED_JSON):
                message = error.format_message()
                fields = _fields("INVALID_ARGUMENT", "USAGE", message)
                raise UsageFailure(message, fields) from error
            raise
        except EnginehouseError as error:
            code = _CODES.get(error.code, "UNKNOWN")
            fields = _fields(code, error.reason, error.message, error.metadata, error.retry_after)
            raise Failure(error.message, fields if ctx.meta.get(JSON_WANTED) else None) from error
        except BrokenPipeError:
            raise  # whoever read our output has had enough: click ends quietly
        except OSError as error:
            fields = _fields("UNKNOWN", "OS_ERROR", str(error))
            raise Failure(str(error), fields if ctx.meta.get(JSON_WANTED) else None) from error
        except KeyboardInterrupt:
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """In groups, by what a person wants to do."""
        for section, names in SECTIONS.items():
            commands = [(name, command) for name in names if (command := self.get_command(ctx, name))]
            width = formatter.width - 6 - max(len(name) for name in self.commands)
            with formatter.section(section):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in commands])


def add_examples(command: click.Command, path: tuple[str, ...] = ()) -> None:
    """Puts the examples of `enginehouse.examples` below the help of each command of a tree."""
    if lines := EXAMPLES.get(" ".join(path)):
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            add_examples(child, (*path, name))


def _fields(
    code: str, reason: str, message: str, metadata: dict[str, str] | None = None, retry_after: float | None = None
) -> dict[str, Any]:
    return {
        "code": code,
        "reason": reason,
        "message": message,
        "metadata": metadata or {},
        "retry_after": retry_after,
    }
