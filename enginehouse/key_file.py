"""Changes of a file of API keys, one after another, seen whole or not at all by the services that read it."""

import fcntl
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import InvalidArgument, NotFound
from protos.keys import KeyFile, NewKey, Tenant, check_tenant_name, make_key, read_key_file


def add(path: Path, tenant: str, life: float | None = None, **changes: Any) -> NewKey:
    """A new key, and the tenant if it is new.

    Args:
        life: seconds until the key expires.
        changes: fields of the `Tenant` that get these values.

    Raises:
        InvalidArgument: a name or value that cannot be, or a file that cannot be written.
        FailedPrecondition: the file holds something else.
    """
    try:
        check_tenant_name(tenant)
        made = make_key(tenant, datetime.now(UTC) + timedelta(seconds=life) if life else None)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(str(error), reason="TENANT_INVALID") from None

    def change(file: KeyFile) -> KeyFile:
        tenants = {one.name: one for one in file.tenants}
        tenants[tenant] = msgspec.structs.replace(tenants.get(tenant, Tenant(tenant)), **changes)
        return KeyFile(tuple(tenants.values()), (*file.keys, made.kept))

    _edit(path, change, new=True)
    return made


def revoke(path: Path, key_id: str) -> None:
    """Takes a key out. Raises NotFound."""

    def change(file: KeyFile) -> KeyFile:
        kept = tuple(key for key in file.keys if key.id != key_id)
        if len(kept) == len(file.keys):
            known = ", ".join(key.id for key in file.keys) or "none"
            raise NotFound(f"{path} has no key {key_id!r}; there are: {known}", reason="API_KEY_NOT_FOUND")
        return KeyFile(file.tenants, kept)

    _edit(path, change, new=False)


def _edit(path: Path, change: Callable[[KeyFile], KeyFile], *, new: bool) -> None:
    """Others who change it wait; readers see the file of before until the new one stands in its place."""
    try:
        directory = os.open(path.absolute().parent, os.O_RDONLY)
    except OSError as error:
        raise InvalidArgument(f"cannot write {path}: {error.strerror}", reason="KEYS_UNWRITABLE") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        file = change(KeyFile() if new and not path.exists() else read_key_file(path))
        _replace(path, msgspec.json.format(msgspec.json.encode(file)) + b"\n")
    finally:
        os.close(directory)


def _replace(path: Path, data: bytes) -> None:
    target = path.resolve()  # of a link, what it leads to
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o644  # digests are no secret
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidArgument(f"cannot write {path}: {error.strerror}", reason="KEYS_UNWRITABLE") from None
