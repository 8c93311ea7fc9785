"""Real processes that die under load, a disk that is full, damage in the bucket, builders that race: one clear status each."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from builder_svc.pipeline import build
from engine import blobs, names, registry
from engine.backends import open_store
from engine.blobs import blob_key
from engine.errors import DataLoss, EnginehouseError
from engine.store import Store
from enginehouse.cluster import hold_ports
from protos.rpc import from_rpc_error
from protos.v1 import builder_pb2, builder_pb2_grpc, executor_pb2, executor_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria, TokenIds
from tests.conftest import small_file_system
from tests.integration.services import service
from tests.seaweed import SeaweedFS

STREAMS = 24


async def ready(gateway: gateway_pb2_grpc.GatewayStub, executors: int = 1) -> None:
    """Returns when the gateway sees so many executors with the model."""
    async with asyncio.timeout(60):
        while True:
            try:
                models = (await gateway.ListModels(gateway_pb2.ListModelsRequest())).models
            except grpc.aio.AioRpcError:
                models = []
            if models and models[0].ready_executors == executors:
                return
            await asyncio.sleep(0.05)


def request(number: int, max_tokens: int = 220) -> gateway_pb2.GenerateRequest:
    numbers = random.Random(number)
    return gateway_pb2.GenerateRequest(
        model="tiny",
        token_ids=TokenIds(ids=[numbers.randrange(2, 300) for _ in range(20)]),
        sampling=SamplingParams(temperature=1.0, seed=number),
        stopping=StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
    )


async def end_of(
    stream: AsyncIterator[gateway_pb2.GenerateResponse], started: list[int]
) -> tuple[float, EnginehouseError]:
    """When and with what a stream ended."""
    try:
        async for _ in stream:
            started.append(1)  # noqa: PERF401  (its length is looked at meanwhile)
    except grpc.aio.AioRpcError as error:
        return time.monotonic(), from_rpc_error(error)
    raise AssertionError("it ended well")


async def under_load(
    gateway: gateway_pb2_grpc.GatewayStub, kill: "list[int]", grace: float
) -> list[tuple[float, EnginehouseError]]:
    """How many streams end when these processes are killed while tokens flow; seconds after the kill, and the status."""
    started: list[int] = []
    ends = [asyncio.create_task(end_of(gateway.Generate(request(number)), started)) for number in range(STREAMS)]
    async with asyncio.timeout(60):
        while len(started) < 2 * STREAMS:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    killed = time.monotonic()
    for pid in kill:
        os.kill(pid, signal.SIGKILL)
    found = await asyncio.wait_for(asyncio.gather(*ends), grace)
    return [(at - killed, error) for at, error in found]


@pytest.fixture(scope="module")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A directory store with a model."""
    store = open_store(str(tmp_path_factory.mktemp("faults") / "store"))
    registry.set_name(store, "tiny", build(checkpoint, store=store).manifest.engine_id)
    yield store


async def test_a_killed_gateway_loses_its_streams_alone(tiny: Store, tmp_path: Path) -> None:
    (held,) = hold_ports(1)
    port = str(held.getsockname()[1])
    with held, service("executor_svc", tmp_path / "executor.log", "--store", tiny.url, "--engine", "tiny") as executor:
        arguments = ("--store", tiny.url, "--executor", executor.address)
        with (
            service("gateway", tmp_path / "gateway.log", *arguments, port=port) as victim,
            service("gateway", tmp_path / "other.log", *arguments) as survivor,
        ):
            async with (
                grpc.aio.insecure_channel(victim.address) as channel,
                grpc.aio.insecure_channel(survivor.address) as other_channel,
                grpc.aio.insecure_channel(executor.address) as direct,
            ):
                gateway, other = gateway_pb2_grpc.GatewayStub(channel), gateway_pb2_grpc.GatewayStub(other_channel)
                await asyncio.gather(ready(gateway), ready(other))
                alone = [part async for part in other.Generate(request(99, 100))]

                async def undisturbed() -> list[int]:
                    return [token async for part in other.Generate(request(99, 100)) for token in part.token_ids]

                through = asyncio.create_task(undisturbed())
                for seconds, error in await under_load(gateway, [victim.process.pid], grace=60):
                    assert (error.code, seconds < 30) == (14, True), (seconds, error.message)
                assert await through == [token for part in alone for token in part.token_ids]
                calls = executor_pb2_grpc.ExecutorStub(direct)
                async with asyncio.timeout(60):
                    while True:
                        load = (await calls.GetStatus(executor_pb2.GetStatusRequest())).engines[0].load
                        if not load.running and not load.waiting and load.free_kv_blocks == load.total_kv_blocks:
                            break
                        await asyncio.sleep(0.05)
                victim.process.wait()
                with service("gateway", tmp_path / "again.log", *arguments, port=port):
                    await ready(gateway)
                    assert [part async for part in gateway.Generate(request(1, 5))][-1].HasField("finish")


