"""TLS of every hop: certificates from PEM files, checked when they are read, read again when they change.

A server with `cert` and `key` speaks TLS alone; with `ca`, too, it takes only clients whose certificate that authority has
signed (mutual TLS). A client with `ca` speaks TLS, and with `cert` and `key` it shows who it is. `cryptography` and grpc are
imported where TLS is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from engine.errors import FailedPrecondition, InvalidArgument
from protos.watched import Watched

if TYPE_CHECKING:
    import ssl

    import grpc
    from cryptography import x509

T = TypeVar("T")

CERT_VARIABLE, KEY_VARIABLE, CA_VARIABLE = "ENGINEHOUSE_TLS_CERT", "ENGINEHOUSE_TLS_KEY", "ENGINEHOUSE_TLS_CA"
SYSTEM_CA = "system"  # instead of a file: the authorities that grpc brings along


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: `cert`, a certificate with those that lead to its authority, and its `key` are one's own; whose `ca` signed
    the other side's certificate is trusted. None where a side has none. `option` is what errors call them by."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    option: str = "--tls"

    @staticmethod
    def of(cert: str | None, key: str | None, ca: str | None, option: str = "--tls") -> "TlsFiles | None":
        """None where nothing is given: no TLS. Raises InvalidArgument for half of a pair."""
        if not (cert or key or ca):
            return None
        if bool(cert) != bool(key):
            given, missing = ("cert", "key") if cert else ("key", "cert")
            raise InvalidArgument(
                f"{option}-{given} is given without {option}-{missing}: they are a pair", reason="TLS_INCOMPLETE"
            )
        own, private, authority = (Path(each) if each else None for each in (cert, key, ca))
        return TlsFiles(own, private, authority, option)

    @property
    def paths(self) -> list[Path]:
        """Those that are files."""
        return [path for path in (self.cert, self.key, self.ca) if path and str(path) != SYSTEM_CA]


class _Pems(NamedTuple):
    own: tuple[bytes, bytes] | None  # key, certificate
    ca: bytes | None
    expires: float  # seconds since 1970


class ServerTls:
    """A server's certificates.

    Raises:
        InvalidArgument, FailedPrecondition: a file is not there or not what it should be, which is said.
    """

    def __init__(self, files: TlsFiles) -> None:
        if not files.cert:
            raise InvalidArgument(
                "--tls-ca is given without --tls-cert and --tls-key: a server that asks clients for their certificates needs "
                "its own, too",
                reason="TLS_INCOMPLETE",
            )
        if str(files.ca) == SYSTEM_CA:
            raise InvalidArgument(
                f"--tls-ca {SYSTEM_CA} would let in everybody with a public certificate: give the file of your own authority",
                reason="TLS_CA_INVALID",
            )
        self._files = files
        self._pems = Watched(files.paths, lambda: _read(files))
        self._given = self._pems.version

    @property
    def asks(self) -> bool:
        """Whether clients must show a certificate."""
        return self._files.ca is not None

    @property
    def expires(self) -> float:
        """When the certificate does, in seconds since 1970."""
        return self._pems.get().expires

    def credentials(self) -> "grpc.ServerCredentials":
        """For `add_secure_port`; each new connection gets the newest certificate."""
        import grpc

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(self._pems.get()),
            self._fetch,  # type: ignore[arg-type]  # may give None
            require_client_authentication=self.asks,
        )

    def context(self) -> "ssl.SSLContext":
        """The same for a server that is not grpc's."""
        import ssl

        files, version = self._files, self._pems.version
        if not (files.cert and files.key):
            raise InvalidArgument("a server needs --tls-cert and --tls-key", reason="TLS_INCOMPLETE")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(files.cert, files.key)
        if files.ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(files.ca)
        newest = {version: context}

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            self._pems.get()
            if self._pems.version not in newest:
                newest.clear()
                newest[self._pems.version] = self.context()
            connection.context = newest[self._pems.version]

        context.sni_callback = choose
        return context

    def _fetch(self) -> "grpc.ServerCertificateConfiguration | None":
        """Called before each handshake, in a thread of grpc's; None leaves everything as it was."""
        pems = self._pems.get()
        if self._pems.version == self._given:
            return None
        self._given = self._pems.version
        return self._configuration(pems)

    def _configuration(self, pems: _Pems) -> "grpc.ServerCertificateConfiguration":
        import grpc

        return grpc.ssl_server_certificate_configuration([pems.own] if pems.own else [], pems.ca)


class ClientTls:
    """Whom a client trusts, and what it shows of itself. Raises what `ServerTls` does."""

    def __init__(self, files: TlsFiles) -> None:
        if not files.ca:
            raise InvalidArgument(
                f"a client certificate is given without {files.option}-ca: say whose servers it may be shown to, or "
                f"{SYSTEM_CA!r} for those with a public certificate",
                reason="TLS_INCOMPLETE",
            )
        self._pems = Watched(files.paths, lambda: _read(files))

    @property
    def version(self) -> int:
        """Rises when the files change: a channel has the certificates that it was made with."""
        self._pems.get()
        return self._pems.version

    def credentials(self) -> "grpc.ChannelCredentials":
        """With the newest certificates."""
        import grpc

        pems = self._pems.get()
        return grpc.ssl_channel_credentials(pems.ca, *(pems.own or ()))


def first_name(path: Path) -> str:
    """One that a server's certificate is for. Raises FailedPrecondition if it is for none."""
    from cryptography import x509

    own = _parsed(path, "certificates", lambda: x509.load_pem_x509_certificates(_bytes(path)))[0]
    try:
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return str(next(iter((*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)))))
    except (x509.ExtensionNotFound, StopIteration):
        raise FailedPrecondition(
            f"the certificate in {path} is for no host: no client would take it", reason="TLS_FILE_INVALID"
        ) from None


def _read(files: TlsFiles) -> _Pems:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    own = ca = None
    expires = float("inf")
    if files.cert and files.key:
        cert, key = _bytes(files.cert), _bytes(files.key)
        own = key, cert
        certificate = _parsed(files.cert, "certificates", lambda: x509.load_pem_x509_certificates(cert))[0]
        private = _parsed(files.key, "private key without a password", lambda: load_pem_private_key(key, None))
        if _parsed(files.cert, "public key that is known", certificate.public_key) != private.public_key():
            raise FailedPrecondition(
                f"the key in {files.key} is not that of the certificate in {files.cert}: give the pair that was made together",
                reason="TLS_KEY_MISMATCH",
            )
        _check_time(files.cert, certificate)
        expires = certificate.not_valid_after_utc.timestamp()
    if files.ca and str(files.ca) != SYSTEM_CA:
        ca = _bytes(files.ca)
        _parsed(files.ca, "certificates", lambda: x509.load_pem_x509_certificates(ca))
    return _Pems(own, ca, expires)


def _check_time(path: Path, certificate: "x509.Certificate") -> None:
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        past = certificate.not_valid_after_utc <= now
        when = certificate.not_valid_after_utc if past else certificate.not_valid_before_utc
        raise FailedPrecondition(
            f"the certificate in {path} {'has been expired since' if past else 'is not valid before'} {when:%Y-%m-%d %H:%M} "
            "UTC: renew it, or set this machine's clock right",
            reason="TLS_CERTIFICATE_EXPIRED" if past else "TLS_CERTIFICATE_EARLY",
        )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}", reason="TLS_FILE_UNREADABLE") from None


def _parsed(path: Path, what: str, parse: Callable[[], T]) -> T:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return parse()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FailedPrecondition(f"{path} holds no {what} in PEM: {error}", reason="TLS_FILE_INVALID") from None
