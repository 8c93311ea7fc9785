"""Errors as OpenAI's API tells them: an HTTP status and an object, of the gRPC status that every error of ours has."""

from typing import Any

from engine.errors import EnginehouseError, Internal
from protos.rpc import to_failure

_BAD, _QUOTA, _SERVER = "invalid_request_error", "rate_limit_error", "server_error"
_STATUS = {  # google.rpc.Code -> HTTP status, and the `type` that clients know
    3: (400, _BAD),  # INVALID_ARGUMENT
    4: (504, _SERVER),  # DEADLINE_EXCEEDED
    5: (404, _BAD),  # NOT_FOUND
    7: (403, "permission_error"),  # PERMISSION_DENIED
    8: (429, _QUOTA),  # RESOURCE_EXHAUSTED
    9: (400, _BAD),  # FAILED_PRECONDITION: such as a chat with a model that has no template
    12: (400, _BAD),  # UNIMPLEMENTED: the request asks for what is not supported
    14: (503, _SERVER),  # UNAVAILABLE
    16: (401, "authentication_error"),  # UNAUTHENTICATED
}
_OWN = {"METHOD_NOT_ALLOWED": 405, "BODY_TOO_LARGE": 413, "MEDIA_TYPE_UNKNOWN": 415}
_INTERNAL = (500, _SERVER)


def known(error: BaseException) -> EnginehouseError:
    """The error, or Internal for one that is not ours."""
    if isinstance(error, EnginehouseError):
        return error
    return Internal("the gateway failed with an error of its own; its log has more under this request's id")


def status(error: EnginehouseError) -> int:
    """The HTTP status."""
    return _OWN.get(error.reason, _STATUS.get(error.code, _INTERNAL)[0])


def body(error: EnginehouseError) -> dict[str, Any]:
    """The object in an answer, or in a stream whose status has been sent. `code` is the reason, as gRPC clients get it."""
    kind = _STATUS.get(error.code, _INTERNAL)[1]
    message = to_failure(error).message  # valid Unicode
    return {"error": {"message": message, "type": kind, "param": error.metadata.get("param"), "code": error.reason}}


def headers(error: EnginehouseError) -> dict[str, str]:
    """When to try again, where that may help; how to show a key, where none was shown."""
    found = {}
    if error.retry_after is not None:
        found["retry-after"] = str(max(1, round(error.retry_after)))
        found["retry-after-ms"] = str(max(1, round(error.retry_after * 1000)))
    if "allow" in error.metadata:
        found["allow"] = error.metadata["allow"]
    if status(error) == 401:
        found["www-authenticate"] = "Bearer"
    return found
