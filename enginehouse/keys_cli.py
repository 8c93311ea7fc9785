"""What can be typed about keys and certificates: signatures of engines, API keys of tenants, a trial's TLS."""

from pathlib import Path

import click

from enginehouse.options import check_time, with_json

_file = click.argument("file", type=click.Path(path_type=Path))
_key_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


def _life(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    return None if value is None else check_time(ctx, parameter, value)


@click.group()
def keys() -> None:
    """Make and show signing keys, and API keys.

    Signing keys vouch for engines: Ed25519, in PEM files. API keys say who calls a service: their digests are in a JSON
    file, which services take as --api-keys.

    \b
    Whoever builds:      enginehouse keys generate my.key
                         enginehouse keys show my.key > trusted.pem
                         enginehouse build CHECKPOINT --sign-with my.key
    Whoever runs them:   python -m executor_svc --trusted-keys trusted.pem ...
    Whoever serves:      enginehouse keys add api-keys.json acme
                         python -m gateway --api-keys api-keys.json ...
    """


@keys.command("generate")
@_file
@with_json
def keys_generate(file: Path, as_json: bool) -> None:
    """Make a private key in FILE. Keep it secret.

    Only you can read the file, and it is never overwritten.
    """
    from enginehouse.commands import keys as command

    command.generate(file, as_json=as_json)


@keys.command("show")
@_file
@with_json
def keys_show(file: Path, as_json: bool) -> None:
    """Print the key id and the public key of FILE.

    FILE holds a private or public key; what is printed is what executors take as --trusted-keys.
    """
    from enginehouse.commands import keys as command

    command.show(file, as_json=as_json)


@keys.command("add")
@_key_file
@click.argument("tenant")
@click.option("--expires", metavar="TIME", callback=_life, help="The key's life, such as 12h or 90d.  [for ever]")
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path), help="Write the key there, for you alone to read."
)
@click.option(
    "models", "--model", metavar="PATTERN", multiple=True, help="May be used, such as llama-*; may be repeated."
)
@click.option("--max-streams", metavar="N", type=click.IntRange(min=1), help="Requests at a time.")
@click.option("--tokens-per-minute", metavar="N", type=click.IntRange(min=1), help="Of prompts and completions.")
@click.option("--max-priority", metavar="N", type=int, help="The highest that its requests may have.  [0]")
@click.option("--max-prompt-tokens", metavar="N", type=click.IntRange(min=1), help="Of a request.")
@with_json
def keys_add(
    file: Path,
    tenant: str,
    expires: float | None,
    out: Path | None,
    models: tuple[str, ...],
    as_json: bool,
    **limits: int | None,
) -> None:
    """Make an API key for TENANT, and print it.

    FILE keeps its digest alone: nobody can print the key again. FILE and TENANT are made if they are new; options that
    you give change the tenant. Running services notice. A tenant may have several keys: add the next, let clients change
    over, revoke the last.
    """
    from enginehouse.commands import api_keys as command

    command.add(file, tenant, expires=expires, out=out, models=models, limits=limits, as_json=as_json)


@keys.command("ls")
@_key_file
@with_json
def keys_ls(file: Path, as_json: bool) -> None:
    """List the API keys in FILE, and what their tenants may do."""
    from enginehouse.commands import api_keys as command

    command.ls(file, as_json=as_json)


@keys.command("revoke")
@_key_file
@click.argument("key_id")
@with_json
def keys_revoke(file: Path, key_id: str, as_json: bool) -> None:
    """Take API key KEY_ID, as `keys ls` shows it, out of FILE.

    Running services refuse it from the next second on. Streams that it has begun go on.
    """
    from enginehouse.commands import api_keys as command

    command.revoke(file, key_id, as_json=as_json)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "hosts",
    "--host",
    metavar="NAME",
    multiple=True,
    default=("localhost", "127.0.0.1"),
    show_default="localhost and 127.0.0.1",
    help="A name or address by which servers are reached; may be repeated.",
)
@with_json
def certs(directory: Path, hosts: tuple[str, ...], as_json: bool) -> None:
    """Make certificates for a trial of TLS in DIRECTORY.

    An authority (ca.pem) and a pair for each of gateway, executor, builder and client, good for a year. Who runs a
    cluster for others has an authority already, and takes its certificates.
    """
    from enginehouse.commands import certs as command

    command.run(directory, hosts, as_json=as_json)
