"""What can be typed to serve models."""

from pathlib import Path

import click

from enginehouse.completion import complete_engine, complete_model_or_directory
from enginehouse.options import check_addresses, check_time, with_data, with_json


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


@click.command(cls=_UpCommand)
@click.argument("models", nargs=-1, metavar="[MODEL | NAME=CHECKPOINT]...", shell_complete=complete_model_or_directory)
@click.option("--executors", type=click.IntRange(min=1), default=1, show_default=True, help="How many executors.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the gateway listens.")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8400,
    show_default=True,
    help="The gateway's port; 0 takes a free one.",
)
@click.option(
    "--http-port",
    type=click.IntRange(min=0, max=65535),
    help="Of OpenAI's HTTP API and a page; 0 takes a free one.  [default: 8480, or a free one with --port 0]",
)
@click.option("--no-http", is_flag=True, help="Answer no HTTP.")
@click.option("--store", metavar="URL", help="Where engines are kept.  [default: store/ in the data folder]")
@click.option("--metrics", is_flag=True, help="Give each service a port for Prometheus, and say where.")
@click.option(
    "--certs", metavar="DIR", type=click.Path(path_type=Path), help="Mutual TLS; made by `enginehouse certs`."
)
@click.option(
    "--api-keys", metavar="FILE", type=click.Path(path_type=Path), help="Take only calls with one of these keys."
)
@with_data
@with_json
def up(
    models: tuple[str, ...],
    executors: int,
    host: str,
    port: int,
    http_port: int | None,
    no_http: bool,
    store: str | None,
    metrics: bool,
    certs: Path | None,
    api_keys: Path | None,
    data: str | None,
    as_json: bool,
    command: tuple[str, ...] = (),
) -> None:
    """Run a cluster on this machine, which serves models.

    That is a builder, executors and a gateway, to try things out or for one machine of your own. A model is
    NAME=CHECKPOINT or the path of a checkpoint (built first, unless its engine is in the store), or the name of one in
    the store. Ctrl-C stops all of it. With a COMMAND the cluster lives as long as the command, which finds it by itself
    ($ENGINEHOUSE_GATEWAY, $ENGINEHOUSE_BUILDER), and the status is the command's. With --json a line on stdout tells
    all addresses and models as soon as it serves; stdout is a COMMAND's own, which therefore excludes --json.
    """
    from enginehouse.cluster_security import ClusterSecurity
    from enginehouse.commands import up as body
    from enginehouse.home import DEFAULT_HTTP_PORT, Home

    if no_http and http_port is not None:
        raise click.UsageError("--http-port and --no-http exclude each other")
    if http_port is None and not no_http:
        http_port = DEFAULT_HTTP_PORT if port else 0
    if as_json and command:
        raise click.UsageError("--json and a COMMAND exclude each other: stdout is the command's")
    status = body.run(
        models,
        command,
        home=Home.find(data),
        store=store,
        executors=executors,
        host=host,
        port=port,
        as_json=as_json,
        metrics=metrics,
        security=ClusterSecurity(certs, api_keys),
        http_port=http_port,
    )
    click.get_current_context().exit(status)


@click.command()
@click.argument("engine", metavar="MODEL|ENGINE_ID", shell_complete=complete_engine)
@click.option(
    "executors",
    "--executor",
    metavar="HOST:PORT",
    multiple=True,
    callback=check_addresses,
    help="May be repeated; default: the local cluster's.",
)
@click.option(
    "--kv-memory", type=click.IntRange(1), metavar="BYTES", help="Of KV cache.  [default: the executor's choice]"
)
@click.option(
    "--evict", is_flag=True, help="Where it does not fit, unload engines without requests, the longest unused first."
)
@with_data
@with_json
def load(
    engine: str, executors: tuple[str, ...], kv_memory: int | None, evict: bool, data: str | None, as_json: bool
) -> None:
    """Load a model's newest engine into running executors.

    The gateway then sends its requests there: after a name was given another engine, or for a model that `enginehouse
    up` did not begin with. Streams of the one before end there; `enginehouse unload` frees its memory. It takes an
    engine's whole id as well.
    """
    from enginehouse.commands import load as command
    from enginehouse.home import Home

    command.run(engine, executors, Home.find(data), kv_memory=kv_memory or 0, evict=evict, as_json=as_json)


@click.command()
@click.argument("engine", metavar="ENGINE_ID")
@click.option(
    "executors",
    "--executor",
    metavar="HOST:PORT",
    multiple=True,
    callback=check_addresses,
    help="May be repeated; default: the local cluster's.",
)
@click.option(
    "--drain",
    default="10m",
    show_default=True,
    callback=check_time,
    help="That its requests may take to end, before they are cancelled.",
)
@with_data
@with_json
def unload(engine: str, executors: tuple[str, ...], drain: float, data: str | None, as_json: bool) -> None:
    """Unload an engine from running executors, and free its memory.

    It takes no new requests; those that run may end. The first digits of its id are enough: `enginehouse models history
    MODEL` tells which engines a name has stood for.
    """
    from enginehouse.commands import unload as command
    from enginehouse.home import Home

    command.run(engine, executors, Home.find(data), drain, as_json=as_json)
