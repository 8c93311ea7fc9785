"""Channels to services: with TLS and an API key where there are any, and in words why one does not come about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from engine.errors import InvalidArgument
from protos.access import bearer
from protos.tls import ClientTls, TlsFiles
from protos.watched import Watched

Options = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Credentials:
    """What a client brings: nothing by default.

    Attributes:
        tls: None connects without TLS.
        api_key: gives the key, at each call anew, so that a file's may be replaced.
    """

    tls: ClientTls | None = None
    api_key: Callable[[], str] | None = None

    @staticmethod
    def of(
        cert: str | None, key: str | None, ca: str | None, api_key_file: str | None, option: str = "--tls"
    ) -> "Credentials":
        """Of files, None where there is none. Raises EnginehouseError for those that are not right."""
        files = TlsFiles.of(cert, key, ca, option)
        return Credentials(
            ClientTls(files) if files else None, key_of_file(Path(api_key_file)) if api_key_file else None
        )

    @property
    def version(self) -> int:
        """Rises when certificates change, with which only a new channel would connect."""
        return self.tls.version if self.tls else 0

    def channel(self, address: str, options: Options = ()) -> grpc.aio.Channel:
        """Connects with the first call."""
        made = (
            grpc.aio.secure_channel(address, self.tls.credentials(), options=options)
            if self.tls
            else grpc.aio.insecure_channel(address, options=options)
        )
        return cast(grpc.aio.Channel, _WithKey(made, self.api_key)) if self.api_key else made


NONE = Credentials()


def key_of_file(path: Path) -> Callable[[], str]:
    """The key in a file, read again when it changes. Raises InvalidArgument if there is none."""

    def load() -> str:
        try:
            return check_key(path.read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidArgument(f"cannot read the API key in {path}: {reason}", reason="API_KEY_UNREADABLE") from None

    return Watched([path], load).get


def check_key(secret: str) -> str:
    """The key. Raises InvalidArgument, without showing it, for what metadata cannot carry."""
    if not (secret and secret.isascii() and secret.isprintable() and " " not in secret):
        raise InvalidArgument(
            f"an API key of {len(secret)} characters is none: give what `enginehouse keys add` has printed, on one line",
            reason="API_KEY_MALFORMED",
        )
    return secret


def why_not(details: str, address: str, credentials: Credentials) -> str | None:
    """What to do where connecting has failed with these details of a gRPC status; None where TLS has nothing to do with it."""
    if not details.startswith("failed to connect"):
        return None
    if "WRONG_VERSION_NUMBER" in details:
        return f"{address} speaks no TLS: connect without --tls-ca ($ENGINEHOUSE_TLS_CA), or give that service a certificate"
    if "certificate has expired" in details:
        return f"{address} has a certificate that has expired: renew it there"
    if "Hostname Verification" in details:
        return f"{address} has a certificate for other names: connect by one of those, or give it one for this"
    if "CERTIFICATE_VERIFY_FAILED" in details or "BAD_SIGNATURE" in details:
        return f"{address} has a certificate that the authority in --tls-ca ($ENGINEHOUSE_TLS_CA) has not signed: give its own"
    if "Socket closed" in details or "Connection reset" in details or "Broken pipe" in details:
        if credentials.tls is None:
            return f"{address} closes the connection: if it speaks TLS, give its authority with --tls-ca ($ENGINEHOUSE_TLS_CA)"
        return (
            f"{address} closes the connection: it may want a client certificate of its own authority; give --tls-cert and "
            "--tls-key ($ENGINEHOUSE_TLS_CERT, $ENGINEHOUSE_TLS_KEY)"
        )
    return None


class _WithKey:
    """A channel whose calls carry the key. grpc refuses call credentials where there is no TLS, such as on one machine, and an
    interceptor would cost a stream something at every message."""

    def __init__(self, channel: grpc.aio.Channel, api_key: Callable[[], str]) -> None:
        self._channel, self._api_key = channel, api_key

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return found

        def method(*arguments: Any, **named: Any) -> Callable[..., Any]:
            call = found(*arguments, **named)

            def invoke(*given: Any, metadata: Sequence[tuple[str, Any]] | None = None, **options: Any) -> Any:
                return call(*given, metadata=(*(metadata or ()), bearer(self._api_key())), **options)

            return invoke

        return method

    async def __aenter__(self) -> "_WithKey":
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)
