"""The `enginehouse` command: what can be typed. What it does is in `enginehouse/commands/`, imported when it is typed.

Here are the commands that talk with a model; `enginehouse/*_cli.py` have the others, by what they are about.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from enginehouse.bench_cli import bench
from enginehouse.build_cli import build
from enginehouse.builds_cli import builds
from enginehouse.command_line import Commands, add_examples
from enginehouse.completion import complete_model
from enginehouse.options import MOST, with_data, with_gateway, with_json
from enginehouse.plan_cli import plan
from enginehouse.registry_cli import engines, keys, models
from enginehouse.serve_cli import load, up

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        click.echo(f"enginehouse {metadata.version('enginehouse')}")
        ctx.exit()


_model = click.option(
    "--model",
    metavar="NAME",
    shell_complete=complete_model,
    help="The model's name.  [default: the only one that is served]",
)


def _sampling(max_tokens: str) -> Callable[[_Function], _Function]:
    options = [
        click.option(
            "--max-tokens",
            type=click.IntRange(1, MOST),
            help=f"Tokens to generate at most.  [default: {max_tokens}]",
        ),
        click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.  [default: 1]"),
        click.option("--top-k", type=click.IntRange(0, MOST), help="Choose among the k most probable tokens."),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            help="Choose among the fewest tokens that have this probability together.",
        ),
        click.option("--seed", type=click.IntRange(min=0, max=2**64 - 1), help="The same seed gives the same text."),
        click.option("--stop", metavar="S", multiple=True, help="End before this string; may be repeated."),
    ]

    def add(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def main() -> None:
    """Build LLM engines once, keep them in a store, load them in seconds, stream tokens from them.

    With --json, which all commands have but chat and completion, stdout is one JSON document (of `builds logs` one a line):
    an array where things are listed, an object elsewhere; sizes in bytes, times in seconds or ISO 8601. An error is the last
    line on stderr: {"error": {"code", "reason", "message", "metadata", "retry_after"}}. The status is 1 after an error, 2 if
    something was typed wrong, 130 after Ctrl-C.
    """


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes what you type in a shell.

    It completes commands, options, names of models and engine ids. Names and ids are those of the store at hand: the
    one that was typed, the running cluster's, or that of the data folder. A store in S3 is not asked. The shell must
    find `enginehouse` on its path.
    """
    from enginehouse.commands import completion as command

    command.run(main, shell)


@main.command(short_help="Continue a prompt, printed as it comes.")
@click.argument("prompt")
@_model
@with_gateway
@_sampling(max_tokens="128, or what fits")
@click.option("--token-ids", is_flag=True, help="PROMPT is token ids ('12 345'), and token ids are printed.")
@click.option("--stats", is_flag=True, help="Say on stderr how fast it was and why it ended.")
@with_json
@with_data
def generate(
    prompt: str,
    model: str | None,
    gateway: str | None,
    token_ids: bool,
    stats: bool,
    as_json: bool,
    data: str | None,
    **sampling: Any,
) -> None:
    """Continue PROMPT, printed as it comes; "-" reads the prompt from stdin."""
    from enginehouse.commands import generate as command
    from enginehouse.home import Home, gateway_address

    command.run(
        prompt,
        command.Sampling(**sampling),
        model=model,
        gateway=gateway_address(gateway, Home.find(data)),
        token_ids=token_ids,
        as_json=as_json,
        stats=stats,
    )


@main.command()
@_model
@with_gateway
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@_sampling(max_tokens="what fits")
@with_data
def chat(model: str | None, gateway: str | None, system: str | None, data: str | None, **sampling: Any) -> None:
    """Talk with a model. Ctrl-C ends an answer; /exit, Ctrl-D, or Ctrl-C at the prompt ends the chat."""
    from enginehouse.commands import chat as command
    from enginehouse.commands.generate import Sampling
    from enginehouse.home import Home, gateway_address

    command.run(Sampling(**sampling), model=model, gateway=gateway_address(gateway, Home.find(data)), system=system)


for _command in (up, load, build, builds, plan, bench, models, engines, keys, completion):
    main.add_command(_command)
add_examples(main)
