"""Writes the reference of the command line, docs/cli.md, out of its help: python docs/make_cli.py FILE."""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from click import Argument, Command, Context, Group, Parameter

from enginehouse.cli import main
from enginehouse.examples import EXAMPLES

HEAD = """# Command line

Every command of `enginehouse`, made from its help by `make docs`. `--help` shows the same in a terminal, and
`enginehouse completion bash` prints the script that completes commands in a shell. What can be said before every command:
"""


def commands(command: Command, context: Context) -> Iterator[tuple[str, Command, Context]]:
    """Each that does something, or of which others are parts, with its words; not `enginehouse` itself."""
    if isinstance(command, Group):
        for name in command.list_commands(context):
            child = command.commands[name]
            inner = Context(child, info_name=name, parent=context)
            yield inner.command_path, child, inner
            yield from commands(child, inner)


def prose(text: str) -> str:
    """Help as Markdown: what click keeps as it stands (`\\b`) is a block."""
    parts = []
    for part in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        kept = part.startswith("\b")
        parts.append("```text\n" + part.removeprefix("\b\n") + "\n```" if kept else " ".join(part.split()))
    return "\n\n".join(parts)


def options(parameters: list[Parameter], context: Context) -> str:
    """A table of what can be given."""
    rows = []
    for parameter in parameters:
        record = parameter.get_help_record(context)
        if isinstance(parameter, Argument) or not record or parameter.name == "help":
            continue
        name, meaning = (re.sub(r"\s+", " ", text).replace("|", "\\|") for text in record)
        rows.append(f"| `{name}` | {meaning} |")
    return "\n".join(("| option | |", "|---|---|", *rows)) if rows else ""


def section(path: str, command: Command, context: Context) -> str:
    """One command's."""
    usage = " ".join((path, *command.collect_usage_pieces(context)))
    words = path.removeprefix("enginehouse ")
    examples = "\n".join(f"# {line[2:]}" if line.startswith("# ") else line for line in EXAMPLES.get(words, ()))
    parts = [
        f"{'#' * len(path.split())} `{path}`",
        prose(command.help or ""),
        f"```text\n{usage}\n```",
        options(command.params, context),
        f"```sh\n{examples}\n```" if examples else "",
    ]
    return "\n\n".join(part for part in parts if part)


def page() -> str:
    """The whole page."""
    context = Context(main, info_name="enginehouse")
    sections = [section(*each) for each in commands(main, context)]
    return "\n\n".join((HEAD + "\n" + options(main.params, context), *sections)) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
