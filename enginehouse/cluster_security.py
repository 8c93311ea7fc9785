"""Which certificates and keys the services of a local cluster, and its clients, are given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidArgument
from enginehouse.credentials import Given, find

_CLIENTS = {"executor": ("gateway", "client"), "builder": ("client",)}  # whom they let in, by certificate


@dataclass(frozen=True)
class ClusterSecurity:
    """Nothing by default: services on 127.0.0.1 trust whoever reaches them.

    Attributes:
        certs: a directory as `enginehouse certs` makes it: mutual TLS between all.
        api_keys: the file of the keys that the gateway then asks for, instead of clients' certificates.
    """

    certs: Path | None = None
    api_keys: Path | None = None

    def options(self, service: str) -> list[str]:
        """Of a service's command line; "gateway", "executor" or "builder"."""
        found = []
        if self.certs:
            found += self._pair("--tls", service)
            if not (service == "gateway" and self.api_keys):
                found += ["--tls-ca", self._file("ca")]
            for name in _CLIENTS.get(service, ()):
                found += ["--allow-client", name]
            if service == "gateway":
                found += [*self._pair("--executor-tls", service), "--executor-tls-ca", self._file("ca")]
        if self.api_keys and service == "gateway":
            found += ["--api-keys", str(self.api_keys.absolute())]
        return found

    @property
    def client(self) -> Given:
        """What clients bring, beside an API key of theirs."""
        if not self.certs:
            return Given()
        return Given(tls_ca=self._file("ca"), tls_cert=self._file("client"), tls_key=self._file("client-key"))

    def check(self) -> None:
        """Raises InvalidArgument, FailedPrecondition now for what services or clients could not use later."""
        credentials = find(self.client)
        if self.api_keys and credentials.api_key is None:
            raise InvalidArgument(
                f"the gateway will ask for a key of {self.api_keys}, and `up` itself has none to look whether it serves: "
                "give one with `enginehouse --api-key-file FILE up ...` or $ENGINEHOUSE_API_KEY",
                reason="API_KEY_MISSING",
            )

    def _pair(self, option: str, service: str) -> list[str]:
        return [f"{option}-cert", self._file(service), f"{option}-key", self._file(f"{service}-key")]

    def _file(self, name: str) -> str:
        return str((self.certs or Path()).absolute() / f"{name}.pem")


def without_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what is meant for this process: services get theirs on their command lines, and need no client's key."""
    ours = ("ENGINEHOUSE_TLS_", "ENGINEHOUSE_API_KEY", "ENGINEHOUSE_EXECUTOR_")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}
