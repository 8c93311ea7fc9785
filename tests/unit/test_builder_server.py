"""The builder's servicer over a real server, and the builder as a process; all builds but one are stand-ins."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from builder_harness import child, ends, publish, real_child, state

from builder_svc.__main__ import parse
from builder_svc.build_config import BuildConfig
from builder_svc.checkpoint.sources import find_checkpoint, find_text
from builder_svc.jobs import Jobs
from builder_svc.process import BuildProcess, BuildRequest
from builder_svc.quant_config import CalibConfig, QuantAlgo, QuantConfig
from builder_svc.server import BuilderServicer, read_options
from engine import registry
from engine.backends import open_store
from engine.errors import EnginehouseError, InvalidArgument, NotFound, PermissionDenied
from engine.store import Store
from enginehouse.commands.build import Choices
from protos import rpc
from protos.v1.builder_pb2 import (
    DEVICE_KIND_CUDA,
    BuildEvent,
    BuildSpec,
    CancelBuildRequest,
    GetBuildRequest,
    ListBuildsRequest,
    ListModelNamesRequest,
    Quantization,
    SetModelNameRequest,
    SubmitBuildRequest,
    Target,
    WatchBuildRequest,
)
from protos.v1.builder_pb2_grpc import BuilderStub, add_BuilderServicer_to_server

# By the checkpoint's name: what a build of it does.
BUILD = """
name = os.path.basename(request["checkpoint"])
if name == "slow":
    hang()
if name == "bad":
    send(type="failed", code=5, reason="WEIGHTS_NOT_FOUND", message="no weights", metadata={})
for done in range(3):
    progress("weights", done, 2)
