"""Long faults, with real processes: builders killed in every phase, a store that is away for half a minute, memory."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from builder_svc.pipeline import build
from engine import blobs, checkpoints, registry
from engine.backends import open_store
from engine.checkpoints import UploadedCheckpoint
from engine.manifest import FileRef
from engine.store import Store
from protos.v1 import builder_pb2, builder_pb2_grpc, executor_pb2, executor_pb2_grpc
from tests.conftest import save_checkpoint
from tests.integration.services import service
from tests.memory import PeakAnon, rss_anon, tree, write_checkpoint
from tests.seaweed import SeaweedFS

pytestmark = pytest.mark.drill

MB = 1_000_000

# A builder whose builds stop in a phase, where they wait to be killed; with no child's program, before the engine's name.
BUILDER = """
import sys, time
from builder_svc import __main__ as service
from builder_svc.process import BuildProcess
from engine import registry
from protos import rpc
child = [sys.executable, "-c", sys.argv[1]]
if sys.argv[1]:
    service.BuildProcess = lambda **options: BuildProcess(child, **options)
else:
    registry.set_name = lambda *_: time.sleep(600)
sys.exit(rpc.main("builder", service.run(service.parse(sys.argv[2:]))))
"""
CHILD = """
import sys, time
from builder_svc import child
def build(request, progress):
    def stop(phase, done, total, unit):
        progress(phase, done, total, unit)
        if phase == {phase!r} and {when}:
            time.sleep(600)
    return child.build(request, stop)
sys.exit(child.main(build))
"""
PHASES = {
    "download": ("download", "done < total"),
    "checkpoint": ("checkpoint", "done >= total"),
    "program": ("program", "done < total"),
    "weights": ("weights", "done > total / 2"),
    "upload": ("upload", "total > done > total / 4"),
    "uploaded": ("upload", "done >= total"),
    "publish": ("publish", "done < total"),
    "published": ("publish", "done >= total"),
    "name": ("", ""),
}


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some 100 MB, which is uploaded in several parts."""
    directory = tmp_path_factory.mktemp("medium") / "medium"
    directory.mkdir()
    return save_checkpoint(directory, vocab_size=20_000, hidden_size=512, num_attention_heads=8, num_key_value_heads=8)


def submit(stub: builder_pb2_grpc.BuilderStub, checkpoint: str, max_seq_len: int | None = None) -> str:
    spec = builder_pb2.BuildSpec(checkpoint=checkpoint, max_seq_len=max_seq_len)
    return stub.SubmitBuild(builder_pb2.SubmitBuildRequest(spec=spec, model="model"), timeout=60).build_id


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def upload(store: Store, checkpoint: Path) -> UploadedCheckpoint:
    """The checkpoint as if a client had uploaded it."""
    refs = []
    for path in sorted(checkpoint.iterdir()):
        hasher = blobs.Hasher()
        hasher.update(path.read_bytes())
        refs.append(hasher.ref(path.name))
        blobs.put_file(store, refs[-1], path)
    uploaded = UploadedCheckpoint(tuple(refs))
    checkpoints.put(store, uploaded)
    return uploaded


def check_whole(store: Store, engine_id: str, others: Sequence[FileRef] = ()) -> None:
    """Nothing but this engine, its name, its job and the others' blobs is there, and every byte of it is right."""
    assert [entry.key for entry in store.list("engines/")] == [f"engines/{engine_id}.json"]
    assert registry.resolve(store, "model").engine_id == engine_id
    assert [entry.key for entry in store.list("models/")] == ["models/model/0000000001.json"]
    files = registry.manifest(store, engine_id).files()
    for file in files:
        assert len(blobs.read(store, file)) == file.size
    assert {entry.key for entry in store.list("blobs/")} == {blobs.blob_key(file.digest) for file in (*files, *others)}
    for left in ("queue/", "joins/"):
        assert [entry.key for entry in store.list(left)] == []
    assert store.discard_partial(0) == 0


