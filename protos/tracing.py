"""Spans of a request by OpenTelemetry, from the client's call to the engine's steps.

A span's children are made when the request has ended, of times that were taken anyway: while it runs it has its trace's identity
and nothing more. OpenTelemetry is imported only where it is asked for: by `--traces`, by its own environment variables, or by the
program that calls a client.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from engine.errors import FailedPrecondition

KEYS = ("traceparent", "tracestate")  # of W3C trace context
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_tracer: Any = None

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of services that have spans."""
    parser.add_argument(
        "--traces",
        action="store_true",
        help="send traces by OTLP over gRPC, also without $OTEL_EXPORTER_OTLP_ENDPOINT, which says where [localhost:4317]",
    )


def configure(service: str, wanted: bool) -> None:
    """Makes spans from now on, if `wanted` or if the environment names an endpoint; $OTEL_* say all else.

    Raises:
        FailedPrecondition: they are wanted, and OpenTelemetry is not installed. Where only the environment asks, that is logged.
    """
    global _tracer
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if off or not (wanted or any(os.environ.get(name) for name in _ENDPOINTS)):
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        fix = f"traces need OpenTelemetry ({error}): pip install 'enginehouse[tracing]'"
        if wanted:
            raise FailedPrecondition(fix, reason="TRACING_MISSING") from None
        log.warning("%s", fix)
        return
    name = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or f"enginehouse-{service}"}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))  # sends the last ones when the process ends
    _tracer = provider.get_tracer("enginehouse")


class Span:
    """One that has begun. Times are of time.monotonic()."""

    def __init__(self, span: Any, offset: int = 0) -> None:
        """`offset`: nanoseconds between 1970 and the beginning of time.monotonic()."""
        self._span, self._offset = span, offset

    def inject(self, carrier: MutableMapping[str, str]) -> None:
        """Writes its trace context, of which what is called makes its own spans' parent."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The same as a call's metadata."""
        carrier: dict[str, str] = {}
        self.inject(carrier)
        return tuple(carrier.items())

    def child(self, name: str, began: float, ended: float, **attributes: object) -> None:
        """A part of it that has ended; none if it has not begun (0) or nobody wants the trace."""
        if _tracer is None or not began or not self._span.is_recording():
            return
        from opentelemetry.trace import set_span_in_context

        part = _tracer.start_span(name, set_span_in_context(self._span), start_time=self._since_1970(began))
        part.set_attributes(_known(attributes))
        part.end(self._since_1970(ended))

    def event(self, name: str, at: float) -> None:
        """Something that happened; nothing if it has not (0)."""
        if at:
            self._span.add_event(name, timestamp=self._since_1970(at))

    def end(self, reason: str = "", **attributes: object) -> None:
        """It ends now, with an error if there is a reason."""
        self._span.set_attributes(_known({**attributes, "error.type": reason or None}))
        if reason:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, reason))
        self._span.end()

    def _since_1970(self, at: float) -> int:
        return self._offset + int(at * 1e9)


def begin(name: str, carrier: Mapping[str, str], began: float = 0.0) -> Span | None:
    """A service's span; None where it makes none.

    Args:
        carrier: what the caller has sent of W3C trace context; without it the trace begins here.
        began: now by default.
    """
    if _tracer is None:
        return None
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(carrier)
    offset = (
        time.time_ns() - time.monotonic_ns()
    )  # of this trace: its times must fit each other, and the clock may be set
    start = offset + int((began or time.monotonic()) * 1e9)
    return Span(_tracer.start_span(name, parent, kind=SpanKind.SERVER, start_time=start), offset)


def call(name: str) -> Span | None:
    """A client's span, a child of its program's current one; None in a program that does not use OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    span = trace.get_tracer("enginehouse").start_span(name, kind=trace.SpanKind.CLIENT)
    return Span(span) if span.get_span_context().is_valid else None


def given(metadata: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """The trace context in a call's metadata."""
    return {
        key: value if isinstance(value, str) else value.decode(errors="replace")
        for key, value in metadata
        if key in KEYS
    }


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in attributes.items() if value is not None}
