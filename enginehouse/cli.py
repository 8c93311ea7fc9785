"""The `enginehouse` command: what can be typed. What it does is in `enginehouse/commands/`, imported when it is typed.

The groups about a store (engines, models, keys) are in `enginehouse/registry_cli.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from engine.errors import EnginehouseError
from enginehouse.builds_cli import builds
from enginehouse.options import check_address, check_addresses, with_data, with_gateway, with_json
from enginehouse.registry_cli import engines, keys, models

_Function = TypeVar("_Function", bound=Callable[..., Any])

_MOST = 2**32 - 1  # that the wire's numbers hold


class _Failure(click.ClickException):
    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True, file=file)


class _Commands(click.Group):
    """Errors are one line and status 1; Ctrl-C is status 130. Usage errors are click's, with status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EnginehouseError as error:
            raise _Failure(error.message) from error
        except BrokenPipeError:
            raise  # whoever read our output has had enough: click ends quietly
        except OSError as error:
            raise _Failure(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(130)


class _UpCommand(click.Command):
    """Takes what stands behind "--" for the command to run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            cut = args.index("--")
            ctx.params["command"] = tuple(args[cut + 1 :])
            if not ctx.params["command"]:
                raise click.UsageError("a command must stand behind --", ctx)
            args = args[:cut]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        click.echo(f"enginehouse {metadata.version('enginehouse')}")
        ctx.exit()


_model = click.option("--model", metavar="NAME", help="The model's name.  [default: the only one that is served]")


def _sampling(max_tokens: str) -> Callable[[_Function], _Function]:
    options = [
        click.option(
            "--max-tokens",
            type=click.IntRange(1, _MOST),
            help=f"Tokens to generate at most.  [default: {max_tokens}]",
        ),
        click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.  [default: 1]"),
        click.option("--top-k", type=click.IntRange(0, _MOST), help="Choose among the k most probable tokens."),
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


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def main() -> None:
    """Build LLM engines once, keep them in a store, load them in seconds, stream tokens from them.

    \b
    A first try, with a checkpoint in Hugging Face layout:
      enginehouse up NAME=CHECKPOINT
      enginehouse generate "In the beginning"        (in another terminal)
    """


@main.command()
@click.argument("checkpoint")
@click.option("--name", metavar="NAME", help="What to call the model.  [default: the directory's or repository's name]")
@click.option("--revision", metavar="R", help="Branch, tag or commit of the hub's repository.  [default: main]")
@click.option("--store", metavar="URL", help="Where the engine goes.  [default: store/ in the data folder]")
@click.option(
    "--builder",
    metavar="HOST:PORT",
    envvar="ENGINEHOUSE_BUILDER",
    callback=check_address,
    help="Have it built there, into the builder's store.  [default: $ENGINEHOUSE_BUILDER, else in this process]",
)
@click.option(
    "--upload",
    is_flag=True,
    help="Send the directory to a builder that is on this machine, too; to others it always is.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of weights and activations; auto is the checkpoint's own on CUDA, float32 on the CPU.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the engine will run."
)
@click.option("--compute-capability", metavar="X", help="Of the GPU, such as 9.0.  [default: any]")
@click.option("--max-batch-size", type=click.IntRange(1, _MOST), help="Requests in one step.  [default: 64]")
@click.option(
    "--max-seq-len", type=click.IntRange(1, _MOST), help="Prompt and completion together.  [default: the model's]"
)
@click.option("--max-num-tokens", type=click.IntRange(1, _MOST), help="Tokens in one step.  [default: 2048]")
@click.option(
    "--sign-with",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Sign the engine with this private key (enginehouse keys generate FILE); one that is there unsigned is built again.",
)
@with_data
@with_json
def build(
    checkpoint: str,
    name: str | None,
    store: str | None,
    builder: str | None,
    sign_with: Path | None,
    data: str | None,
    as_json: bool,
    revision: str | None,
    upload: bool,
    **choices: Any,
) -> None:
    """Build an engine from CHECKPOINT, a directory in Hugging Face layout or a repository of the hub (ORG/NAME[@REVISION]).

    A directory is sent to a builder on another machine; after an interruption the same command goes on where it was. What is
    no directory here and begins with . or / is a path on the builder's machine. $HF_TOKEN opens private and gated repositories.

    The same checkpoint and options give the same engine: a second build finds it in the store.
    """
    from enginehouse.commands import build as command
    from enginehouse.home import Home

    if builder and (store or sign_with):
        ctx = click.get_current_context()
        if ctx.get_parameter_source("builder") is click.core.ParameterSource.COMMANDLINE:
            own = "--store and --builder exclude each other: a builder has its own store"
            key = "--sign-with and --builder exclude each other: a builder has its own --signing-key"
            raise click.UsageError(own if store else key)
        builder = None
    command.run(
        checkpoint,
        command.Choices(**choices),
        name=name,
        home=Home.find(data),
        store=store,
        builder=builder,
        sign_with=sign_with,
        as_json=as_json,
        revision=revision,
        upload=upload,
    )


@main.command(cls=_UpCommand)
@click.argument("models", nargs=-1, metavar="[MODEL | NAME=CHECKPOINT]...")
@click.option("--executors", type=click.IntRange(min=1), default=1, show_default=True, help="How many executors.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the gateway listens.")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8400,
    show_default=True,
    help="The gateway's port; 0 takes a free one.",
)
@click.option("--store", metavar="URL", help="Where engines are kept.  [default: store/ in the data folder]")
@click.option("--metrics", is_flag=True, help="Give each service a port for Prometheus, and say where.")
@with_data
def up(
    models: tuple[str, ...],
    executors: int,
    host: str,
    port: int,
    store: str | None,
    metrics: bool,
    data: str | None,
    command: tuple[str, ...] = (),
) -> None:
    """Run a cluster on this machine: a builder, executors and a gateway, serving the models given.

    A model is NAME=CHECKPOINT or the path of a checkpoint (built first, unless its engine is in the store), or the name of one
    in the store. Ctrl-C stops all of it. With a COMMAND the cluster lives as long as the command, which finds it by itself
    ($ENGINEHOUSE_GATEWAY, $ENGINEHOUSE_BUILDER), and the status is the command's.
    """
    from enginehouse.commands import up as body
    from enginehouse.home import Home

    status = body.run(
        models, command, home=Home.find(data), store=store, executors=executors, host=host, port=port, metrics=metrics
    )
    click.get_current_context().exit(status)


@main.command()
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


@main.command()
@click.argument("engine", metavar="MODEL|ENGINE_ID")
@click.option(
    "executors",
    "--executor",
    metavar="HOST:PORT",
    multiple=True,
    callback=check_addresses,
    help="May be repeated; default: the local cluster's.",
)
@with_data
def load(engine: str, executors: tuple[str, ...], data: str | None) -> None:
    """Load a model's newest engine into running executors; the gateway then sends its requests there."""
    from enginehouse.commands import load as command
    from enginehouse.home import Home

    command.run(engine, executors, Home.find(data))


main.add_command(builds)
main.add_command(models)
main.add_command(engines)
main.add_command(keys)
