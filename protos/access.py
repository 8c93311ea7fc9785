"""Who may call a service: the holders of API keys, the owners of certificates, or everybody who reaches it."""

import argparse
import ipaddress
import logging
from collections.abc import Collection, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated
from protos import logs, tls
from protos.keys import ANYBODY, Keyring, Tenant

AUTHORIZATION = "authorization"
_BEARER = "bearer "
_OPEN = "/grpc.health.v1.Health/"  # tells nothing that connecting would not; probes hold no keys
_NAMES = ("x509_common_name", "x509_subject_alternative_name", "peer_spiffe_id")

if TYPE_CHECKING:  # prometheus_client comes with services that have metrics, not with clients
    from protos.metrics import Metrics

log = logging.getLogger(__name__)

_caller: ContextVar[Tenant] = ContextVar("caller", default=ANYBODY)


def caller() -> Tenant:
    """Who has made the call that this task works for."""
    return _caller.get()


@dataclass(frozen=True)
class Access:
    """What a service asks of those who connect. Everybody is let in where nothing is said.

    Attributes:
        server: its certificates; None speaks without TLS.
        names: of certificates, as common name, DNS or URI (SPIFFE) name; empty takes all that the authority has signed.
        keyring: the API keys, if one is needed.
    """

    server: tls.ServerTls | None = None
    names: frozenset[str] = frozenset()
    keyring: Keyring | None = None

    @staticmethod
    def of(service: str, options: argparse.Namespace) -> "Access":
        """What a command line says, as `protos.options` gives it; "builder", "executor" or "gateway".

        Raises:
            EnginehouseError: files are not right, or everybody on the network could command an executor or builder.
        """
        files = tls.TlsFiles.of(options.tls_cert, options.tls_key, options.tls_ca)
        names = frozenset(options.allow_client)
        if names and not (files and files.ca):
            raise InvalidArgument(
                "--allow-client names clients by their certificates: say with --tls-ca who signs these",
                reason="TLS_INCOMPLETE",
            )
        keyring = Keyring(Path(options.api_keys)) if options.api_keys else None
        access = Access(tls.ServerTls(files) if files else None, names, keyring)
        if not options.insecure:
            access.check_host(service, options.host)
        return access

    def check(self, method: str, context: Any) -> None:
        """Lets a call in, and notes whose it is. Raises Unauthenticated, PermissionDenied."""
        if method.startswith(_OPEN):
            return
        if self.names:
            self._check_names(method, context)
        tenant = self.keyring.find(_secret(context.invocation_metadata() or ())) if self.keyring else ANYBODY
        _caller.set(tenant)
        logs.note(tenant=tenant.name or None)

    def watch(self, metrics: "Metrics") -> None:
        """Tells how long the certificate is good, so that somebody renews it in time."""
        metrics.gauge(
            "tls_certificate_expires_timestamp_seconds",
            "When the service's certificate expires, since 1970.",
            lambda: {(): self.server.expires} if self.server else {},
        )

    def check_host(self, service: str, host: str) -> None:
        """Raises FailedPrecondition for an executor or builder that would obey everybody on the network. A gateway, of which
        others only want text, says so in its log."""
        if self.keyring or (self.server and self.server.asks) or _is_loopback(host):
            return
        said = (
            f"{service} on {host} would obey everybody who reaches it: give --api-keys or --tls-ca (docs/security.md)"
        )
        if service != "gateway":
            raise FailedPrecondition(
                f"{said}, or --insecure where only its gateways and people who may do all reach its network",
                reason="OPEN_TO_EVERYBODY",
            )
        log.warning("%s, or --insecure to say that this is right", said)

    def _check_names(self, method: str, context: Any) -> None:
        shown = {name.decode(errors="replace") for kind in _NAMES for name in context.auth_context().get(kind, ())}
        if not shown & self.names:
            raise PermissionDenied(
                f"a client whose certificate says {_listed(shown)} may not call {method.rpartition('/')[2]} here: start this "
                "service with --allow-client and that name, or use a certificate that is allowed",
                reason="CLIENT_DENIED",
            )


EVERYBODY = Access()


def bearer(secret: str) -> tuple[str, str]:
    """The metadata that carries a key."""
    return AUTHORIZATION, f"Bearer {secret}"


def _secret(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == AUTHORIZATION:
            text = value if isinstance(value, str) else value.decode(errors="replace")
            if text[: len(_BEARER)].lower() == _BEARER:
                return text[len(_BEARER) :].strip()
            raise Unauthenticated(
                "the authorization metadata does not begin with 'Bearer ': send 'authorization: Bearer KEY'",
                reason="API_KEY_MALFORMED",
            )
    raise Unauthenticated(
        "no API key: send the metadata 'authorization: Bearer KEY' (--api-key-file FILE, $ENGINEHOUSE_API_KEY, or "
        "api_key= of a client)",
        reason="API_KEY_MISSING",
    )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
