"""Signed requests to one S3 bucket, tried again while the store cannot be reached.

minio's signer, URL rules and credential providers over urllib3. Its `Minio` class is not used: it has no conditional put, hashes
each body before it sends it, and gives up by a count of attempts and not by time.
"""

import base64
import configparser
import hashlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from xml.etree import ElementTree

import urllib3
from minio.credentials.credentials import Credentials
from minio.credentials.providers import Provider
from minio.helpers import BaseURL
from minio.signer import sign_v4_s3
from minio.time import to_amz_date, utcnow
from urllib3.exceptions import HTTPError
from urllib3.exceptions import SSLError as TLSError

from engine import s3_transport
from engine.errors import InvalidArgument, PermissionDenied, Unavailable
from engine.s3_errors import Address, Refusal, explain, read_refusal, untrusted, words
from engine.s3_transport import CREDENTIALS, credential_chain, store_pool

_SEND_SIZE = 256 * 1024  # a send may take READ_TIMEOUT: small, or a slow line could not carry it
_LONGEST_PAUSE = 2.0  # seconds between two attempts
_SHORTEST_WAIT = 2.0  # seconds for an answer, however little is left of patience
_SHARE = 2 / 3  # of what is left of patience for one answer: a connection that died unnoticed leaves time for another


class Stopped(Exception):
    """A body was not sent to its end because the caller wants no more of it."""


class Attempts:
    """When to try again, and when to give up: `patience` seconds after the first attempt since anything worked began."""

    def __init__(self, what: str, patience: float) -> None:
        self.failures = 0
        self._what = what
        self._patience = patience
        self._since = time.monotonic()

    def worked(self) -> None:
        """Something got through: patience begins anew."""
        self.failures = 0
        self._since = time.monotonic()

    def sent(self) -> None:
        """Bytes of a body have left. They say that the store is there, but not after a failure: it may take all and never
        answer, for ever."""
        if not self.failures:
            self._since = time.monotonic()

    def wait(self) -> float:
        """Seconds without a byte after which an attempt that begins now has failed."""
        left = self._since + self._patience - time.monotonic()
        return min(s3_transport.READ_TIMEOUT, max(_SHORTEST_WAIT, _SHARE * left))

    def failed(self, why: Exception) -> None:
        """Waits a little. Raises Unavailable when patience is over."""
        now = time.monotonic()
        self.failures += 1
        left = self._since + self._patience - now
        if left <= 0:
            tried = "once" if self.failures == 1 else f"{self.failures} times in {now - self._since:.1f} s"
            text = f"{self._what} failed, tried {tried}: {words(why)}. Check that the store runs and can be reached"
            raise Unavailable(text, reason="STORE_UNAVAILABLE") from None
        pause = min(_LONGEST_PAUSE, 0.05 * 2**self.failures) * random.uniform(0.5, 1)  # noqa: S311
        time.sleep(min(pause, left))


class S3Client:
    """One bucket. Safe to use from several threads.

    Attributes:
        address: where it is.
    """

    def __init__(self, address: Address, patience: float) -> None:
        """Opens no connection. Raises InvalidArgument for an endpoint or a CA bundle that cannot be."""
        self.address = address
        self._patience = patience
        try:
            self._urls = BaseURL(address.endpoint, address.region)
        except ValueError as error:
            text = f"endpoint {address.endpoint!r}, region {address.region!r}: {error}; give https://host or http://host:port"
            raise InvalidArgument(text, reason="STORE_URL_INVALID") from None
        self._http = store_pool(self._urls.is_https)
        self._provider: Provider | None = None  # made when it is needed: it reads certificates
        self._provider_lock = threading.Lock()
        self._bucket_seen = False

    def attempts(self, what: str) -> Attempts:
        """For what the caller itself tries again."""
        return Attempts(f"store {self.address.name} at {self.address.endpoint}: {what}", self._patience)

    def request(
        self,
        method: str,
        key: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview = b"",
        md5: bytes | None = None,
        stream: bool = False,
        expected: Collection[str] | None = (),
        stop: threading.Event | None = None,
        slow: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """Sends a request until it is answered, and returns the answer if it is a success.

        Args:
            method: of HTTP.
            key: the object's whole key; empty for the bucket.
            query: parameters.
            headers: further ones; they are signed.
            body: sent as it lies in memory.
            md5: the body's, which the store then verifies; without it, the body's SHA-256 is signed.
            stream: leave the answer's body to be read by the caller, who releases the connection.
            expected: codes of refusals that the caller deals with; None for all.
            stop: when it is set, nothing is sent any more, and Stopped is raised.
            slow: the store has much to do before it answers, and may take READ_TIMEOUT whatever is left of patience.

        Raises:
            Refusal: with an expected code.
            Stopped: see stop.
            EnginehouseError: any other refusal; Unavailable when patience is over.
        """
        attempts = self.attempts(f"{method} {key or self.address.bucket}")
        renewed = False
        while True:
            if stop and stop.is_set():
                raise Stopped
            try:
                response = self._send(method, key, query or {}, headers or {}, body, md5, stream, stop, attempts, slow)
                refusal = self._refusal(method, key, response)
            except HTTPError as error:
                if isinstance(error, TLSError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise untrusted(self.address, error) from None
                attempts.failed(error)
                continue
            if refusal is None:
                return response
            refusal.repeated = attempts.failures > 0
            if expected is None or refusal.code in expected:
                raise refusal
            if refusal.code == "ExpiredToken" and not renewed:
                self._provider = None  # a credentials file may have new ones
                renewed = True
            elif refusal.is_transient:
                attempts.failed(refusal)
            else:
                raise explain(self.address, key, refusal)

    def _send(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | memoryview,
        md5: bytes | None,
        stream: bool,
        stop: threading.Event | None,
        attempts: Attempts,
        slow: bool,
    ) -> urllib3.BaseHTTPResponse:
        region, now = self.address.region, utcnow()
        credentials = self._credentials()
        url = self._urls.build(
            method=method,
            region=region,
            bucket_name=self.address.bucket,
            object_name=key or None,
            query_params=dict(query),
        )
        # The MD5 is signed with the other headers: it binds the body, which then need not be read twice.
        digest = "UNSIGNED-PAYLOAD" if md5 else hashlib.sha256(body).hexdigest()
        signed: dict[str, str | list[str] | tuple[str]] = {
            **headers,
            "Host": url.netloc,
            "x-amz-content-sha256": digest,
            "x-amz-date": to_amz_date(now),
        }
        if md5:
            signed["Content-MD5"] = base64.b64encode(md5).decode()
        if method in ("PUT", "POST"):
            signed["Content-Length"] = str(len(body))
        if credentials.session_token:
            signed["X-Amz-Security-Token"] = credentials.session_token
        complete = sign_v4_s3(
            method=method,
            url=url,
            region=region,
            headers=signed,
            credentials=credentials,
            content_sha256=digest,
            date=now,
        )
        return self._http.urlopen(
            method,
            url.geturl(),
            body=_slices(body, stop, attempts.sent) if body else None,
            headers={name: str(value) for name, value in complete.items()},
            preload_content=not stream,
            decode_content=False,
            redirect=False,
            retries=False,
            timeout=urllib3.Timeout(
                connect=s3_transport.CONNECT_TIMEOUT, read=s3_transport.READ_TIMEOUT if slow else attempts.wait()
            ),
        )

    def _credentials(self) -> Credentials:
        try:
            with self._provider_lock:
                if self._provider is None:
                    self._provider = credential_chain()
                return self._provider.retrieve()
        except (ValueError, LookupError, OSError, HTTPError, configparser.Error) as error:
            text = (
                f"no credentials for store {self.address.name}: set {CREDENTIALS}. The last place said: {words(error)}"
            )
            raise PermissionDenied(text, reason="STORE_CREDENTIALS_MISSING") from None

    def document(self, response: urllib3.BaseHTTPResponse) -> ElementTree.Element:
        """An answer's XML. Raises FailedPrecondition for another kind of answer."""
        try:
            return ElementTree.fromstring(response.data)
        except ElementTree.ParseError:
            start = response.data[:100].decode(errors="replace")
            raise explain(self.address, "", Refusal(response.status, "no XML", start)) from None

    def pages(
        self, query: Mapping[str, str], markers: Mapping[str, str], key: str = "", expected: Collection[str] = ()
    ) -> Iterator[tuple[ElementTree.Element, urllib3.BaseHTTPResponse]]:
        """A listing, page after page; `markers` gives the parameter that each field becomes in the next request."""
        while True:
            response = self.request("GET", key, query=query, expected=expected)
            page = self.document(response)
            yield page, response
            further = {**query, **{name: page.findtext(f"{{*}}{field}") or "" for field, name in markers.items()}}
            if page.findtext("{*}IsTruncated") != "true" or further == query:
                return
            query = further

    def _refusal(self, method: str, key: str, response: urllib3.BaseHTTPResponse) -> Refusal | None:
        """What the store objects to, if anything. Raises HTTPError when the connection breaks before it is known."""
        if response.status < 300:
            # the end of a multipart upload may begin as a success and turn out to be none
            if not (method == "POST" and b"<Error" in response.data[:200]):
                self._bucket_seen = True
                return None
        elif method == "HEAD" and not (response.status == 404 and self._bucket_seen):
            try:  # an answer to HEAD has no words: no such key, or no such bucket?
                self.request("GET", key, headers={"Range": "bytes=0-0"}, expected=None)
            except Refusal as words_of_it:
                return words_of_it
            return Refusal(response.status, "InternalError", "the store says no to HEAD and yes to GET")
        refusal = read_refusal(response)
        response.release_conn()
        if refusal.code == "NoSuchKey":
            self._bucket_seen = True
        return refusal


def _slices(body: bytes | memoryview, stop: threading.Event | None, sent: Callable[[], None]) -> Iterator[memoryview]:
    view = memoryview(body)
    for start in range(0, len(view), _SEND_SIZE):
        if stop and stop.is_set():
            raise Stopped
        yield view[start : start + _SEND_SIZE]
        sent()
