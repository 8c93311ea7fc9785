"""What clients bring to services: what a caller gives them, else what was typed before a command, else the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path

from protos.dial import Credentials, check_key, key_of_file
from protos.tls import ClientTls, TlsFiles

KEY_VARIABLE, KEY_FILE_VARIABLE = "ENGINEHOUSE_API_KEY", "ENGINEHOUSE_API_KEY_FILE"


@dataclass(frozen=True)
class Given:
    """Each may be missing.

    Attributes:
        api_key: the key itself; api_key_file: where it is.
        tls_ca: PEM of the authority whose servers are trusted, or "system"; tls_cert, tls_key: what they are shown.
    """

    api_key: str | None = None
    api_key_file: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def over(self, other: "Given") -> "Given":
        """This, and where it says nothing, the other."""
        merged = {field.name: getattr(self, field.name) or getattr(other, field.name) for field in fields(self)}
        if self.api_key or self.api_key_file:
            merged |= {"api_key": self.api_key, "api_key_file": self.api_key_file}
        return Given(**merged)


_NOTHING = Given()
_typed: ContextVar[Given] = ContextVar("typed", default=_NOTHING)


@contextmanager
def typed(given: Given) -> Iterator[None]:
    """What was typed, as long as the context lasts."""
    token = _typed.set(given)
    try:
        yield
    finally:
        _typed.reset(token)


def find(given: Given) -> Credentials:
    """Credentials of a client. Raises EnginehouseError for files and keys that are not right, without showing them."""
    environment = Given(
        os.environ.get(KEY_VARIABLE),
        os.environ.get(KEY_FILE_VARIABLE),
        *(os.environ.get(f"ENGINEHOUSE_TLS_{part}") for part in ("CA", "CERT", "KEY")),
    )
    chosen = given.over(_typed.get()).over(environment)
    files = TlsFiles.of(chosen.tls_cert, chosen.tls_key, chosen.tls_ca)
    api_key = None
    if chosen.api_key:
        secret = check_key(chosen.api_key)
        api_key = lambda: secret  # noqa: E731
    elif chosen.api_key_file:
        api_key = key_of_file(Path(chosen.api_key_file))
    return Credentials(ClientTls(files) if files else None, api_key)
