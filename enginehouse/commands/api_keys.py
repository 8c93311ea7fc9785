"""`enginehouse keys add`, `ls` and `revoke`: who may call services."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from engine.errors import FailedPrecondition, InvalidArgument
from enginehouse import key_file
from enginehouse.tables import print_json, print_table
from protos.keys import read_key_file


def add(
    path: Path,
    tenant: str,
    *,
    expires: float | None,
    out: Path | None,
    models: Sequence[str],
    limits: Mapping[str, int | None],
    as_json: bool,
) -> None:
    """Makes a key; stdout is the key alone, so that it can go into a file."""
    changes: dict[str, object] = {name: value for name, value in limits.items() if value is not None}
    if models:
        changes["models"] = tuple(models)
    file = _reserve(out) if out else None
    try:
        made = key_file.add(path, tenant, expires, **changes)
    except BaseException:
        if file is not None and out:
            os.close(file)
            out.unlink()
        raise
    if file is not None:
        with open(file, "w") as written:
            written.write(made.secret + "\n")
    if as_json:
        shown = {"key": None if out else made.secret, "file": str(out) if out else None}
        print_json({"id": made.kept.id, "tenant": tenant, "expires": made.kept.expires, **shown})
        return
    if not out:
        print(made.secret)
    said = f"key {made.kept.id} of tenant {tenant}" + (f" until {made.kept.expires}" if made.kept.expires else "")
    where = f"in {out}" if out else "on stdout, once and never again"
    print(f"{said}: the key is {where}; services that take --api-keys {path} know it from now on", file=sys.stderr)


def ls(path: Path, *, as_json: bool) -> None:
    """All keys with what their tenants may do."""
    file = read_key_file(path)
    if as_json:
        print_json(msgspec.to_builtins(file))
        return
    tenants = {tenant.name: tenant for tenant in file.tenants}
    rows = []
    for key in file.keys:
        tenant = tenants[key.tenant]
        expires = "never" if key.expires is None else key.expires + (" (expired)" if key.ends <= time.time() else "")
        limits = (tenant.max_streams, tenant.tokens_per_minute, tenant.max_priority)
        shown = ("-" if limit is None else str(limit) for limit in limits)
        rows.append((key.id, key.tenant, key.created, expires, " ".join(tenant.models), *shown))
    head = ("KEY", "TENANT", "CREATED", "EXPIRES", "MODELS", "STREAMS", "TOKENS/MIN", "PRIORITY")
    print_table(head, rows, f"no keys in {path}")


def revoke(path: Path, key_id: str, *, as_json: bool) -> None:
    """Takes a key out."""
    key_file.revoke(path, key_id)
    if as_json:
        print_json({"id": key_id, "revoked": True})
    else:
        print(f"key {key_id} is revoked: services that take --api-keys {path} refuse it from now on")


def _reserve(out: Path) -> int:
    """A new file that nobody else can read, before there is a key that could be lost."""
    try:
        return os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FailedPrecondition(
            f"{out} exists and is not overwritten: choose another file", reason="FILE_EXISTS"
        ) from None
    except OSError as error:
        raise InvalidArgument(f"cannot write {out}: {error.strerror}", reason="FILE_UNWRITABLE") from None
