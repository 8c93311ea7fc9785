"""API keys: who may call a service, what each tenant may do, in a JSON file that holds no secret.

    {"tenants": [{"name": "acme", "models": ["demo", "llama-*"], "max_streams": 8, "tokens_per_minute": 60000, ...}],
     "keys":    [{"id": "4f0c9b21", "tenant": "acme", "sha256": "4f0c9b21...", "created": "2026-11-29", "expires": null}]}

A key is 256 random bits, so its SHA-256 is enough to keep: what makes passwords need salt and a slow hash is that they can be
guessed, and nobody guesses among 2**256. A slow hash would cost each call what an attacker would never pay. A tenant may have
several keys at once, which is how one is replaced by the next without a gap.
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated
from protos.watched import Watched

PREFIX = "eh_"  # by which scanners of repositories can tell one
_ID_DIGITS = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MOST_TENANTS = 10_000  # each has metrics of its own


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who calls, and what it may do. None is no limit.

    Attributes:
        models: names or patterns such as "llama-*".
        max_streams: Generate calls under way at a time; more of them wait.
        tokens_per_minute: of prompts and completions together; what has been saved up lasts for one minute.
        max_priority: the highest `priority` that its requests may have.
        max_prompt_tokens: of one request.
    """

    name: str
    models: tuple[str, ...] = ("*",)
    max_streams: int | None = None
    tokens_per_minute: int | None = None
    max_priority: int | None = 0
    max_prompt_tokens: int | None = None

    def allows(self, model: str) -> bool:
        """Whether it may use a model of this name."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def check_model(self, model: str) -> None:
        """Raises PermissionDenied, in the same words whether there is such a model or not."""
        if not self.allows(model):
            raise PermissionDenied(
                f"tenant {self.name!r} may not use model {model!r}: ask for one that ListModels shows, or let the gateway's "
                "operator add it to the tenant's models",
                reason="MODEL_DENIED",
            )

    def check_priority(self, priority: int) -> None:
        """Raises PermissionDenied for one that its requests may not have."""
        if self.max_priority is not None and priority > self.max_priority:
            raise PermissionDenied(
                f"priority is {priority}, and tenant {self.name!r} may have {self.max_priority} at most: lower it",
                reason="PRIORITY_DENIED",
            )


ANYBODY = Tenant("", max_priority=None)
"""Who calls a service that has no API keys."""


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept of a key.

    Attributes:
        id: the first digits of `sha256`, by which people name it.
        created, expires: ISO 8601 in UTC; None never ends.
    """

    id: str
    tenant: str
    sha256: str
    created: str
    expires: str | None = None

    @property
    def ends(self) -> float:
        """When it expires, in seconds since 1970. Raises ValueError."""
        if self.expires is None:
            return float("inf")
        when = datetime.fromisoformat(self.expires)
        return when.replace(tzinfo=when.tzinfo or UTC).timestamp()


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    tenants: tuple[Tenant, ...] = ()
    keys: tuple[ApiKey, ...] = ()

    def check(self) -> None:
        """Raises ValueError, naming the entry, for what the types do not say."""
        names = [tenant.name for tenant in self.tenants]
        if len(names) > _MOST_TENANTS:
            raise ValueError(f"{len(names)} tenants: at most {_MOST_TENANTS}")
        if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else None:
            raise ValueError(f"tenant {min(twice)!r} is there twice")
        for tenant in self.tenants:
            check_tenant_name(tenant.name)
            for field in ("max_streams", "tokens_per_minute", "max_prompt_tokens"):
                if (limit := getattr(tenant, field)) is not None and limit < 1:
                    raise ValueError(f"{field} of tenant {tenant.name!r} is {limit}: give at least 1, or null")
        known = set(names)
        for key in self.keys:
            if key.tenant not in known:
                raise ValueError(f"key {key.id!r} is of tenant {key.tenant!r}, which is not among the tenants")
            if (
                not re.fullmatch("[0-9a-f]{64}", key.sha256)
                or not key.sha256.startswith(key.id)
                or len(key.id) != _ID_DIGITS
            ):
                raise ValueError(f"key {key.id!r}: sha256 is 64 hexadecimal digits, id the first {_ID_DIGITS} of them")
            try:
                _ = key.ends
            except ValueError as error:
                raise ValueError(f"key {key.id!r} expires at no time of ISO 8601: {error}") from None


class NewKey(NamedTuple):
    """A key that was just made: its secret, which nobody keeps, and what is kept."""

    secret: str
    kept: ApiKey


def check_tenant_name(name: str) -> str:
    """The name. Raises ValueError for one that would look wrong in logs, metrics and messages."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no tenant's name: 1 to 63 letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name


def make_key(tenant: str, expires: datetime | None = None) -> NewKey:
    """A new key of 256 random bits."""
    secret = PREFIX + secrets.token_urlsafe(32)
    digest = sha256(secret.encode()).hexdigest()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return NewKey(secret, ApiKey(digest[:_ID_DIGITS], tenant, digest, now, expires.isoformat() if expires else None))


def read_key_file(path: Path) -> KeyFile:
    """Raises InvalidArgument if it cannot be read, FailedPrecondition if it is no file of keys."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(
            f"cannot read the API keys in {path}: {error.strerror}; make the file with `enginehouse keys add {path} TENANT`",
            reason="KEYS_UNREADABLE",
        ) from None
    try:
        found = msgspec.json.decode(data, type=KeyFile)
        found.check()
    except (msgspec.MsgspecError, ValueError) as error:
        raise FailedPrecondition(f"{path} is no file of API keys: {error}", reason="KEYS_INVALID") from None
    return found


class _Known(NamedTuple):
    keys: dict[str, list[tuple[bytes, float, str]]]  # by id: digest, end, tenant
    tenants: dict[str, Tenant]


class Keyring:
    """A key file that follows its changes."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises what `read_key_file` does. `clock` gives seconds since 1970."""
        self._file = Watched([path], lambda: _index(read_key_file(path)))
        self._clock = clock

    @property
    def tenants(self) -> dict[str, Tenant]:
        """All of them, by name."""
        return self._file.get().tenants

    def find(self, secret: str) -> Tenant:
        """Whose key this is. Raises Unauthenticated.

        Digests are looked up by digits that are no secret, and compared in a time that does not depend on them.
        """
        digest, known = sha256(secret.encode(errors="replace")).digest(), self._file.get()
        for kept, ends, tenant in known.keys.get(digest.hex()[:_ID_DIGITS], ()):
            if hmac.compare_digest(kept, digest):
                if self._clock() < ends:
                    return known.tenants[tenant]
                raise Unauthenticated(
                    f"this API key of tenant {tenant!r} has expired: ask for a new one", reason="API_KEY_EXPIRED"
                )
        raise Unauthenticated(
            "this API key is not known, or was revoked: check that all of it was given, or ask for a new one",
            reason="API_KEY_UNKNOWN",
        )


def _index(file: KeyFile) -> _Known:
    keys: dict[str, list[tuple[bytes, float, str]]] = {}
    for key in file.keys:
        keys.setdefault(key.id, []).append((bytes.fromhex(key.sha256), key.ends, key.tenant))
    return _Known(keys, {tenant.name: tenant for tenant in file.tenants})
