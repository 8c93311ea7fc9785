"""The three services for bad input, and what a client that has only stubs sees of an error."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.rpc import error_details_pb2, status_pb2

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from engine.manifest import Manifest, engine_id
from engine.store import Store
from protos.v1.builder_pb2_grpc import BuilderStub
from protos.v1.common_pb2 import StoppingCriteria
from protos.v1.executor_pb2 import (
    Submit,
)
from protos.v1.executor_pb2_grpc import ExecutorStub
from protos.v1.gateway_pb2 import (
    GenerateRequest,
    ListModelsRequest,
)
from protos.v1.gateway_pb2_grpc import GatewayStub
from tests.integration.services import Service, service
from tests.memory import tree

MAX_SEQ_LEN, MAX_BATCH_SIZE, MAX_WAITING = 256, 2, 2


@dataclass
class Cluster:
    """The three services over one store. Of its engines "tiny" is loaded, and the others, by what is wrong, are not.

    Attributes:
        worker: the process that runs the engine.
    """

    root: Path
    store: Store
    channels: dict[str, grpc.Channel]
    builder: BuilderStub
    executor: ExecutorStub
    gateway: GatewayStub
    engine_id: str
    worker: int
    others: dict[str, Manifest]
    handles: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def files(self) -> dict[str, tuple[int, int]]:
        """What the store holds of engines, with the sizes and times; half uploads too."""
        root, kept = self.root / "store", ("blobs", "engines", "models", ".partial")
        paths = [path for name in kept for path in (root / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    def submit(self, **fields: Any) -> Submit:
        stopping = StoppingCriteria(max_tokens=4, ignore_eos=True)
        given = {"handle": next(self.handles), "engine_id": self.engine_id, "token_ids": [5], "stopping": stopping}
        return Submit(**given | fields)


@dataclass
class Failed:
    """An error as it stands on the wire."""

    code: str
    message: str
    reason: str = ""
    retry_after: float | None = None


def failed(call: Any) -> Failed:
    """What a call ends with, read with nothing but grpc and the google.rpc messages."""
    try:
        list(call()) if callable(call) else list(call)
    except grpc.RpcError as error:
        found = Failed(error.code().name, error.details())
        packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        for detail in status_pb2.Status.FromString(packed).details if packed else ():
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                assert info.domain == "enginehouse"
                found.reason = info.reason
            elif detail.Unpack(retry):
                found.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        return found
    raise AssertionError("the call did not fail")


def higher_opset(store: Store, manifest: Manifest) -> Manifest:
    """The same engine as a later release would have built it."""
    newer = msgspec.structs.replace(manifest.fingerprint, opset_version=99)
    identity = {**manifest.identity, "format": {**manifest.identity["format"], "operators": 99}}
    return registry.publish(
        store,
        msgspec.structs.replace(manifest, identity=identity, engine_id=engine_id(identity), fingerprint=newer),
    )


@contextmanager
def services(checkpoint: Path, root: Path) -> Iterator[Cluster]:
    """Starts them over engines of a checkpoint; at the end they still have to serve."""
    good = shutil.copytree(checkpoint, root / "checkpoints" / "with a space")
    tokenizer = json.loads((good / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}  # spaces give no token
    (good / "tokenizer.json").write_text(json.dumps(tokenizer))
    store = open_store(str(root / "store"))
    (root / "work").mkdir()

    def made(**options: Any) -> Manifest:
        return build(good, BuildConfig(max_batch_size=MAX_BATCH_SIZE, **options), store=store).manifest

    tiny = made()
    registry.set_name(store, "tiny", tiny.engine_id)
    others = {
        "device": made(device="cuda", compute_capability="9.0", dtype="float32"),
        "opset": higher_opset(store, tiny),
        "damaged": made(dtype="bfloat16"),  # another dtype: blobs of its own
    }
    with ExitStack() as stack:

        def start(package: str, *arguments: str) -> grpc.Channel:
            started: Service = stack.enter_context(
                service(package, root / f"{package}.log", "--store", store.url, *arguments)
            )
            addresses.append(started.address)
            pids.append(started.process.pid)
            channels[package] = stack.enter_context(grpc.insecure_channel(started.address))
            return channels[package]

        addresses: list[str] = []
        pids: list[int] = []
        channels: dict[str, grpc.Channel] = {}
        executor = ExecutorStub(start("executor_svc", "--engine", "tiny", "--max-waiting", str(MAX_WAITING)))
        gateway = GatewayStub(start("gateway", "--executor", addresses[0]))
        builder = BuilderStub(
            start(
                "builder_svc",
                *("--checkpoint-root", str(root / "checkpoints"), "--work-dir", str(root / "work"), "--jobs", "2"),
            )
        )
        deadline = time.monotonic() + 60
        while not gateway.ListModels(ListModelsRequest()).models[0].ready_executors:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        worker = tree(pids[0])[1]
        made_cluster = Cluster(root, store, channels, builder, executor, gateway, tiny.engine_id, worker, others)
        yield made_cluster
        serves(made_cluster)  # after all of it


def serves(cluster: Cluster) -> None:
    """A good request is answered, by the gateway and by the executor."""
    stopping = StoppingCriteria(max_tokens=4, ignore_eos=True)
    request = GenerateRequest(model="tiny", text="In the beginning", stopping=stopping)
    assert sum(len(part.token_ids) for part in cluster.gateway.Generate(request, timeout=60)) == 4
    parts = cluster.executor.Generate(cluster.submit(), timeout=60)
    assert sum(len(part.token_ids) for part in parts) == 4