result("%s")
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint root, with things outside of it."""
    for name in ("models/demo", "models/slow", "models/bad", "models/org/deep", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/file").touch()
    (tmp_path / "models/link").symlink_to(tmp_path / "models/demo")
    (tmp_path / "models/escape").symlink_to(tmp_path / "outside")
    (tmp_path / "models/circle").symlink_to(tmp_path / "models/circle")
    (tmp_path / "models-2").mkdir()
    return tmp_path / "models"


@pytest.fixture
def engine(store: Store) -> str:
    return publish(store)


@pytest.fixture
async def stub(store: Store, engine: str, root: Path, tmp_path: Path) -> AsyncIterator[BuilderStub]:
    jobs = Jobs(store, BuildProcess(child(BUILD % engine), work_dir=tmp_path / "outside"), 2)
    jobs.start()
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor()])
    add_BuilderServicer_to_server(BuilderServicer(jobs, store, root), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield BuilderStub(channel)
    await jobs.close()
    await server.stop(0)


async def failure(call: Awaitable[object]) -> EnginehouseError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return rpc.from_rpc_error(caught.value)


def request(checkpoint: str, model: str = "", **spec: Any) -> SubmitBuildRequest:
    return SubmitBuildRequest(spec=BuildSpec(checkpoint=checkpoint, **spec), model=model)


async def watch(stub: BuilderStub, build_id: str) -> list[BuildEvent]:
    async with asyncio.timeout(60):
        return [event async for event in stub.WatchBuild(WatchBuildRequest(build_id=build_id))]


# What a client asks for


def test_options_by_default():
    assert read_options(BuildSpec(checkpoint="demo")) == BuildConfig(device="cpu")


def test_options_as_given():
    target = Target(device=DEVICE_KIND_CUDA, compute_capability="9.0")
    sizes = {"max_batch_size": 8, "max_seq_len": 512, "max_num_tokens": 256, "tp_size": 4, "pp_size": 2}
    spec = BuildSpec(dtype="bfloat16", target=target, kv_cache_dtype="fp8", **sizes)
    assert read_options(spec) == BuildConfig("bfloat16", "cuda", "9.0", **sizes, kv_cache_dtype="fp8")


def test_a_backend_of_plans_is_for_gpus():
    spec = BuildSpec(backend="tensorrt_rtx", target=Target(compute_capability="12.0"), weight_streaming=True)
    wanted = BuildConfig(device="cuda", compute_capability="12.0", backend="tensorrt_rtx", weight_streaming=True)
    assert read_options(spec) == wanted
    assert (
        Choices(device="cuda", compute_capability="12.0", backend="tensorrt_rtx").spec("demo").backend == "tensorrt_rtx"
    )


def test_how_to_quantize_as_given():
    asked = Quantization(
        quant_algo="W4A16_AWQ", kv_cache_quant_algo="INT8", group_size=64, has_zero_point=True, exclude_modules=["lm_head"],
        calib_dataset="texts", calib_samples=16, random_seed=0,
    )  # fmt: skip
    options = read_options(BuildSpec(quantization=asked))
    assert options.quant_config == QuantConfig(
        QuantAlgo.W4A16_AWQ, QuantAlgo.INT8, 64, has_zero_point=True, exclude_modules=["lm_head"]
    )
    assert options.calib_config == CalibConfig(calib_dataset="texts", calib_batches=16, random_seed=0)
    request = BuildRequest("demo", options=options)
    assert msgspec.json.decode(msgspec.json.encode(request), type=BuildRequest) == request
    assert read_options(BuildSpec(quantization=Quantization(quant_algo="FP8"))).calib_config == CalibConfig()


def test_calibration_text_is_taken_from_the_checkpoint_root_alone(tmp_path: Path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "text.txt").write_text("text")
    (tmp_path / "other.txt").write_text("text")
    assert find_text(tmp_path / "root", "text.txt") == tmp_path / "root" / "text.txt"
    for path in ("../other.txt", str(tmp_path / "other.txt")):
        with pytest.raises(PermissionDenied, match="is outside of"):
            find_text(tmp_path / "root", path)
    with pytest.raises(NotFound, match="nothing of that name"):
        find_text(tmp_path / "root", "other.txt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (BuildSpec(quantization=Quantization(quant_algo="W3A5")), "quant_algo is 'W3A5': choose one of"),
        (BuildSpec(quantization=Quantization()), "give its quant_algo or kv_cache_quant_algo"),
        (BuildSpec(quantization=Quantization(quant_algo="W4A16", group_size=48)), "group_size is 48"),
        (BuildSpec(quantization=Quantization(quant_algo="FP8", calib_samples=0)), "calib_batches is 0"),
        (BuildSpec(dtype="int3"), "'int3'"),
        (BuildSpec(backend="onnx"), "backend 'onnx': choose one of torch, tensorrt, tensorrt_rtx"),
        (BuildSpec(backend="tensorrt_rtx"), "needs a target: choose one of sm75"),
        (BuildSpec(weight_streaming=True), "weight_streaming needs backend tensorrt"),
        (BuildSpec(kv_cache_dtype="int4"), "kv_cache_dtype 'int4': choose one of auto, fp8, int8"),
        (BuildSpec(max_batch_size=0), "max_batch_size is 0"),
        (BuildSpec(max_seq_len=0), "max_seq_len is 0"),
        (BuildSpec(max_num_tokens=0), "max_num_tokens is 0"),
        (BuildSpec(tp_size=0), "tp_size is 0"),
        (BuildSpec(target=Target(device=DEVICE_KIND_CUDA, compute_capability="sm_90")), "'sm_90'"),
        (BuildSpec(target=Target(device=77)), "target.device 77: choose one of .*DEVICE_KIND_CUDA"),  # type: ignore[arg-type]
    ],
)
def test_options_that_cannot_be(spec: BuildSpec, message: str):
    with pytest.raises(InvalidArgument, match=message):
        read_options(spec)


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        ("demo", "demo"),
        ("./demo/", "demo"),
        ("org/deep", "org/deep"),
        ("org/../demo", "demo"),
        ("link", "demo"),
        (".", "."),
    ],
)
def test_checkpoints_in_the_root(root: Path, checkpoint: str, found: str):
    assert find_checkpoint(root, checkpoint) == (root / found).resolve()
    assert find_checkpoint(root, str(root / checkpoint)) == (root / found).resolve()


@pytest.mark.parametrize(
    "checkpoint", ["..", "../outside", "/", "/etc", "escape", "../models-2", "demo/../../outside", "../no"]
)
def test_checkpoints_outside_of_the_root(root: Path, checkpoint: str):
    with pytest.raises(PermissionDenied, match=f"is outside of {root}") as caught:
        find_checkpoint(root, checkpoint)
    assert caught.value.reason == "CHECKPOINT_OUTSIDE_ROOT"


@pytest.mark.parametrize("checkpoint", ["no", "org/no", "file", "file/x", "circle", "x" * 300])
def test_checkpoints_that_are_not_there(root: Path, checkpoint: str):
    with pytest.raises(NotFound, match=f"no directory '{checkpoint}'"):
        find_checkpoint(root, checkpoint)


@pytest.mark.parametrize("checkpoint", ["", "a\0b"])
def test_what_is_no_checkpoint(root: Path, checkpoint: str):
    with pytest.raises(InvalidArgument):
        find_checkpoint(root, checkpoint)


# The service


async def test_a_build_from_submit_to_its_name(stub: BuilderStub, store: Store, engine: str):
    submitted = await stub.SubmitBuild(request("demo", "demo", max_seq_len=64))
    assert (state(submitted), submitted.model, submitted.spec.max_seq_len) == ("QUEUED", "demo", 64)
    events = await watch(stub, submitted.build_id)
    assert [event.sequence for event in events] == list(range(len(events)))
    assert [state(event.state) for event in events if event.HasField("state")] == [
        "QUEUED",
        "RUNNING",
        "RUNNING",
        "SUCCEEDED",
    ]
    assert [event.progress.done for event in events if event.HasField("progress")] == [0, 2]
    final = events[-1].state
    assert (final.engine_id, final.reused, final.model) == (engine, False, "demo")
    assert final == await stub.GetBuild(GetBuildRequest(build_id=submitted.build_id))
    assert await watch(stub, submitted.build_id) == events
    assert registry.resolve(store, "demo").engine_id == engine


async def test_a_build_that_fails(stub: BuilderStub):
    submitted = await stub.SubmitBuild(request("bad"))
    final = (await watch(stub, submitted.build_id))[-1].state
    assert state(final) == "FAILED"
    assert (final.failure.code, final.failure.reason, final.failure.message) == (5, "WEIGHTS_NOT_FOUND", "no weights")


async def test_watchers_come_and_go(stub: BuilderStub):
    build_id = (await stub.SubmitBuild(request("slow"))).build_id
    leaving = stub.WatchBuild(WatchBuildRequest(build_id=build_id))
    await leaving.read()
    leaving.cancel()
    staying = [asyncio.create_task(watch(stub, build_id)) for _ in range(3)]
    assert state(await stub.CancelBuild(CancelBuildRequest(build_id=build_id))) == "CANCELLED"
    lists = await asyncio.gather(*staying)
    assert lists[0] == lists[1] == lists[2] == await watch(stub, build_id)
    assert state(lists[0][-1].state) == "CANCELLED"


async def test_the_same_submit_joins(stub: BuilderStub):
    first = await stub.SubmitBuild(request("slow", "demo"))
    same = await stub.SubmitBuild(request("./slow", "demo", dtype="auto", max_batch_size=64))
    assert same.build_id == first.build_id
    assert (await stub.SubmitBuild(request("slow", "demo", max_batch_size=63))).build_id != first.build_id
    assert [build.build_id for build in (await stub.ListBuilds(ListBuildsRequest())).builds][-1] == first.build_id
    assert len((await stub.ListBuilds(ListBuildsRequest())).builds) == 2


@pytest.mark.parametrize(
    ("submit", "kind", "message"),
    [
        (request(""), InvalidArgument, "checkpoint ''"),
        (request("demo", dtype="int3"), InvalidArgument, "'int3'"),
        (request("demo", "a/b"), InvalidArgument, "model name 'a/b'"),
        (request("no"), NotFound, "no directory 'no'"),
        (request("../outside"), PermissionDenied, "--checkpoint-root"),
    ],
)
async def test_what_is_refused_at_once(
    stub: BuilderStub, submit: SubmitBuildRequest, kind: type[EnginehouseError], message: str
):
    error = await failure(stub.SubmitBuild(submit))
    assert type(error) is kind
    assert message in error.message
    assert len((await stub.ListBuilds(ListBuildsRequest())).builds) == 0


async def test_unknown_builds(stub: BuilderStub):
    for call in (
        stub.GetBuild(GetBuildRequest(build_id="x")),
        stub.CancelBuild(CancelBuildRequest(build_id="x")),
        stub.WatchBuild(WatchBuildRequest(build_id="x")).read(),
    ):
        error = await failure(call)
        assert (type(error), error.reason) == (NotFound, "BUILD_NOT_FOUND")


async def test_model_names(stub: BuilderStub, store: Store, engine: str):
    assert len((await stub.ListModelNames(ListModelNamesRequest())).models) == 0
    other = publish(store, 1)
    await stub.SetModelName(SetModelNameRequest(name="b", engine_id=engine))
    await stub.SetModelName(SetModelNameRequest(name="a", engine_id=engine))
    named = await stub.SetModelName(SetModelNameRequest(name="a", engine_id=other))
    assert (named.name, named.sequence, named.engine_id) == ("a", 2, other)
    listed = (await stub.ListModelNames(ListModelNamesRequest())).models
    assert [(name.name, name.sequence, name.engine_id) for name in listed] == [("a", 2, other), ("b", 1, engine)]


@pytest.mark.parametrize(
    ("name", "engine_id", "kind"),
    [("a/b", "0" * 64, InvalidArgument), ("a", "abc", InvalidArgument), ("a", "0" * 64, NotFound)],
)
async def test_names_that_cannot_be_set(stub: BuilderStub, name: str, engine_id: str, kind: type[EnginehouseError]):
    error = await failure(stub.SetModelName(SetModelNameRequest(name=name, engine_id=engine_id)))
    assert type(error) is kind


# The process


def test_the_command_line(capsys: pytest.CaptureFixture[str]):
    parsed = parse(["--store", "s", "--checkpoint-root", "c"])
    assert (parsed.host, parsed.port, parsed.jobs, parsed.work_dir) == ("127.0.0.1", 8401, 1, None)
    for wrong in (["--store", "s"], ["--store", "s", "--checkpoint-root", "c", "--jobs", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "--jobs is 0: it must be at least 1" in capsys.readouterr().err


def test_the_service_imports_no_torch():
    code = "import builder_svc.__main__, sys; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_root_that_is_not_there(tmp_path: Path):
    command = [sys.executable, "-m", "builder_svc", "--store", tmp_path, "--checkpoint-root", tmp_path / "no"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"builder: --checkpoint-root {tmp_path / 'no'} is no directory\n")


# Starts the service with another command for its builds, if one is given.
SERVICE = """
import json, sys
from protos import rpc
from builder_svc import __main__ as service
from builder_svc.process import BuildProcess, BuildRequest
from builder_svc.quant_config import CalibConfig, QuantAlgo, QuantConfig
command = json.loads(sys.argv[1])
service.BuildProcess = lambda **options: BuildProcess(**options, **({"command": command} if command else {}))
sys.exit(rpc.main("builder", service.run(service.parse(sys.argv[2:]))))
"""


@asynccontextmanager
async def service(
    tmp_path: Path, root: Path, build: list[str] | None = None
) -> AsyncIterator[tuple[asyncio.subprocess.Process, BuilderStub]]:
    arguments = [
        "--store",
        tmp_path / "store",
        "--checkpoint-root",
        root,
        "--port",
        "0",
        "--work-dir",
        tmp_path / "outside",
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVICE, json.dumps(build), *arguments, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout
        line = (await process.stdout.readline()).decode()
        async with grpc.aio.insecure_channel(line.rsplit(maxsplit=1)[1]) as channel:
            yield process, BuilderStub(channel)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_no_build_outlives_the_service(tmp_path: Path, root: Path, number: signal.Signals):
    build = real_child("progress('weights', os.getpid(), 1 << 40, '')\ntime.sleep(60)")
    async with service(tmp_path, root, build) as (process, stub):
        build_id = (await stub.SubmitBuild(request("demo"))).build_id
        watching = stub.WatchBuild(WatchBuildRequest(build_id=build_id))
        while not (event := await watching.read()).HasField("progress"):
            pass
        process.send_signal(number)
        if number == signal.SIGTERM:
            assert state((await watching.read()).state) == "QUEUED"
            error = await failure(watching.read())
            assert (error.code, error.reason) == (14, "BUILDER_STOPPING")
        assert await asyncio.wait_for(process.wait(), 60) == (0 if number == signal.SIGTERM else -number)
    assert await ends(event.progress.done)
    assert number == signal.SIGKILL or left(tmp_path / "outside") == []


async def test_the_next_builder_goes_on_with_the_jobs_of_one_that_was_stopped(tmp_path: Path, root: Path):
    store = open_store(str(tmp_path / "store"))
    engine = publish(store)
    build = real_child("progress('weights', 1, 2, '')\ntime.sleep(60)")
    async with service(tmp_path, root, build) as (process, stub):
        build_id = (await stub.SubmitBuild(request("demo", "demo"))).build_id
        watching = stub.WatchBuild(WatchBuildRequest(build_id=build_id))
        while not (event := await watching.read()).HasField("progress"):
            pass
        process.terminate()
        await process.wait()
    async with service(tmp_path, root, child(BUILD % engine)) as (_, stub):
        async with asyncio.timeout(60):
            seen = [
                event
                async for event in stub.WatchBuild(
                    WatchBuildRequest(build_id=build_id, from_sequence=event.sequence + 1)
                )
            ]
    assert seen[0].sequence == event.sequence + 1
    assert (state(seen[0].state), state(seen[-1].state), seen[-1].state.attempt) == ("QUEUED", "SUCCEEDED", 2)
    assert registry.resolve(store, "demo").engine_id == engine


def left(directory: Path) -> list[Path]:
    return list(directory.iterdir())
