"""Errors that a person can act on, each with the gRPC status that it becomes on the wire.

Numbers and names are google.rpc.Code's; this package does not import grpc.
"""

from collections.abc import Mapping


class EnginehouseError(Exception):
    """A failure with a gRPC status.

    Attributes:
        code: google.rpc.Code as a number.
        reason: what went wrong in UPPER_SNAKE_CASE, stable for programs (google.rpc.ErrorInfo.reason).
        message: names the value and the fix, for a person.
        metadata: further facts for programs (google.rpc.ErrorInfo.metadata).
        retry_after: seconds after which the same call may succeed (google.rpc.RetryInfo); None where nobody can say.

    Example:
        >>> from enginehouse import LLM, EnginehouseError
        >>> try:
        ...     LLM("no-such-directory/")
        ... except EnginehouseError as error:
        ...     print(error.reason)
        CHECKPOINT_NOT_FOUND
    """

    code = 2  # UNKNOWN
    default_reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        code: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class InvalidArgument(EnginehouseError, ValueError):
    """The caller's input cannot be right, whatever the state of the system."""

    code = 3
    default_reason = "INVALID_ARGUMENT"


class DeadlineExceeded(EnginehouseError):
    """The request's own time is over."""

    code = 4
    default_reason = "DEADLINE_EXCEEDED"


class NotFound(EnginehouseError):
    """A thing that was asked for by name or key is not there."""

    code = 5
    default_reason = "NOT_FOUND"


class PermissionDenied(EnginehouseError):
    """The caller may not do this."""

    code = 7
    default_reason = "PERMISSION_DENIED"


class ResourceExhausted(EnginehouseError):
    """Memory, disk, a queue or a quota is full."""

    code = 8
    default_reason = "RESOURCE_EXHAUSTED"


class FailedPrecondition(EnginehouseError):
    """The system is not in the state that the call needs; a retry alone does not help."""

    code = 9
    default_reason = "FAILED_PRECONDITION"


class Unimplemented(EnginehouseError, NotImplementedError):
    """A kind of input that is known and not supported."""

    code = 12
    default_reason = "UNIMPLEMENTED"


class Internal(EnginehouseError):
    """Our own fault."""

    code = 13
    default_reason = "INTERNAL"


class Unavailable(EnginehouseError):
    """Gone or not there yet; a retry may help."""

    code = 14
    default_reason = "UNAVAILABLE"


class DataLoss(EnginehouseError):
    """Stored bytes are not what their digest says."""

    code = 15
    default_reason = "DATA_LOSS"


class Unauthenticated(EnginehouseError):
    """Nobody knows who the caller is."""

    code = 16
    default_reason = "UNAUTHENTICATED"