# The store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB, which the store's engine does not fit into."""
    with small_file_system(tmp_path / "small", "200k") as mount:
        yield mount


def run_build(stub: builder_pb2_grpc.BuilderStub, checkpoint: Path, model: str = "tiny") -> builder_pb2.Build:
    """The build as it ends."""
    spec = builder_pb2.BuildSpec(checkpoint=checkpoint.name)
    submitted = stub.SubmitBuild(builder_pb2.SubmitBuildRequest(spec=spec, model=model), timeout=60)
    *_, last = stub.WatchBuild(builder_pb2.WatchBuildRequest(build_id=submitted.build_id), timeout=120)
    return last.state


def keys(store: Store, *prefixes: str) -> list[str]:
    return [entry.key for prefix in prefixes for entry in store.list(prefix)]


def test_a_disk_that_fills_up_during_the_upload_fails_the_job_in_words(
    small_disk: Path, checkpoint: Path, tmp_path: Path
) -> None:
    store = open_store(str(small_disk / "store"))
    arguments = ("--store", store.url, "--checkpoint-root", str(checkpoint.parent), "--work-dir", str(tmp_path))
    with service("builder_svc", tmp_path / "log", *arguments) as builder:
        stub = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(builder.address))
        failed = run_build(stub, checkpoint)
        assert builder_pb2.BuildState.Name(failed.state) == "BUILD_STATE_FAILED"
        assert (failed.failure.code, failed.failure.reason) == (8, "STORE_FULL")
        assert str(small_disk) in failed.failure.message and "free some space" in failed.failure.message
        assert keys(store, "engines/", "models/", "blobs/") == []
        subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
        assert builder_pb2.BuildState.Name(run_build(stub, checkpoint).state) == "BUILD_STATE_SUCCEEDED"
    assert registry.names(store) == ["tiny"]


@pytest.mark.parametrize(
    "damage", ["a flipped byte", *(pytest.param(how, marks=pytest.mark.drill) for how in ("cut off", "gone"))]
)
def test_damage_in_the_bucket_is_never_loaded(bucket: SeaweedFS, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    store = open_store(bucket.url(f"damage-{damage.split()[-1]}"))
    good, bad = (build(checkpoint, options, store=store).manifest for options in two_options())
    for name, manifest in (("good", good), ("bad", bad)):
        registry.set_name(store, name, manifest.engine_id)
    key = blob_key(bad.ranks[0].weights[0].digest)
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    if damage == "gone":
        store.delete(key)
    else:
        store.replace(key, bytes(data if damage == "a flipped byte" else data[:-100]))
    with service("executor_svc", tmp_path / "log", "--store", store.url, "--engine", "good") as executor:
        stub = executor_pb2_grpc.ExecutorStub(grpc.insecure_channel(executor.address))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.LoadEngine(executor_pb2.LoadEngineRequest(model="bad"), timeout=60))
        error = from_rpc_error(caught.value)
        assert error.code == (5 if damage == "gone" else DataLoss.code), error.message
        assert bad.ranks[0].weights[0].digest[:12] in error.message
        status = stub.GetStatus(executor_pb2.GetStatusRequest(), timeout=60)
        assert [engine.engine_id for engine in status.engines] == [good.engine_id]
        submit = executor_pb2.Submit(
            engine_id=good.engine_id, token_ids=[5, 6], stopping=StoppingCriteria(max_tokens=5, ignore_eos=True)
        )
        assert sum(len(part.token_ids) for part in stub.Generate(submit, timeout=60)) == 5


def two_options() -> "list[object]":
    from builder_svc.build_config import BuildConfig

    return [BuildConfig(dtype="float32"), BuildConfig(dtype="bfloat16")]


