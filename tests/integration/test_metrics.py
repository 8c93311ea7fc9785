"""What Prometheus and whoever reads the logs get from the real services."""

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.rpc import from_rpc_error
from protos.v1 import builder_pb2, executor_pb2
from protos.v1.builder_pb2_grpc import BuilderStub
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, SamplingParams, StoppingCriteria
from protos.v1.executor_pb2_grpc import ExecutorStub
from protos.v1.gateway_pb2 import GenerateRequest, GenerateResponse
from protos.v1.gateway_pb2_grpc import GatewayStub
from tests import promql
from tests.integration.services import Service, service
from tests.metrics_page import PAGE, documented

CERTIFICATE = "enginehouse_tls_certificate_expires_timestamp_seconds"  # no TLS here: test_security.py has seen it

PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form."
SECRET = "sesame-open-1234"
OPTIONS = ("--metrics-port", "0", "--log-format", "json")

Samples = dict[str, float]


@dataclass
class Cluster:
    builder: Service
    executor: Service
    gateway: Service
    engine_id: str

    @property
    def engine(self) -> str:
        return self.engine_id[:12]


def scrape(of: Service) -> Samples:
    """name{label=value,...}, labels sorted -> value."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(of.metrics, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def changed(of: Service, name: str, value: float) -> Samples:
    """A scrape in which a sample has come to a value; what is counted at a call's end may come just after it."""
    async with asyncio.timeout(60):
        while (found := await asyncio.to_thread(scrape, of)).get(name) != value:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


def lines(of: Service) -> list[dict[str, object]]:
    return [json.loads(line) for line in of.log.read_text().splitlines()]


async def told(of: Service, request_id: object) -> None:
    """Waits until the log has a line about a request, and so of all that ended before."""
    async with asyncio.timeout(60):
        while not [line for line in lines(of) if line.get("request_id") == request_id]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def worker(executor: Service) -> int:
    pid = executor.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("metrics")
    store = str(directory / "store")
    with ExitStack() as stack:

        def start(package: str, *arguments: str) -> Service:
            log = directory / f"{package}.log"
            return stack.enter_context(service(package, log, "--store", store, *OPTIONS, *arguments))

        builder = start("builder_svc", "--checkpoint-root", str(checkpoint.parent))
        engine_id = build(builder, checkpoint)
        assert build(builder, checkpoint) == engine_id  # found
        executor = start("executor_svc", "--engine", "tiny")
        gateway = start("gateway", "--executor", executor.address, "--failover-patience", "0")
        yield Cluster(builder, executor, gateway, engine_id)


def build(builder: Service, checkpoint: Path) -> str:
    with grpc.insecure_channel(builder.address) as channel:
        stub = BuilderStub(channel)
        spec = builder_pb2.BuildSpec(checkpoint=str(checkpoint))
        made = stub.SubmitBuild(builder_pb2.SubmitBuildRequest(spec=spec, model="tiny"))
        *_, last = stub.WatchBuild(builder_pb2.WatchBuildRequest(build_id=made.build_id))
        assert last.state.state == builder_pb2.BUILD_STATE_SUCCEEDED
        return last.state.engine_id


@pytest.fixture
async def stub(cluster: Cluster) -> AsyncIterator[GatewayStub]:
    async with grpc.aio.insecure_channel(cluster.gateway.address) as channel:
        await changed(
            cluster.gateway, f"enginehouse_gateway_executor_connected{{executor={cluster.executor.address}}}", 1
        )
        yield GatewayStub(channel)


