"""Peak anonymous memory of a build and of a load of a checkpoint of 3 GB, through real services.

python bench/memory.py [--store URL] [--layers N] [--out FILE.json]; without a store, one in a temporary directory.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import grpc

from protos.v1 import builder_pb2, builder_pb2_grpc, executor_pb2, executor_pb2_grpc
from tests.integration.services import service
from tests.memory import PeakAnon, rss_anon, write_checkpoint
from tests.seaweed import SeaweedFS

ROOT = Path(__file__).parents[1]
MB = 1e6
MOST = {"build_over_idle_and_tensor_mb": 512, "load_over_weights_mb": 256}


def measure(directory: Path, store: str, layers: int) -> dict[str, object]:
    """Builds and loads; all sizes in MB."""
    largest = write_checkpoint(directory / "checkpoints" / "large", layers)
    size = (directory / "checkpoints" / "large" / "model.safetensors").stat().st_size
    arguments = ("--store", store, "--checkpoint-root", str(directory / "checkpoints"), "--work-dir", str(directory))
    with service("builder_svc", directory / "builder.log", *arguments) as builder:
        stub = builder_pb2_grpc.BuilderStub(grpc.insecure_channel(builder.address))
        stub.ListBuilds(builder_pb2.ListBuildsRequest())
        idle = rss_anon(builder.process.pid)
        began = time.monotonic()
        with PeakAnon(builder.process.pid) as build_memory:
            spec = builder_pb2.BuildSpec(checkpoint="large", dtype="float32", max_seq_len=256)
            build = stub.SubmitBuild(builder_pb2.SubmitBuildRequest(spec=spec, model="large"))
            *_, last = stub.WatchBuild(builder_pb2.WatchBuildRequest(build_id=build.build_id))
        build_seconds = time.monotonic() - began
        if last.state.state != builder_pb2.BUILD_STATE_SUCCEEDED:
            raise SystemExit(f"the build failed: {last.state.failure.message}")
    with service("executor_svc", directory / "executor.log", "--store", store, "--kv-memory", "67108864") as executor:
        calls = executor_pb2_grpc.ExecutorStub(grpc.insecure_channel(executor.address))
        before = rss_anon(executor.process.pid)
        began = time.monotonic()
        with PeakAnon(executor.process.pid) as load_memory:
            list(calls.LoadEngine(executor_pb2.LoadEngineRequest(model="large")))
        load_seconds = time.monotonic() - began
    return {
        "checkpoint_mb": round(size / MB),
        "largest_tensor_mb": round(largest / MB),
        "builder_idle_mb": round(idle / MB),
        "build_peak_mb": round(build_memory.peak / MB),
        "build_over_idle_and_tensor_mb": round((build_memory.peak - idle - largest) / MB),
        "build_seconds": round(build_seconds, 1),
        "load_peak_mb": round(load_memory.peak / MB),
        "load_over_weights_mb": round((load_memory.peak - before - size) / MB),
        "load_seconds": round(load_seconds, 1),
    }


def main() -> None:
    """Prints the result and keeps it in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help='by default a directory; "seaweedfs" starts a server')
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    with tempfile.TemporaryDirectory() as directory:
        store = arguments.store or str(Path(directory) / "store")
        with ExitStack() as stack:
            if arguments.store == "seaweedfs":
                server = stack.enter_context(SeaweedFS())
                os.environ.update(server.environment)
                store = server.url("memory")
            found = measure(Path(directory), store, arguments.layers)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "device": f"{os.uname().machine}, {os.cpu_count()} cores",
        "store": arguments.store or "directory",
        **found,
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    over = {name: result[name] for name, most in MOST.items() if int(str(result[name])) > most}
    if over:
        raise SystemExit(f"more anonymous memory than it may be: {over}")


if __name__ == "__main__":
    main()
