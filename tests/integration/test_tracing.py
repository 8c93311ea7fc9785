"""One request's trace, from a client's span to the engine's steps, as a collector of OTLP receives it from real processes."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from engine.errors import EnginehouseError, FailedPrecondition
from enginehouse import GatewayClient
from protos import tracing
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.gateway_pb2 import GenerateRequest
from protos.v1.gateway_pb2_grpc import GatewayStub
from tests.integration.services import Service, service

TOKENS = 12


class Got(NamedTuple):
    service: str
    span: Any

    @property
    def attributes(self) -> dict[str, Any]:
        return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in self.span.attributes}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives and keeps."""

    def __init__(self) -> None:
        self.spans: list[Got] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [Got(named["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    async def of(self, trace_id: bytes, count: int) -> dict[str, Got]:
        """A trace's spans by name, when there are so many."""
        deadline = time.monotonic() + 60
        while len(found := [got for got in self.spans if got.span.trace_id == trace_id]) < count:
            assert time.monotonic() < deadline, [(got.service, got.span.name) for got in found]
            await asyncio.sleep(0.05)
        assert len(found) == count
        return {got.span.name: got for got in found}


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    made, server = Collector(), grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def gateway(
    checkpoint: Path, collector: tuple[Collector, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("tracing")
    store = open_store(str(directory / "store"))
    registry.set_name(store, "tiny", build(checkpoint, store=store).manifest.engine_id)
    options: Any = {
        "environment": {"OTEL_EXPORTER_OTLP_ENDPOINT": collector[1], "OTEL_BSP_SCHEDULE_DELAY": "100"},
        "extras": ("tracing",),
    }
    with ExitStack() as stack:

        def start(package: str, *arguments: str) -> Service:
            log = directory / f"{package}.log"
            return stack.enter_context(service(package, log, "--store", store.url, *arguments, **options))

        executor = start("executor_svc", "--engine", "tiny")
        yield start("gateway", "--executor", executor.address)


@pytest.fixture(scope="module")
def exported() -> InMemorySpanExporter:
    """What this program, which uses OpenTelemetry, has of spans itself."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


async def ready(client: GatewayClient) -> None:
    async with asyncio.timeout(60):
        while not (await client.models())[0].ready_executors:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_request_is_one_trace(
    gateway: Service, collector: tuple[Collector, str], exported: InMemorySpanExporter
) -> None:
    async with GatewayClient(gateway.address) as client:
        await ready(client)
        stopping = StoppingCriteria(max_tokens=TOKENS, ignore_eos=True)
        with trace.get_tracer("test").start_as_current_span("program"):
            parts = [part async for part in client.generate("tiny", "In the beginning", stopping=stopping)]
    program, call = sorted(exported.get_finished_spans(), key=lambda span: span.name != "program")
    assert call.parent is not None and call.parent.span_id == program.context.span_id
    found = await collector[0].of(program.context.trace_id.to_bytes(16), 9)

    def parents(name: str) -> list[str]:
        names = {got.span.span_id: got.span.name for got in found.values()}
        names[call.context.span_id.to_bytes(8)] = "client"
        chain = []
        while name != "client":
            name = names[found[name].span.parent_span_id]
            chain.append(name)
        return chain

    top = "enginehouse.v1.Gateway/Generate"
    assert parents(top) == ["client"]
    for name in ("tokenize", "first token", "stream", "submit"):
        assert parents(name) == [top, "client"]
    for name in ("queue", "prefill", "decode"):
        assert parents(name) == ["request", "submit", top, "client"]
    services = {name: got.service for name, got in found.items()}
    assert services[top] == services["tokenize"] == "enginehouse-gateway"
    assert services["submit"] == services["request"] == services["decode"] == "enginehouse-executor"

    usage = parts[-1].usage
    for name in (top, "request"):
        told = found[name].attributes
        assert told["gen_ai.usage.input_tokens"] == usage.prompt_tokens
        assert told["gen_ai.usage.output_tokens"] == usage.completion_tokens == TOKENS
    assert found["request"].attributes["enginehouse.request_id"] == found[top].attributes["enginehouse.request_id"]
    assert [event.name for event in found["request"].span.events] == ["first token", "last token"]
    begins = [found[name].span.start_time_unix_nano for name in ("request", "queue", "prefill", "decode")]
    assert begins == sorted(begins) and begins[0] == begins[1]
    assert found["queue"].span.end_time_unix_nano == begins[2]
    assert found["prefill"].span.end_time_unix_nano == begins[3]
    assert abs(time.time_ns() - begins[0]) < 120e9


async def test_a_request_that_fails_says_why_and_one_that_nobody_samples_leaves_nothing(
    gateway: Service, collector: tuple[Collector, str], exported: InMemorySpanExporter
) -> None:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub, stopping = GatewayStub(channel), StoppingCriteria(max_tokens=2)
        quiet = GenerateRequest(model="tiny", text="x", stopping=stopping)
        assert [
            part async for part in stub.Generate(quiet, metadata=(("traceparent", f"00-{'a' * 32}-{'b' * 16}-00"),))
        ]
    exported.clear()
    async with GatewayClient(gateway.address) as client:
        with pytest.raises(EnginehouseError):
            async for _ in client.generate("tiny", "x", sampling=SamplingParams(temperature=-1)):
                pass
    (call,) = exported.get_finished_spans()
    assert call.attributes and call.attributes["error.type"]
    (got,) = (await collector[0].of(call.context.trace_id.to_bytes(16), 1)).values()
    assert got.span.status.code == 2 and got.attributes["error.type"] == call.attributes["error.type"]
    assert not [got for got in collector[0].spans if got.span.trace_id == b"\xaa" * 16]


def test_nothing_is_imported_where_nobody_asks() -> None:
    program = (
        "import sys; import gateway.server, executor_svc.server, enginehouse.client; from protos import tracing\n"
        "tracing.configure('gateway', False); assert tracing.begin('x', {}) is None and tracing.call('x') is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", program], env=without, check=True, timeout=60)


def test_without_the_packages_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'enginehouse\[tracing\]'"):
        tracing.configure("gateway", True)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    tracing.configure("gateway", False)  # a whole cluster may have the variable
    assert "pip install 'enginehouse[tracing]'" in caplog.text
    assert tracing.begin("x", {}) is None
