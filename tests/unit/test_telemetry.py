"""Metrics by themselves: instruments, how they are served, and the page that lists them."""

import asyncio
import contextlib
import socket
import urllib.request
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from builder_svc.phases import Phases
from builder_svc.telemetry import Telemetry as BuilderTelemetry
from engine.errors import NotFound, Unavailable
from executor_svc.telemetry import Telemetry as ExecutorTelemetry
from gateway.admission import DEFAULT_LIMITS, Admission
from gateway.failover import Failover
from gateway.router import Router
from gateway.telemetry import Telemetry as GatewayTelemetry
from protos import rpc
from protos.access import EVERYBODY
from protos.calls import Calls, status
from protos.histogram import Histogram
from protos.metrics import Metrics
from protos.v1.builder_pb2 import BUILD_STATE_FAILED, BUILD_STATE_QUEUED, BUILD_STATE_SUCCEEDED, Build, GetBuildRequest
from protos.v1.builder_pb2_grpc import BuilderServicer, BuilderStub, add_BuilderServicer_to_server
from tests.metrics_page import documented


def samples(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in metrics.collect():
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_buckets_count_what_is_at_most_their_bound_and_all_below() -> None:
    metrics = Metrics()
    made = metrics.histograms("wait_seconds", "Of waits.", (0.1, 1.0), "engine")
    for value in (0.05, 0.1, 0.100001, 7.0):
        made.of("a").observe(value)
    made.of("a").observe(0.5, 3)
    assert samples(metrics) == {
        "enginehouse_wait_seconds_bucket{engine=a,le=0.1}": 2,
        "enginehouse_wait_seconds_bucket{engine=a,le=1.0}": 6,
        "enginehouse_wait_seconds_bucket{engine=a,le=+Inf}": 7,
        "enginehouse_wait_seconds_count{engine=a}": 7,
        "enginehouse_wait_seconds_sum{engine=a}": pytest.approx(0.05 + 0.1 + 0.100001 + 7 + 1.5),
    }


def test_histograms_add_up() -> None:
    one, other = Histogram((1.0,)), Histogram((1.0,))
    one.observe(0.5)
    other.observe(2.0, 2)
    one.merge(other.counts, other.sum)
    one.merge([], 0.0)  # as it comes over the wire when there is nothing
    assert (one.counts, one.sum) == ([1, 2], 4.5)


def test_they_are_served_until_the_context_ends(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics()
    metrics.counter("things_total", "Of things.").add(by=2)
    with metrics.served("gateway", "127.0.0.1", 0):
        line = capsys.readouterr().out
        url = line.split()[-1]
        assert line == f"enginehouse gateway metrics on {url}\n" and url.endswith("/metrics")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
        assert families["enginehouse_things"].samples[0].value == 2
        assert "process_open_fds" in families
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.split(":")[2].partition("/")[0])))


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(Unavailable, match=f"127.0.0.1:{port} .*--metrics-port"),
            Metrics().served("x", "127.0.0.1", port),
        ):
            pass


# Calls


class Builder(BuilderServicer):
    def __init__(self) -> None:
        self.slow = asyncio.Event()

    async def GetBuild(self, request: GetBuildRequest, _context: Any) -> Build:
        if request.build_id == "slow":
            self.slow.set()
            await asyncio.sleep(60)
        if request.build_id:
            raise NotFound("no such build")
        return Build()


