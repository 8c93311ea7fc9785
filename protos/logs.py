"""Logs of the services: lines for people or JSON for machines, and the id of the request that a line is about."""

import argparse
import json
import logging
import os
import secrets
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from engine.errors import InvalidArgument

FORMAT_VARIABLE, LEVEL_VARIABLE = "ENGINEHOUSE_LOG_FORMAT", "ENGINEHOUSE_LOG_LEVEL"
FORMATS, LEVELS = ("text", "json"), ("debug", "info", "warning", "error")
REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID = 128

Format = Literal["text", "json"]

_OURS = ("protos", "engine", "builder_svc", "executor_svc", "gateway", "__main__")

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_notes: ContextVar[dict[str, object] | None] = ContextVar("notes", default=None)

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--log-format and --log-level; their defaults are the environment's."""
    for option, variable, choices in (
        ("--log-format", FORMAT_VARIABLE, FORMATS),
        ("--log-level", LEVEL_VARIABLE, LEVELS),
    ):
        default = os.environ.get(variable) or ("text" if choices is FORMATS else "info")
        if default not in choices:
            parser.error(f"{variable} is {default!r}: set it to one of {', '.join(choices)}")
        parser.add_argument(
            option, choices=choices, default=default, help=f"of the log on stderr [{default}; else ${variable}]"
        )


def configure(service: str, options: argparse.Namespace | None = None) -> None:
    """Sends the logs of this process to stderr. What is not ours stays silent below INFO.

    Args:
        service: "builder", "executor" or "gateway".
        options: with log_format and log_level, as `add_options` gives them; None takes them from the environment.
    """
    if options is None:
        parser = argparse.ArgumentParser()
        add_options(parser)
        options = parser.parse_args([])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JsonFormatter if options.log_format == "json" else TextFormatter)(service))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(options.log_level.upper())

    # Errors of servicers are logged by the interceptor; what is left here is a traceback for every client that leaves
    # during a write.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


class TextFormatter(logging.Formatter):
    """`time service LEVEL message key=value ...`, in local time."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s {service} %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        shown = "".join(f" {key}={_shown(value)}" for key, value in _fields(record).items())
        return super().formatMessage(record) + shown


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, service, logger, message, the fields, and a traceback if any."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, object] = {
            "time": time,
            "level": record.levelname,
            "service": self._service,
            "logger": _logger(record),
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in _fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # escapes what is no valid Unicode, such as in a file's name


def fields(**values: object) -> dict[str, Any]:
    """What a line says beside its message: `log.info("...", extra=fields(engine=..., seconds=...))`."""
    return {"fields": values}


def request_id() -> str:
    """The id of the request that this task works for; empty outside of one."""
    return _request_id.get()


def new_request_id() -> str:
    """One that nobody else has."""
    return secrets.token_hex(16)


def check_request_id(text: str) -> str:
    """The id, if it is one. Raises InvalidArgument: it stands in logs and in metadata."""
    if not (0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()):
        raise InvalidArgument(
            f"the request id {text[:40]!r} has {len(text)} characters: give 1 to {MAX_REQUEST_ID} printable ASCII ones, "
            f"or no {REQUEST_ID_KEY} at all",
            reason="REQUEST_ID_INVALID",
        )
    return text


def given_request_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The id that a call brings, unchecked; empty if it brings none."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY:
            return value if isinstance(value, str) else value.decode(errors="replace")
    return ""


def enter(request: str, notes: dict[str, object] | None = None) -> None:
    """Names the request that this task, and what it starts, works for from now on.

    Args:
        notes: where `note` writes.
    """
    _request_id.set(request)
    _notes.set(notes)


def rename(request: str) -> None:
    """The current call is about a request that has an id already."""
    _request_id.set(request)
    note(request_id=request)


def note(**values: object) -> None:
    """Adds fields to the line that is logged when the current call ends; nothing outside of a call."""
    notes = _notes.get()
    if notes is not None:
        notes.update(values)


def milliseconds(seconds: float) -> float:
    """For a log: three decimals."""
    return round(seconds * 1000, 3)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    given: dict[str, object] = getattr(record, "fields", {})
    about = str(given.get("request_id") or request_id())[:MAX_REQUEST_ID]  # a refused one may be of any length
    rest = {key: value for key, value in given.items() if key != "request_id" and value is not None}
    return {"request_id": about, **rest} if about else rest


def _logger(record: logging.LogRecord) -> str:
    if record.name != "__main__":
        return record.name
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else record.name


def _shown(value: object) -> str:
    """As it is if it is one word; else quoted, on one line."""
    text = str(value)
    return text if text.isprintable() and text and not set(' "=') & set(text) else json.dumps(text)
