"""What can be typed about a store: engines and the names of models."""

from pathlib import Path

import click

from enginehouse.completion import complete_engine, complete_model
from enginehouse.options import check_time, on_store, with_data, with_gateway, with_json

_engine = click.argument("engine", shell_complete=complete_engine)
_name = click.argument("name", shell_complete=complete_model)
_keys = click.option(
    "--trusted-keys",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Also ask that one of these public keys has signed it: a PEM file or a directory of *.pem; may be repeated.",
)


@click.group()
def engines() -> None:
    """Look at the engines in a store, sign and remove them.

    ENGINE is an engine id, its first 6 or more digits, or the name of a model.
    """


@engines.command("ls")
@on_store
def engines_ls(store: str, as_json: bool) -> None:
    """List all engines, newest first, with their names."""
    from enginehouse.commands import engines as command

    command.ls(store, as_json=as_json)


@engines.command("inspect")
@_engine
@on_store
def engines_inspect(engine: str, store: str, as_json: bool) -> None:
    """Show what an engine is and which files it has.

    Also what it needs of a node. --json prints its manifest, too.
    """
    from enginehouse.commands import engines as command

    command.inspect(engine, store, as_json=as_json)


@engines.command("verify")
@_engine
@click.option("--quick", is_flag=True, help="Look at existence and sizes only, not at every byte.")
@_keys
@on_store
def engines_verify(engine: str, quick: bool, trusted_keys: tuple[Path, ...], store: str, as_json: bool) -> None:
    """Compare an engine's files with their digests.

    All of them are read, 32 MiB at a time; the status is 1 if anything is wrong. For a store that you do not trust.
    """
    from enginehouse.commands import engines as command

    command.verify(engine, store, deep=not quick, trusted_keys=trusted_keys, as_json=as_json)


@engines.command("rm")
@_engine
@on_store
def engines_rm(engine: str, store: str, as_json: bool) -> None:
    """Remove an engine that no model name stands for.

    Its files stay until `enginehouse engines gc`.
    """
    from enginehouse.commands import engines as command

    command.rm(engine, store, as_json=as_json)


@engines.command("sign")
@_engine
@click.option(
    "--key",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="The private key, made by `enginehouse keys generate FILE`.",
)
@on_store
def engines_sign(engine: str, key: Path, store: str, as_json: bool) -> None:
    """Vouch for an engine and all its files.

    Executors that are started with --trusted-keys run no others.
    """
    from enginehouse.commands import engines as command

    command.sign(engine, key, store, as_json=as_json)


@engines.command("gc")
@click.option(
    "--grace",
    metavar="TIME",
    default="24h",
    show_default=True,
    callback=check_time,
    help="Delete nothing younger; such as 30m, 24h, 7d.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be deleted.")
@on_store
def engines_gc(grace: float, dry_run: bool, store: str, as_json: bool) -> None:
    """Delete what nothing needs.

    That is files of no engine, uploads that broke off or are a week old, and records of old builds. Builds may run
    meanwhile: they lose nothing. An engine that cannot be read stops it before anything is deleted.
    """
    from enginehouse.commands import engines as command

    command.gc(store, grace, dry_run=dry_run, as_json=as_json)


@click.group(invoke_without_command=True)
@with_gateway
@click.option("--store", metavar="URL", help="List what this store holds instead of what is served.")
@with_data
@with_json
@click.pass_context
def models(ctx: click.Context, gateway: str | None, store: str | None, data: str | None, as_json: bool) -> None:
    """List models, and change what their names stand for.

    Without a command: the models that the gateway serves, or with --store those in a store. The commands change which
    engines the names in a store stand for. Gateways notice within seconds. A name goes on with its engine of before
    until an executor has the new one (`enginehouse load NAME`).
    """
    if ctx.invoked_subcommand:
        return
    from enginehouse.commands import models as command
    from enginehouse.home import Home, gateway_address

    if store:
        command.run_stored(store, as_json=as_json)
    else:
        command.run_served(gateway_address(gateway, Home.find(data)), as_json=as_json)


@models.command("set")
@_name
@_engine
@on_store
def models_set(name: str, engine: str, store: str, as_json: bool) -> None:
    """Give a name to an engine.

    ENGINE is an engine id, its first 6 or more digits, or another name whose engine is meant.
    """
    from enginehouse.commands import models as command

    command.set_name(name, engine, store, as_json=as_json)


@models.command("history")
@_name
@on_store
def models_history(name: str, store: str, as_json: bool) -> None:
    """Show what a name has stood for, newest first."""
    from enginehouse.commands import models as command

    command.history(name, store, as_json=as_json)


@models.command("rollback")
@_name
@click.option(
    "--to",
    "sequence",
    metavar="N",
    type=click.IntRange(min=1),
    help="A number of its history.  [default: the newest with another engine than now]",
)
@on_store
def models_rollback(name: str, sequence: int | None, store: str, as_json: bool) -> None:
    """Give a name back to an earlier engine.

    One of its history (`models history`). A removed name comes back so, too.
    """
    from enginehouse.commands import models as command

    command.rollback(name, sequence, store, as_json=as_json)


@models.command("rename")
@click.argument("old", shell_complete=complete_model)
@click.argument("new")
@on_store
def models_rename(old: str, new: str, store: str, as_json: bool) -> None:
    """Let NEW stand for OLD's engine, and OLD for nothing.

    NEW must stand for nothing before.
    """
    from enginehouse.commands import models as command

    command.rename(old, new, store, as_json=as_json)


@models.command("rm")
@_name
@on_store
def models_rm(name: str, store: str, as_json: bool) -> None:
    """Let a name stand for nothing.

    Its history and its engine stay: `enginehouse models rollback` brings it back.
    """
    from enginehouse.commands import models as command

    command.rm(name, store, as_json=as_json)
