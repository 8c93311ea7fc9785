"""What an S3 store refuses, and what that is to a person."""

import contextlib
from typing import NamedTuple
from xml.etree import ElementTree

import urllib3

from engine.errors import (
    EnginehouseError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from engine.s3_transport import CREDENTIALS

_TRANSIENT = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout",
    "ServiceUnavailable", "SlowDown", "Throttling", "TooManyRequests", "XMinioServerNotInitialized",
}  # fmt: skip
_FULL = {"QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", "InsufficientStorage"}
_ELSEWHERE = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "TemporaryRedirect",
    "IllegalLocationConstraintException",
}
_DENIED = {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    416: "InvalidRange",
    507: "InsufficientStorage",
}


class Address(NamedTuple):
    """Where a store is: bucket, endpoint as http:// or https:// with host and port, region, and a prefix or nothing."""

    bucket: str
    endpoint: str
    region: str
    prefix: str

    @property
    def name(self) -> str:
        """What messages call the store."""
        return f"s3://{self.bucket}{'/' * bool(self.prefix)}{self.prefix}"


class Refusal(Exception):
    """An answer that is no success.

    Attributes:
        status: HTTP's.
        code: S3's, made from the status where the answer has none.
        message: the store's words.
        repeated: whether an earlier attempt of the same request may have reached the store.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.status, self.code, self.message = status, code, message
        self.repeated = False

    @property
    def is_transient(self) -> bool:
        """Whether the same request may be answered otherwise a little later."""
        return self.code in _TRANSIENT or (self.status >= 500 and self.code not in _FULL | {"NotImplemented"})


def read_refusal(response: urllib3.BaseHTTPResponse) -> Refusal:
    """The refusal that an answer is. Raises urllib3's HTTPError when the connection breaks before it is read."""
    data = response.data
    fields: dict[str, str] = {}
    with contextlib.suppress(ElementTree.ParseError):
        fields = {item.tag.rpartition("}")[2]: item.text or "" for item in ElementTree.fromstring(data)}
    code = fields.get("Code") or _CODES.get(response.status, f"HTTP {response.status}")
    message = fields.get("Message") or ("" if fields else data[:200].decode(errors="replace").strip())
    if where := fields.get("Region") or response.headers.get("x-amz-bucket-region") or fields.get("Endpoint"):
        message += f" (the bucket is at {where})"
    return Refusal(response.status, code, message)


def explain(address: Address, key: str, refusal: Refusal) -> EnginehouseError:
    """What a refusal is to a person."""
    bucket, store = address.bucket, f"store {address.name}"
    if refusal.code == "NoSuchKey":
        return NotFound(f"{store} has no {key}", reason="OBJECT_NOT_FOUND")
    if refusal.code == "NoSuchBucket":
        text = f"there is no bucket {bucket!r} at {address.endpoint}: create it, or correct the store's URL"
        return NotFound(text, reason="BUCKET_NOT_FOUND")
    if refusal.code in _FULL:
        text = (
            f"{store} is full while writing {key}: free some space, or raise the quota of bucket {bucket!r} ({refusal})"
        )
        return ResourceExhausted(text, reason="STORE_FULL")
    if refusal.code == "RequestTimeTooSkewed":
        text = f"{store} refuses requests because this machine's clock differs too much from its own: set the clock"
        return PermissionDenied(text, reason="CLOCK_SKEWED")
    if refusal.code in _ELSEWHERE:
        text = f"bucket {bucket!r} is not in region {address.region!r}: set region= in the store's URL ({refusal})"
        return InvalidArgument(text, reason="STORE_REGION_WRONG")
    if refusal.status in (401, 403) or refusal.code in _DENIED:
        text = f"{store} refuses access to bucket {bucket!r}: {refusal}. Set credentials that may use it: {CREDENTIALS}"
        return PermissionDenied(text, reason="STORE_DENIED")
    text = f"{store} at {address.endpoint} refuses {key or bucket} ({refusal.status}, {refusal}). Is it S3?"
    return FailedPrecondition(text, reason="STORE_REFUSED")


def untrusted(address: Address, error: Exception) -> EnginehouseError:
    """A certificate that nobody vouches for."""
    text = (
        f"store {address.name}: the certificate of {address.endpoint} is not trusted ({words(error)}). "
        "If it is your own authority's, set AWS_CA_BUNDLE to the file with the authority's certificate"
    )
    return FailedPrecondition(text, reason="STORE_UNTRUSTED")


def words(error: Exception) -> str:
    """An error without the addresses of Python objects."""
    text = str(error)
    return text.split(">: ", 1)[-1] if text.startswith("<") else text or type(error).__name__