def test_a_builder_killed_in_any_phase_loses_nothing(bucket: SeaweedFS, medium: Path, tmp_path: Path) -> None:
    """Another replica has the job within a minute, and ends it as if nothing had happened. Every second time the build's
    own process is killed with its service; else it notices by itself."""
    expected = build(medium, store=open_store(str(tmp_path / "expected"))).manifest.engine_id
    turn = threading.Semaphore(2)  # builds at a time

    def drill(name: str) -> float:
        phase, when = PHASES[name]
        store = open_store(bucket.url(f"phase-{name}"))
        others = upload(store, medium) if phase == "download" else UploadedCheckpoint(())
        arguments = ("--store", store.url, "--checkpoint-root", str(medium.parent), "--work-dir")
        child = CHILD.format(phase=phase, when=when) if phase else ""
        directories = [tmp_path / f"{name}-{which}" for which in ("victim", "survivor")]
        for directory in directories:
            directory.mkdir()
        with (
            turn,
            service(
                "builder_svc", directories[0] / "log", *arguments, str(directories[0]), program=("-c", BUILDER, child)
            ) as victim,
        ):
            stub = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(victim.address))
            build_id = submit(stub, f"upload://{others.id}" if others.files else medium.name)
            for event in stub.WatchBuild(builder_pb2.WatchBuildRequest(build_id=build_id), timeout=200):
                assert not event.state.HasField("ended"), event.state
                step = event.progress
                if (
                    event.state.engine_id
                    if not phase
                    else step.phase == phase and _reached(when, step.done, step.total)
                ):
                    break
            whole = list(PHASES).index(name) % 2
            for pid in tree(victim.process.pid) if whole else [victim.process.pid]:
                os.kill(pid, signal.SIGKILL)
            killed = time.time()
            victim.process.wait()
        with service("builder_svc", directories[1] / "log", *arguments, str(directories[1])) as survivor:
            stub = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(survivor.address))
            taken = 0.0
            with turn:
                for event in stub.WatchBuild(builder_pb2.WatchBuildRequest(build_id=build_id), timeout=200):
                    if (
                        event.state.attempt == 2 and not taken
                    ):  # by the builder's clock: we may have waited for our turn
                        taken = event.time.ToNanoseconds() / 1e9 - killed
            assert builder_pb2.BuildState.Name(event.state.state) == "BUILD_STATE_SUCCEEDED", event.state
            assert (event.state.engine_id, event.state.attempt) == (expected, 2)
            until(lambda: not list(store.list("queue/")), 60)
        check_whole(store, expected, others.files)
        return taken

    with ThreadPoolExecutor(len(PHASES)) as pool:
        taken = dict(zip(PHASES, pool.map(drill, PHASES), strict=True))
    assert max(taken.values()) < 60, taken


def _reached(when: str, done: int, total: int) -> bool:
    return bool(eval(when, {"done": done, "total": total}))


def test_a_store_that_is_away_for_half_a_minute_costs_neither_a_build_nor_a_load(
    bucket: SeaweedFS, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "large", layers=1)
    store = open_store(bucket.url("outage"))

    def outage() -> None:
        bucket.stop(signal.SIGKILL)
        time.sleep(30)
        bucket.start()

    arguments = ("--store", store.url, "--checkpoint-root", str(tmp_path), "--work-dir", str(tmp_path))
    with service("builder_svc", tmp_path / "builder.log", *arguments) as builder:
        stub = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(builder.address))
        build_id = submit(stub, "large")
        away = None
        for event in stub.WatchBuild(builder_pb2.WatchBuildRequest(build_id=build_id), timeout=200):
            step = event.progress
            if step.phase == "upload" and step.done > step.total / 4 and not away:
                away = threading.Thread(target=outage)
                away.start()
        assert builder_pb2.BuildState.Name(event.state.state) == "BUILD_STATE_SUCCEEDED", event.state
        assert away, "the upload was over before the store was stopped"
        away.join()
        assert event.state.attempt == 1
        until(lambda: not list(store.list("queue/")), 60)
    check_whole(store, event.state.engine_id)

    with service("executor_svc", tmp_path / "executor.log", "--store", store.url) as executor:
        calls = executor_pb2_grpc.ExecutorStub(grpc.insecure_channel(executor.address))
        away = None
        for part in calls.LoadEngine(executor_pb2.LoadEngineRequest(model="model"), timeout=200):
            if part.bytes_done and not away:
                assert part.bytes_done < part.bytes_total, "the load was over before the store was stopped"
                away = threading.Thread(target=outage)
                away.start()
        assert away
        away.join()
        assert part.engine.state == executor_pb2.ENGINE_STATE_READY


def test_a_build_and_a_load_hold_no_more_memory_than_they_must(bucket: SeaweedFS, tmp_path: Path) -> None:
    """Bounds of the design: idle builder + largest tensor + 512 MB, and weights + 256 MB, of anonymous memory."""
    largest = write_checkpoint(tmp_path / "large", layers=2)
    store = open_store(bucket.url("memory"))
    arguments = ("--store", store.url, "--checkpoint-root", str(tmp_path), "--work-dir", str(tmp_path))
    with service("builder_svc", tmp_path / "builder.log", *arguments) as builder:
        stub = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(builder.address))
        stub.ListBuilds(builder_pb2.ListBuildsRequest())
        idle = rss_anon(builder.process.pid)
        with PeakAnon(builder.process.pid) as memory:
            build_id = submit(stub, "large", max_seq_len=256)
            *_, last = stub.WatchBuild(builder_pb2.WatchBuildRequest(build_id=build_id), timeout=200)
        assert builder_pb2.BuildState.Name(last.state.state) == "BUILD_STATE_SUCCEEDED", last.state
        assert memory.peak < idle + largest + 512 * MB, f"{memory.peak / MB:.0f} MB"
    weights = registry.manifest(store, last.state.engine_id).weight_bytes()
    arguments = ("--store", store.url, "--kv-memory", str(16 * MB))
    with service("executor_svc", tmp_path / "executor.log", *arguments) as executor:
        calls = executor_pb2_grpc.ExecutorStub(grpc.insecure_channel(executor.address))
        before = rss_anon(executor.process.pid)
        with PeakAnon(executor.process.pid) as memory:
            list(calls.LoadEngine(executor_pb2.LoadEngineRequest(model="model"), timeout=200))
        assert memory.peak < before + weights + 256 * MB, f"{(memory.peak - weights) / MB:.0f} MB over the weights"