def request(max_tokens: int = 8, text: str = PROMPT, model: str = "tiny") -> GenerateRequest:
    stopping = StoppingCriteria(max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest(model=model, text=text, stopping=stopping, sampling=SamplingParams(seed=3))


async def generate(stub: GatewayStub, **given: object) -> list[GenerateResponse]:
    return [response async for response in stub.Generate(request(**given))]  # type: ignore[arg-type]


async def busy(stub: GatewayStub) -> list["grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse]"]:
    """Calls that take a while together, when the first of them has begun."""
    calls = [stub.Generate(request(max_tokens=220, text=f"{number}")) for number in range(60)]
    await calls[0].read()
    return calls


async def outcome(call: "grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse]") -> str:
    """The reason that a call has failed for; empty if it has not."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return ""


async def test_builds_are_counted_and_timed(cluster: Cluster) -> None:
    found = scrape(cluster.builder)
    assert found["enginehouse_builder_builds_total{outcome=succeeded}"] == 2
    assert found["enginehouse_builder_builds_total{outcome=failed}"] == 0
    assert found["enginehouse_builder_builds_found_total{}"] == 1
    assert found["enginehouse_builder_build_duration_seconds_count{outcome=succeeded}"] == 2
    whole = found["enginehouse_builder_build_duration_seconds_sum{outcome=succeeded}"]
    phases = {phase: found[f"enginehouse_builder_phase_duration_seconds_sum{{phase={phase}}}"] for phase in
              ("checkpoint", "program", "weights", "upload", "publish")}  # fmt: skip
    assert 0 < sum(phases.values()) < whole and min(phases.values()) > 0
    assert found["enginehouse_builder_phase_duration_seconds_count{phase=weights}"] == 1
    assert found["enginehouse_builder_queue_length{}"] == found["enginehouse_builder_builds_running{}"] == 0
    assert found["enginehouse_grpc_calls_total{code=OK,method=enginehouse.v1.Builder/SubmitBuild}"] == 2
    assert found["enginehouse_grpc_call_duration_seconds_count{method=enginehouse.v1.Builder/WatchBuild}"] == 2
    assert found["process_resident_memory_bytes{}"] > 1e7


async def test_requests_are_counted_at_gateway_and_executor(cluster: Cluster, stub: GatewayStub) -> None:
    requests, before = "enginehouse_gateway_requests_total{code=OK,model=tiny}", scrape(cluster.executor)
    outputs = await generate(stub)
    prompt = outputs[-1].usage.prompt_tokens
    first = await changed(cluster.gateway, requests, 1)
    for _ in range(2):
        outputs = await generate(stub, max_tokens=20)
    assert outputs[-1].finish.reason == FINISH_REASON_LENGTH
    cached = outputs[-1].usage.cached_tokens
    assert cached >= 16

    second = await changed(cluster.gateway, requests, 3)
    assert first["enginehouse_gateway_cached_prompt_tokens_total{model=tiny}"] == 0
    assert second["enginehouse_gateway_cached_prompt_tokens_total{model=tiny}"] == 2 * cached
    assert second["enginehouse_gateway_prompt_tokens_total{model=tiny}"] == 3 * prompt
    assert second["enginehouse_gateway_completion_tokens_total{model=tiny}"] == 48
    assert second["enginehouse_gateway_time_to_first_token_seconds_count{model=tiny}"] == 3
    between = second["enginehouse_gateway_inter_token_latency_seconds_count{model=tiny}"]
    assert 0 < between <= 45
    total = second["enginehouse_gateway_request_duration_seconds_sum{model=tiny}"]
    parts = [second[f"enginehouse_gateway_{part}_seconds_sum{{model=tiny}}"] for part in
             ("time_to_first_token", "inter_token_latency")]  # fmt: skip
    assert all(parts) and math.fsum(parts) <= total < 60
    assert second["enginehouse_gateway_tokenize_seconds_count{}"] == 3
    assert second["enginehouse_gateway_streams_open{}"] == 0

    label = f"{{engine={cluster.engine}}}"
    after = await changed(cluster.executor, f"enginehouse_executor_request_duration_seconds_count{label}", 3)
    assert before[f"enginehouse_executor_completion_tokens_total{label}"] == 0  # there from the beginning
    assert after[f"enginehouse_executor_completion_tokens_total{label}"] == 48
    assert after[f"enginehouse_executor_time_to_first_token_seconds_count{label}"] == 3
    assert after[f"enginehouse_executor_inter_token_latency_seconds_count{label}"] == 45
    assert after[f"enginehouse_executor_queue_time_seconds_count{label}"] == 3
    assert after[f"enginehouse_executor_prompt_tokens_total{label}"] == 3 * prompt
    assert after[f"enginehouse_executor_prefix_cache_queried_tokens_total{label}"] == 3 * prompt
    assert after[f"enginehouse_executor_prefix_cache_hit_tokens_total{label}"] == 2 * cached
    assert after[f"enginehouse_executor_requests_finished_total{{engine={cluster.engine},reason=length}}"] == 3
    assert after[f"enginehouse_executor_engine_load_seconds_count{label}"] == 1
    assert after[f"enginehouse_executor_engine_state{{engine={cluster.engine},state=ready}}"] == 1
    assert after[f"enginehouse_executor_worker_resident_memory_bytes{label}"] > 5e7  # it has imported torch
    waits = [after[f"enginehouse_executor_{part}_seconds_sum{label}"] for part in
             ("queue_time", "time_to_first_token", "request_duration")]  # fmt: skip
    assert 0 < waits[0] < waits[1] < waits[2]


async def test_what_runs_shows_while_it_runs(cluster: Cluster, stub: GatewayStub) -> None:
    label, codes = f"{{engine={cluster.engine}}}", "enginehouse_gateway_requests_total{code=CANCELLED,model=tiny}"
    calls = await busy(stub)
    open_before = scrape(cluster.gateway)["enginehouse_gateway_streams_open{}"]
    async with asyncio.timeout(60):  # the worker tells its load ten times a second
        while not (running := scrape(cluster.executor))[f"enginehouse_executor_requests_running{label}"]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    for call in calls:
        call.cancel()
    assert open_before > 0
    used = running[f"enginehouse_executor_kv_blocks_used{label}"]
    assert used > 0
    ratio = used / running[f"enginehouse_executor_kv_blocks{label}"]
    assert running[f"enginehouse_executor_kv_usage_ratio{label}"] == pytest.approx(
        ratio, abs=0.05
    )  # they are read in turn
    after = await changed(cluster.gateway, "enginehouse_gateway_streams_open{}", 0)
    assert after[codes] > 0
    idle = await changed(cluster.executor, f"enginehouse_executor_kv_blocks_used{label}", 0)
    cancelled = f"enginehouse_executor_requests_finished_total{{engine={cluster.engine},reason=cancelled}}"
    assert 0 < idle[cancelled] <= len(calls)


async def test_a_name_that_no_model_has_becomes_no_label(cluster: Cluster, stub: GatewayStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(stub, model="whatever-somebody-sends")
    found = await changed(cluster.gateway, "enginehouse_gateway_requests_total{code=NOT_FOUND,model=unknown}", 1)
    assert not [name for name in found if "whatever" in name]


async def test_one_id_leads_through_gateway_and_executor(cluster: Cluster, stub: GatewayStub) -> None:
    call = stub.Generate(request(text=f"{SECRET} {PROMPT}"), metadata=(("x-request-id", "case 17/a"),))
    assert dict(await call.initial_metadata())["x-request-id"] == "case 17/a"
    outputs = [output async for output in call]
    drawn = stub.Generate(request())
    other = dict(await drawn.initial_metadata())["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", str(other)) and [output async for output in drawn]

    await told(cluster.executor, other)
    (access,) = [line for line in lines(cluster.gateway) if line.get("request_id") == "case 17/a"]
    assert (access["message"], access["level"], access["service"]) == ("Gateway/Generate OK", "INFO", "gateway")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(access["time"]))
    assert (access["model"], access["engine"], access["code"]) == ("tiny", cluster.engine, "OK")
    assert (access["prompt_tokens"], access["completion_tokens"]) == (outputs[-1].usage.prompt_tokens, 8)
    assert access["finish"] == "length"
    assert 0 < access["first_token_ms"] <= access["total_ms"]  # type: ignore[operator]

    (ended,) = [line for line in lines(cluster.executor) if line.get("request_id") == "case 17/a"]
    assert (ended["message"], ended["service"], ended["logger"]) == ("request length", "executor", "executor_svc.tally")
    assert (ended["engine"], ended["completion_tokens"]) == (cluster.engine, 8)
    assert 0 < ended["queue_ms"] < ended["first_token_ms"] < ended["total_ms"]  # type: ignore[operator]
    assert all(line.keys() >= {"time", "level", "service", "logger", "message"} for line in lines(cluster.builder))
    for of in (cluster.builder, cluster.executor, cluster.gateway):
        assert SECRET not in of.log.read_text()


async def test_an_error_names_its_request(cluster: Cluster, stub: GatewayStub) -> None:
    call = stub.Generate(request(max_tokens=100_000, text=SECRET), metadata=(("x-request-id", "too-long"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    error = from_rpc_error(caught.value)
    assert (error.reason, error.metadata["request_id"]) == ("CONTEXT_TOO_LONG", "too-long")
    call = stub.Generate(request(), metadata=(("x-request-id", "x" * 129),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value).reason == "REQUEST_ID_INVALID"
    await changed(
        cluster.gateway, "enginehouse_grpc_calls_total{code=INVALID_ARGUMENT,method=enginehouse.v1.Gateway/Generate}", 2
    )
    (line,) = [line for line in lines(cluster.gateway) if line.get("request_id") == "too-long"]
    assert (line["code"], line["reason"]) == ("INVALID_ARGUMENT", "CONTEXT_TOO_LONG")
    assert SECRET not in cluster.gateway.log.read_text() and "x" * 129 not in cluster.gateway.log.read_text()


async def test_an_executor_by_itself_names_requests_too(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.executor.address) as channel:
        stub = ExecutorStub(channel)
        submit = executor_pb2.Submit(engine_id=cluster.engine_id, token_ids=[5], request_id="bad\nid")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(submit).read()
        assert from_rpc_error(caught.value).reason == "REQUEST_ID_INVALID"
        commands = [executor_pb2.Command(submit=submit), executor_pb2.Command(submit=submit)]
        commands[1].submit.handle, commands[1].submit.request_id, commands[1].submit.token_ids[0] = (
            2,
            "unknown token",
            9999,
        )
        reasons = [failed.failure.reason async for output in stub.Run(iter(commands)) for failed in output.failed]
        assert reasons == ["REQUEST_ID_INVALID", "TOKEN_ID_INVALID"]
        submit.request_id, submit.stopping.max_tokens = "by hand", 4
        assert [output async for output in stub.Generate(submit)]
    failed = f"enginehouse_executor_requests_failed_total{{engine={cluster.engine},reason=TOKEN_ID_INVALID}}"
    await changed(cluster.executor, failed, 1)
    (refused,) = [line for line in lines(cluster.executor) if line.get("request_id") == "unknown token"]
    assert (refused["message"], refused["reason"]) == ("request refused", "TOKEN_ID_INVALID")
    messages = [line["message"] for line in lines(cluster.executor) if line.get("request_id") == "by hand"]
    assert (
        sorted(map(str, messages))[0] == "Executor/Generate OK" and len(messages) == 2
    )  # the front's line and the worker's


async def test_counters_do_not_go_back_when_a_worker_dies(cluster: Cluster, stub: GatewayStub) -> None:
    """The last test but one: what it does to the counters the others do not expect."""
    label = f"{{engine={cluster.engine}}}"
    tokens = f"enginehouse_executor_completion_tokens_total{label}"
    await generate(stub)
    await asyncio.sleep(0.2)
    before = scrape(cluster.executor)
    calls = await busy(stub)
    assert scrape(cluster.executor)[f"enginehouse_executor_requests_running{label}"] > 0  # the front knows of them
    os.kill(worker(cluster.executor), signal.SIGKILL)
    reasons = await asyncio.gather(*(outcome(call) for call in calls))
    lost = reasons.count("ENGINE_LOST")
    assert lost > 0
    after = await changed(cluster.executor, f"enginehouse_executor_worker_deaths_total{label}", 1)
    failed = f"enginehouse_executor_requests_failed_total{{engine={cluster.engine},reason=ENGINE_LOST}}"
    assert 0 < after[failed] <= lost
    await changed(cluster.executor, f"enginehouse_executor_engine_load_seconds_count{label}", 2)
    deadline = time.monotonic() + 60  # until the gateway has noticed
    while True:
        try:
            await generate(stub, max_tokens=6)
            break
        except grpc.aio.AioRpcError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
    async with asyncio.timeout(60):  # the worker tells what it has counted a moment later
        while (after := scrape(cluster.executor))[tokens] < before[tokens] + 6:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    for name, value in before.items():
        if name.startswith("enginehouse_executor_") and "_total{" in name or "_bucket{" in name:
            assert after[name] >= value, name
    assert scrape(cluster.gateway)["enginehouse_gateway_requests_lost_total{model=tiny}"] == lost


FETCH = """
import json, os, pathlib, urllib.request
state = json.loads((pathlib.Path(os.environ["ENGINEHOUSE_HOME"]) / "cluster.json").read_text())
fetch = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
print(json.dumps({name: fetch(url, timeout=10).read().decode() for name, url in state["metrics"].items()}))
"""


def test_up_says_where_its_services_have_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "enginehouse", "up", "--port", "0", "--metrics", "--", sys.executable, "-c", FETCH]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENGINEHOUSE_")}
    environment = kept | {"ENGINEHOUSE_HOME": str(tmp_path), "ENGINEHOUSE_LOG_FORMAT": "json"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    assert texts.keys() == {"builder", "executor-1", "gateway"}
    assert "enginehouse_builder_queue_length 0.0" in texts["builder"]
    assert 'enginehouse_gateway_executor_losses_total{executor="127.0.0.1:' in texts["gateway"]
    said = (tmp_path / "logs" / "gateway.log").read_text().splitlines()
    assert any(line.startswith("{") for line in said)


def test_dashboard_and_alerts_ask_for_what_there_is(cluster: Cluster) -> None:
    """By now there is traffic of all kinds."""
    # metric -> label -> values; up is Prometheus' own
    labels: dict[str, dict[str, set[str]]] = {"up": {}, CERTIFICATE: {}}
    for of in (cluster.builder, cluster.executor, cluster.gateway):
        for sample in scrape(of):
            name, pairs = sample.rstrip("}").split("{")
            known = labels.setdefault(name, {})
            for pair in filter(None, pairs.split(",")):
                key, _, value = pair.partition("=")
                known.setdefault(key, set()).add(value)
    page = PAGE.read_text()
    asked = [selector for query in promql.queries() for selector in promql.selectors(query)] + promql.variables()
    for selector in asked:
        assert selector.metric in labels, selector
        known = labels[selector.metric]
        assert selector.labels <= known.keys() | promql.SCRAPED, selector
        for key, value in selector.equal.items():
            assert value in known[key] or f"`{value}`" in page, selector
    assert len({selector.metric for selector in asked}) > 40


def test_the_page_knows_every_label(cluster: Cluster) -> None:
    """The last test: by now there is traffic of all kinds."""
    pages = documented()
    seen: set[str] = set()
    for of in (cluster.builder, cluster.executor, cluster.gateway):
        for sample in scrape(of):
            name, labels = sample.rstrip("}").split("{")
            if not name.startswith("enginehouse_"):
                continue
            family = name if name in pages else re.sub("_(bucket|count|sum)$", "", name)
            keys = {pair.partition("=")[0] for pair in labels.split(",") if pair}
            assert keys - {"le"} == set(pages[family].labels), name
            seen.add(family)
    assert pages.keys() - seen == {CERTIFICATE}