def test_services_with_wrong_credentials_say_so(bucket: SeaweedFS, checkpoint: Path, tmp_path: Path) -> None:
    wrong = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    store = ("--store", bucket.url("denied"))
    root = ("--checkpoint-root", str(checkpoint.parent))
    with (
        service("builder_svc", tmp_path / "builder.log", *store, *root, environment=wrong) as builder,
        service("executor_svc", tmp_path / "executor.log", *store, environment=wrong) as executor,
        service(
            "gateway", tmp_path / "gateway.log", *store, "--executor", executor.address, environment=wrong
        ) as front,
    ):
        spec = builder_pb2.BuildSpec(checkpoint=checkpoint.name)
        builds = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(builder.address))
        calls = executor_pb2_grpc.ExecutorStub(grpc.insecure_channel(executor.address))
        gateway = gateway_pb2_grpc.GatewayStub(grpc.insecure_channel(front.address))
        for attempt in (
            lambda: builds.SubmitBuild(builder_pb2.SubmitBuildRequest(spec=spec), timeout=60),
            lambda: list(calls.LoadEngine(executor_pb2.LoadEngineRequest(model="tiny"), timeout=60)),
            lambda: list(gateway.Generate(gateway_pb2.GenerateRequest(model="tiny", text="x"), timeout=60)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                attempt()
            error = from_rpc_error(caught.value)
            assert (error.code, error.reason) == (7, "STORE_DENIED")
            assert "'enginehouse'" in error.message and "AWS_SECRET_ACCESS_KEY" in error.message


def test_builders_that_race_make_one_engine_with_one_name(bucket: SeaweedFS, checkpoint: Path, tmp_path: Path) -> None:
    """Not as one job: each process builds by itself and publishes at the end."""
    store = open_store(bucket.url("race"))
    command = [
        sys.executable,
        "-m",
        "enginehouse",
        "build",
        str(checkpoint),
        "--name",
        "tiny",
        "--store",
        store.url,
        "--json",
    ]
    racers = [
        subprocess.Popen([*command, "--data", str(tmp_path / str(racer))], stdout=subprocess.PIPE, text=True)
        for racer in range(2)
    ]
    found = [json.loads(racer.communicate(timeout=120)[0])["engine_id"] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert found[0] == found[1]
    assert keys(store, "engines/") == [f"engines/{found[0]}.json"]
    assert [(record.name, record.engine_id) for record in names.history(store, "tiny")] == [("tiny", found[0])]
    manifest = registry.manifest(store, found[0])
    for file in manifest.files():
        assert len(blobs.read(store, file)) == file.size


@pytest.mark.drill  # it waits for what everybody has patience for
async def test_a_store_that_is_away_stops_nothing_that_is_served(
    bucket: SeaweedFS, checkpoint: Path, tmp_path: Path
) -> None:
    """What needs the store fails with UNAVAILABLE after bounded time; loaded models go on; then all is as before."""
    store = open_store(bucket.url("away"))
    registry.set_name(store, "tiny", build(checkpoint, store=store).manifest.engine_id)
    with service("executor_svc", tmp_path / "executor.log", "--store", store.url, "--engine", "tiny") as executor:
        arguments = ("--store", store.url, "--executor", executor.address)
        root = ("--store", store.url, "--checkpoint-root", str(checkpoint.parent))
        with (
            service("gateway", tmp_path / "gateway.log", *arguments) as front,
            service("builder_svc", tmp_path / "builder.log", *root) as builder,
        ):
            async with (
                grpc.aio.insecure_channel(front.address) as channel,
                grpc.aio.insecure_channel(builder.address) as builder_channel,
            ):
                gateway = gateway_pb2_grpc.GatewayStub(channel)
                builds = builder_pb2_grpc.BuilderStub(builder_channel)
                await ready(gateway)
                assert [part async for part in gateway.Generate(request(1, 5))][-1].HasField("finish")
                bucket.stop(signal.SIGKILL)
                try:
                    await asyncio.sleep(2.5)  # what the gateway knows of the name is old now
                    began = time.monotonic()
                    assert [part async for part in gateway.Generate(request(1, 5))][-1].HasField("finish")
                    assert time.monotonic() - began < 5  # for so long it would wait for what it does not know
                    began = time.monotonic()
                    submit = builder_pb2.SubmitBuildRequest(spec=builder_pb2.BuildSpec(checkpoint=checkpoint.name))
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await builds.SubmitBuild(submit, timeout=60)
                    error = from_rpc_error(caught.value)
                    assert (error.code, error.reason) == (14, "STORE_UNAVAILABLE") and bucket.endpoint in error.message
                    assert time.monotonic() - began < 50  # its patience is 10 s, and that of a build 60
                    unknown = gateway_pb2.GenerateRequest(model="unknown", text="x")
                    _, error = await asyncio.wait_for(end_of(gateway.Generate(unknown), []), 60)
                    assert error.code == 14
                finally:
                    bucket.start()
                await builds.SubmitBuild(submit, timeout=60)
                _, error = await asyncio.wait_for(end_of(gateway.Generate(unknown), []), 60)
                assert error.code == 5 and "tiny" in error.message
