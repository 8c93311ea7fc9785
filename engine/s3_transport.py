"""What carries requests to S3: pools of connections with timeouts of our own, and where credentials are looked for."""

import os
import ssl

import certifi
import urllib3
from minio.credentials.providers import AWSConfigProvider, ChainedProvider, EnvAWSProvider, IamAwsProvider, Provider
from urllib3.connection import HTTPConnection, HTTPSConnection

from engine.errors import InvalidArgument

CONNECT_TIMEOUT = 3.0  # seconds
READ_TIMEOUT = 15.0  # seconds without a byte, in either direction
_CONNECTIONS = 64  # kept open; readers, times the files they read at once

_ROLE_SOURCES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile AWS_PROFILE in AWS_SHARED_CREDENTIALS_FILE "
    "(~/.aws/credentials), or a role (web identity, container or EC2 metadata)"
)


def credential_chain() -> Provider:
    """Environment, credentials file, then a role: quick to say that there is none where no metadata service answers."""
    timeout = urllib3.Timeout(connect=1, read=5)  # seconds; the metadata service is one hop away
    providers: list[Provider] = [EnvAWSProvider(), AWSConfigProvider()]
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" or any(
        name in os.environ for name in _ROLE_SOURCES
    ):
        providers.append(IamAwsProvider(http_client=_pool(timeout, tls=True)))
    return ChainedProvider(providers)


def store_pool(tls: bool) -> urllib3.PoolManager:
    """Connections to a store, which wait longer for its bytes than for it to be there. Raises InvalidArgument (AWS_CA_BUNDLE)."""
    pool = _pool(urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT), tls)
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
    return pool


def _pool(timeout: urllib3.Timeout, tls: bool) -> urllib3.PoolManager:
    if not tls:
        return urllib3.PoolManager(maxsize=_CONNECTIONS, timeout=timeout, retries=False)
    bundle = os.environ.get("AWS_CA_BUNDLE") or certifi.where()
    try:
        context = ssl.create_default_context(cafile=bundle)
    except OSError as error:
        text = f"AWS_CA_BUNDLE={bundle} holds no certificates: {error.strerror or error}"
        raise InvalidArgument(text, reason="CA_BUNDLE_INVALID") from None
    return urllib3.PoolManager(maxsize=_CONNECTIONS, timeout=timeout, retries=False, ssl_context=context)


class _Connection(HTTPConnection):
    """urllib3 sends under the timeout for connecting, which is too short for a store that is busy writing."""

    def send(self, data: object) -> None:
        if self.sock is not None:
            self.sock.settimeout(READ_TIMEOUT)
        super().send(data)  # type: ignore[arg-type]


class _TLSConnection(HTTPSConnection):
    def send(self, data: object) -> None:
        if self.sock is not None:
            self.sock.settimeout(READ_TIMEOUT)
        super().send(data)  # type: ignore[arg-type]


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection
