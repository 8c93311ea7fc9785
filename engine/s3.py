"""The store in a bucket of S3, or of what speaks its protocol."""

import mmap
import os
import re
from collections.abc import Iterator
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError

from engine.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from engine.s3_client import S3Client
from engine.s3_errors import Address, Refusal
from engine.s3_upload import PART_SIZE, Uploads
from engine.store import Entry, Progress, Store, check_key, check_prefix, is_key

_READ_SIZE = 1024 * 1024
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class S3Store(Store):
    """Objects are S3's, under an optional prefix that belongs to this store alone. The bucket must be there.

    `s3://bucket/prefix?endpoint=http://host:port&region=name`. The endpoint may come from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL
    (else it is Amazon's), the region from AWS_REGION or AWS_DEFAULT_REGION (else us-east-1); `url` names both. Credentials come
    from where AWS' own tools look for them, and a certificate authority from AWS_CA_BUNDLE.

    Needs conditional puts (`If-None-Match: *`), as S3, SeaweedFS, Ceph and MinIO have them.
    """

    def __init__(self, url: str, patience: float = 10.0, part_size: int = PART_SIZE) -> None:
        """Sends nothing.

        Args:
            url: as above.
            patience: seconds that an operation goes on trying while the store cannot be reached or says nothing, from the
                start of the first attempt since something worked. The last attempt may take some 5 s longer; one that sends
                an upload's part or ends an upload, `s3_transport.READ_TIMEOUT`.
            part_size: bytes of an upload's parts, at least S3's 5 MiB. An upload resumes only with the size that it began with.

        Raises:
            InvalidArgument: the URL, or AWS_CA_BUNDLE, cannot be right.
        """
        address = _parse(url)
        self._prefix = address.prefix and address.prefix + "/"
        self.url = f"{address.name}?{urlencode({'endpoint': address.endpoint, 'region': address.region}, safe=':/')}"
        self._client = S3Client(address, patience)
        self._uploads = Uploads(self._client, part_size)

    def read(self, key: str) -> bytes:
        return self._get(key).data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        if not len(buffer) and self.size(key) is None:
            raise self._missing(key)
        attempts = self._client.attempts(f"GET {key}")
        done = 0
        while done < len(buffer):
            try:
                response = self._get(key, f"bytes={offset + done}-{end - 1}")
            except Refusal:  # a range that begins at the end, or after it
                raise self._truncated(key, offset + done, end) from None
            if response.status != 206 and offset + done > 0:
                response.close()
                raise Unavailable(f"store {self.url} does not answer ranged reads", reason="STORE_UNAVAILABLE")
            length, came = int(response.headers.get("Content-Length", 0)), 0
            # urllib3's readinto makes a copy of what it reads, http.client's below it does not
            source = getattr(response, "_fp", response)
            try:
                while done < len(buffer) and (count := source.readinto(buffer[done : done + _READ_SIZE])):
                    done, came = done + count, came + count
                    attempts.worked()
                if came < length and done < len(buffer):
                    raise ProtocolError(f"the connection ended after {came} of {length} bytes")
            except (HTTPError, HTTPException, OSError) as error:
                response.close()
                attempts.failed(error)
                continue
            if came == length:
                response.release_conn()
            else:
                response.close()
            if done < len(buffer):
                raise self._truncated(key, offset + done, end)

    def size(self, key: str) -> int | None:
        try:
            response = self._client.request("HEAD", self._path(key), expected={"NoSuchKey"})
        except Refusal:
            return None
        return int(response.headers["Content-Length"])

    def create(self, key: str, data: bytes) -> bool:
        condition = {"If-None-Match": "*"}
        try:
            self._client.request("PUT", self._path(key), headers=condition, body=data, expected={"PreconditionFailed"})
        except Refusal as refusal:
            # an attempt whose answer was lost may be the one that created it
            return refusal.repeated and self.read(key) == data
        return True

    def replace(self, key: str, data: bytes) -> None:
        self._client.request("PUT", self._path(key), body=data)

    def upload(self, key: str, path: Path, progress: Progress | None = None, *, move: bool = False) -> None:  # noqa: ARG002
        address = self._path(key)
        total = path.stat().st_size
        report = progress or (lambda *_: None)
        if self.size(key) != total:
            self._uploads.put(address, _mapped(path), report, lambda: self.size(key) == total)
            if (found := self.size(key)) != total:
                text = f"{key} in {self.url} has {found} bytes after an upload of {total}: repeat it"
                raise DataLoss(text, reason="OBJECT_TRUNCATED")
        report(total, total)

    def list(self, prefix: str) -> Iterator[Entry]:
        found = []
        query = {"list-type": "2", "prefix": self._prefix + check_prefix(prefix)}
        for page, _ in self._client.pages(query, {"NextContinuationToken": "continuation-token"}):
            for item in page.iterfind("{*}Contents"):
                fields = {field.tag.rpartition("}")[2]: field.text or "" for field in item}
                key = fields["Key"].removeprefix(self._prefix)
                if is_key(key):
                    modified = datetime.fromisoformat(fields["LastModified"]).timestamp()
                    found.append(Entry(key, int(fields["Size"]), modified))
        yield from sorted(found)  # some stores sort by path component

    def delete(self, key: str) -> None:
        self._client.request("DELETE", self._path(key))

    def discard_partial(self, age: float) -> int:
        return self._uploads.discard(self._prefix, age)

    def _path(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _get(self, key: str, span: str | None = None) -> urllib3.BaseHTTPResponse:
        """An object, or a range of it that is still to be read. Raises Refusal for a range that does not exist."""
        headers, expected = ({"Range": span}, {"NoSuchKey", "InvalidRange"}) if span else (None, {"NoSuchKey"})
        try:
            return self._client.request("GET", self._path(key), headers=headers, stream=bool(span), expected=expected)
        except Refusal as refusal:
            if refusal.code == "NoSuchKey":
                raise self._missing(key) from None
            raise

    def _missing(self, key: str) -> NotFound:
        return NotFound(f"store {self._client.address.name} has no {key}", reason="OBJECT_NOT_FOUND")

    def _truncated(self, key: str, at: int, expected: int) -> DataLoss:
        text = f"{key} in {self._client.address.name} has no byte {at}, expected {expected} bytes"
        return DataLoss(f"{text}: delete it and build the engine again", reason="OBJECT_TRUNCATED")


def _parse(url: str) -> Address:
    """Where it is. Raises InvalidArgument, without repeating what may be a secret."""
    parts = urlsplit(url)
    shape = (
        "give s3://bucket/prefix?endpoint=http://host:port&region=name (prefix, endpoint and region may be left out)"
    )
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    if any("@" in part for part in (parts.netloc, *(value for name, value in parameters if name == "endpoint"))):
        text = (
            "a store's URL holds no credentials, since others see it: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        raise InvalidArgument(text, reason="STORE_URL_INVALID")
    given = dict(parameters)
    for name in given:
        if name not in ("endpoint", "region"):
            raise InvalidArgument(f"unknown parameter {name!r} in a store's URL: {shape}", reason="STORE_URL_INVALID")
    prefix = unquote(parts.path).strip("/")
    if parts.fragment or len(given) < len(parameters) or (prefix and not is_key(prefix)):
        raise InvalidArgument(f"{url!r} is no store: {shape}", reason="STORE_URL_INVALID")
    if not _BUCKET.fullmatch(parts.netloc):
        raise InvalidArgument(f"{parts.netloc!r} is no bucket's name: {shape}", reason="STORE_URL_INVALID")
    region = given.get("region") or _environment("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
    amazon = f"https://s3.{region}.amazonaws.com{'.cn' * region.startswith('cn-')}"
    endpoint = given.get("endpoint") or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") or amazon
    return Address(parts.netloc, endpoint.rstrip("/"), region, prefix)


def _environment(*names: str) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")


def _mapped(path: Path) -> memoryview:
    """A file's bytes where the system's cache has them: an upload takes no memory of its own."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
