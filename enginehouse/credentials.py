"""What clients bring to services: what a caller gives them, else what was typed before a command, else the environment."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path

from protos.dial import Credentials, check_key, key_of_file
from protos.tls import CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE, ClientTls, TlsFiles

_VARIABLES = {
    "api_key": "ENGINEHOUSE_API_KEY",
    "api_key_file": "ENGINEHOUSE_API_KEY_FILE",
    "tls_ca": CA_VARIABLE,
    "tls_cert": CERT_VARIABLE,
    "tls_key": KEY_VARIABLE,
}


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

    @property
    def environment(self) -> dict[str, str]:
        """The variables that say the same to another program."""
        given = {name: getattr(self, name) for name in _VARIABLES}
        return {_VARIABLES[name]: value for name, value in given.items() if value}


_NOTHING = Given()
_typed: ContextVar[Given] = ContextVar("typed", default=_NOTHING)


@contextmanager
def typed(given: Given) -> Iterator[None]:
    """What was typed, as long as the context lasts, over what was before."""
    token = _typed.set(given.over(_typed.get()))
    try:
        yield
    finally:
        _typed.reset(token)


def typed_environment() -> dict[str, str]:
    """The variables for a program that is to bring what was typed."""
    return _typed.get().environment


def find(given: Given) -> Credentials:
    """Credentials of a client. Raises EnginehouseError for files and keys that are not right, without showing them."""
    environment = Given(**{name: os.environ.get(variable) for name, variable in _VARIABLES.items()})
    chosen = given.over(_typed.get()).over(environment)
    files = TlsFiles.of(chosen.tls_cert, chosen.tls_key, chosen.tls_ca)
    return Credentials(ClientTls(files) if files else None, _api_key(chosen))


def _api_key(chosen: Given) -> Callable[[], str] | None:
    if chosen.api_key:
        secret = check_key(chosen.api_key)
        return lambda: secret
    return key_of_file(Path(chosen.api_key_file)) if chosen.api_key_file else None
