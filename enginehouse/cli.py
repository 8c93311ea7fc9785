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
from enginehouse.generation_options import GUIDES, SectionedCommand, check_guides, choosing, guided, several
from enginehouse.keys_cli import certs, keys
from enginehouse.options import with_data, with_gateway, with_json
from enginehouse.plan_cli import plan
from enginehouse.quantize_cli import quantize
from enginehouse.registry_cli import engines, models
from enginehouse.serve_cli import load, unload, up

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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.option("--api-key-file", metavar="FILE", help="The API key to call with.  [$ENGINEHOUSE_API_KEY, _API_KEY_FILE]")
@click.option(
    "--tls-ca", metavar="FILE", help="Speak TLS, and trust this authority; or: system.  [$ENGINEHOUSE_TLS_CA]"
)
@click.option("--tls-cert", metavar="FILE", help="The certificate to show (mutual TLS).  [$ENGINEHOUSE_TLS_CERT]")
@click.option("--tls-key", metavar="FILE", help="Its private key.  [$ENGINEHOUSE_TLS_KEY]")
@click.pass_context
def main(ctx: click.Context, /, **given: str | None) -> None:
    """Build LLM engines once, keep them in a store, load them in seconds, stream tokens from them.

    With --json, which all commands have but chat and completion, stdout is one JSON document (of `builds logs` one a line):
    an array where things are listed, an object elsewhere; sizes in bytes, times in seconds or ISO 8601. An error is the last
    line on stderr: {"error": {"code", "reason", "message", "metadata", "retry_after"}}. The status is 1 after an error, 2 if
    something was typed wrong, 130 after Ctrl-C.
    """
    if any(given.values()):
        from enginehouse.credentials import Given, typed

        ctx.with_resource(typed(Given(**given)))


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


@main.command(cls=SectionedCommand, short_help="Continue a prompt, printed as it comes.")
@click.argument("prompt")
@_model
@with_gateway
@choosing(max_tokens="128, or what fits")
@guided()
@several()
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
    **choices: Any,
) -> None:
    """Continue PROMPT, printed as it comes; "-" reads the prompt from stdin.

    \b
    Plain sampling takes the model's own probabilities (--temperature 1). Colder is safer:
      enginehouse generate "In the beginning" --temperature 0.7 --top-p 0.9
    What repeats itself:
      enginehouse generate "In the beginning" --repetition-penalty 1.1
    The best of eight, and how sure the model was of each token:
      enginehouse generate "In the beginning" --best-of 8 --logprobs 3
    A text that must be one of several:
      enginehouse generate "And God saw that it was" --choice " good." --choice " bad."
    """
    from enginehouse.commands import generate as command
    from enginehouse.commands.guided import guided_decoding
    from enginehouse.home import Home, gateway_address

    if choices["length_penalty"] is not None and choices["beams"] is None:
        raise click.UsageError("--length-penalty is of a beam search: give --beams, too")
    guides = {name: choices.pop(name) for name in GUIDES}
    check_guides(guides)
    command.run(
        prompt,
        command.Choices(**choices, guided_decoding=guided_decoding(**guides)),
        model=model,
        gateway=gateway_address(gateway, Home.find(data)),
        token_ids=token_ids,
        as_json=as_json,
        stats=stats,
    )


@main.command(cls=SectionedCommand)
@_model
@with_gateway
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@choosing(max_tokens="what fits")
@with_data
def chat(model: str | None, gateway: str | None, system: str | None, data: str | None, **choices: Any) -> None:
    """Talk with a model. Ctrl-C ends an answer; /exit, Ctrl-D, or Ctrl-C at the prompt ends the chat."""
    from enginehouse.commands import chat as command
    from enginehouse.commands.generate import Choices
    from enginehouse.home import Home, gateway_address

    command.run(Choices(**choices), model=model, gateway=gateway_address(gateway, Home.find(data)), system=system)


for _command in (up, load, unload, build, quantize, builds, plan, bench, models, engines, keys, certs, completion):
    main.add_command(_command)
add_examples(main)