@pytest.fixture
async def calls() -> AsyncIterator[tuple[Metrics, Builder, BuilderStub]]:
    metrics, builder = Metrics(), Builder()
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor(Calls(metrics))])
    add_BuilderServicer_to_server(builder, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield metrics, builder, BuilderStub(channel)
    await server.stop(0)


async def test_calls_are_counted_by_their_status(calls: tuple[Metrics, Builder, BuilderStub]) -> None:
    metrics, builder, stub = calls
    method = "enginehouse.v1.Builder/GetBuild"

    def ends() -> dict[str, float]:
        """Of all calls, by status."""
        found = {name: value for name, value in samples(metrics).items() if "_calls_total" in name}
        return {name.rpartition("=")[2].rstrip("}"): value for name, value in found.items()}

    async def counted(code: str, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while code not in ends():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    await stub.GetBuild(GetBuildRequest())
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetBuild(GetBuildRequest(build_id="gone"))
    leaving = asyncio.ensure_future(stub.GetBuild(GetBuildRequest(build_id="slow")))
    await builder.slow.wait()
    leaving.cancel()
    await counted("CANCELLED", 60)
    assert ends() == {"OK": 1, "NOT_FOUND": 2, "CANCELLED": 1}
    for _ in range(30):  # on a busy machine a call may take longer to arrive than it is late, or not arrive in time
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetBuild(GetBuildRequest(build_id="slow"), timeout=0.2)
        with contextlib.suppress(TimeoutError):
            await counted("DEADLINE_EXCEEDED", 1)
            break
    assert ends()["DEADLINE_EXCEEDED"] >= 1
    found = samples(metrics)
    assert found[f"enginehouse_grpc_call_duration_seconds_count{{method={method}}}"] == sum(ends().values())
    assert 0 < found[f"enginehouse_grpc_call_duration_seconds_sum{{method={method}}}"] < 60


@pytest.mark.parametrize(
    ("seconds", "remaining", "code"),
    [
        (0.2, 0.0, "DEADLINE_EXCEEDED"),
        (0.19, 0.01, "DEADLINE_EXCEEDED"),
        (0.1, 0.1, "CANCELLED"),
        (101.1, 0.89, "DEADLINE_EXCEEDED"),  # of a client that waits 101.1 s, and sends that it waits 102
        (100.0, 2.0, "CANCELLED"),
        (1.0, None, "CANCELLED"),
    ],
)
def test_who_gives_up_at_the_deadline_that_was_sent_has_kept_to_it(
    seconds: float, remaining: float | None, code: str
) -> None:
    context = SimpleNamespace(time_remaining=lambda: remaining)
    assert status(asyncio.CancelledError(), context, seconds) == code


# Builds


def test_a_phase_lasts_until_the_next_one_begins_or_the_build_ends() -> None:
    told: list[tuple[str, float]] = []
    passed: list[tuple[str, int, int, str]] = []
    times = iter((1.0, 4.0, 4.0, 10.0))
    phases = Phases(lambda *step: passed.append(step), lambda *phase: told.append(phase), clock=lambda: next(times))
    for step in (("checkpoint", 0, 1, ""), ("checkpoint", 1, 1, ""), ("weights", 0, 9, "bytes")):
        phases.progress(*step)
    phases.close()
    phases.close()
    assert told == [("checkpoint", 3.0), ("weights", 6.0)] and len(passed) == 3


def test_builds_are_counted_by_how_they_ended_here() -> None:
    metrics = Metrics()
    telemetry = BuilderTelemetry(metrics)
    telemetry.ended(Build(state=BUILD_STATE_SUCCEEDED, reused=True), 3.0)
    telemetry.ended(Build(state=BUILD_STATE_FAILED), 100.0)
    telemetry.ended(Build(state=BUILD_STATE_QUEUED), 1.0)
    found = samples(metrics)
    outcomes = {name: found[f"enginehouse_builder_builds_total{{outcome={name}}}"] for name in
                ("succeeded", "failed", "cancelled", "left")}  # fmt: skip
    assert outcomes == {"succeeded": 1, "failed": 1, "cancelled": 0, "left": 1}
    assert found["enginehouse_builder_builds_found_total{}"] == 1
    assert found["enginehouse_builder_build_duration_seconds_bucket{outcome=failed,le=60.0}"] == 0
    assert found["enginehouse_builder_build_duration_seconds_bucket{outcome=failed,le=120.0}"] == 1


# The page


async def test_the_page_lists_every_metric_of_every_service_as_it_is() -> None:
    metrics = Metrics()
    Calls(metrics)
    EVERYBODY.watch(metrics)
    Admission(DEFAULT_LIMITS, metrics)
    BuilderTelemetry(metrics).watch(SimpleNamespace(num_running=0, num_queued=0))  # type: ignore[arg-type]
    ExecutorTelemetry(metrics, lambda: [])
    router = Router(["127.0.0.1:1"])
    GatewayTelemetry(metrics, router, Failover(router))
    with metrics.served("gateway", "127.0.0.1", 0):  # which adds what tells of the service as such
        pass
    there = {family.name: (family.kind, family.labels) for family in metrics.families}
    page = documented()
    assert {name: (row.kind, row.labels) for name, row in page.items()} == there
    for name, row in page.items():
        assert row.unit and row.meaning, name
        assert (row.kind == "counter") == name.endswith("_total"), name
        for unit in ("seconds", "bytes"):
            assert (row.unit == unit) == (f"_{unit}" in name), name
