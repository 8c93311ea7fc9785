"""How long a start takes: from `python -m executor_svc` to the first token of a stored engine, none of it in the page cache.

    python -m bench.start [--model bench/models/llama-3.1-8b] [--rounds 1] [--dir DIR] [--out FILE.json]

The engine has random weights in real files (about as many bytes as the model: DIR needs a little more). It is started with its
compiled kernels and, with an empty cache of Triton's, without them. The plain parallel read of the same files is the floor. Each
phase's end is told, in seconds from the executor's start: its worker has imported torch; the first weights are asked for; all
are there; the runner is ready; the engine is loaded; the port is open; the token has come.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec
import torch

from bench.serving import save
from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from builder_svc.weights import write_weights
from engine import blobs, registry
from engine.directory import DirectoryStore
from engine.manifest import CHUNK_SIZE, Manifest, engine_id
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2 import Submit
from protos.v1.executor_pb2_grpc import ExecutorStub

PROMPT = 128  # tokens
READERS = 16  # chunks at a time
PHASES = ("imports", "asked", "weights", "runner", "loaded", "listening", "start")
_LOADED = re.compile(
    r"MB loaded in ([\d.]+) s \(weights from ([\d.]+) to ([\d.]+) s, runner ([\d.]+) s\) .* waited (-?[\d.]+) s"
)


def make_engine(model: Path, device: str, root: Path) -> tuple[DirectoryStore, Manifest]:
    """Of a config alone, with random weights that lie in the store like any engine's."""
    store, node = DirectoryStore(root / "store"), this_node(device)
    options = BuildConfig(
        device=device,
        dtype="bfloat16",
        compute_capability=node.compute_capability,
        dummy_weights=True,
        max_batch_size=256,
        max_seq_len=8192,
        max_num_tokens=8192,
    )
    dummy = build(model, options, store=store).manifest
    loaded = load_engine(store, dummy.engine_id, node)
    work = root / "work"
    work.mkdir()
    weights = loaded.weights
    files = write_weights(loaded.program, lambda name: [weights[name].cpu()], set(weights), work, lambda *_: None)
    for ref, path in files:
        blobs.put_file(store, ref, path, move=True)
    identity = dummy.identity | {"random_seed": "written to files"}
    rank = msgspec.structs.replace(dummy.ranks[0], weights=tuple(ref for ref, _ in files), random_seed=None)
    manifest = msgspec.structs.replace(dummy, identity=identity, engine_id=engine_id(identity), ranks=(rank,))
    return store, registry.publish(store, manifest)


def forget(root: Path) -> str:
    """Empties the page cache, or where that is not allowed takes these files out of it; how it was done."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "all of the page cache"
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "the engine's files"


def weight_files(store: DirectoryStore, manifest: Manifest) -> list[Path]:
    """Of all ranks."""
    return [store.root / blobs.blob_key(file.digest) for rank in manifest.ranks for file in rank.weights]


def read_all(paths: list[Path]) -> float:
    """Seconds in which all of the files are read, in parallel, into memory that nobody looks at."""
    own = threading.local()

    def read(path: Path, offset: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(CHUNK_SIZE)
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.readinto(own.buffer)

    began = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        chunks = [pool.submit(read, path, at) for path in paths for at in range(0, path.stat().st_size, CHUNK_SIZE)]
        for chunk in chunks:
            chunk.result()
    return time.perf_counter() - began


def start(store: DirectoryStore, manifest: Manifest, device: str, trusted: bool, cache: Path) -> dict[str, Any]:
    """Starts an executor and asks it for a token; seconds from the process' start to the end of each phase."""
    submit = Submit(
        engine_id=manifest.engine_id,
        token_ids=range(100, 100 + PROMPT),
        sampling=SamplingParams(temperature=0),
        stopping=StoppingCriteria(max_tokens=1, ignore_eos=True),
    )
    command = [sys.executable, "-m", "executor_svc", "--store", store.url, "--engine", manifest.engine_id]
    command += ["--device", device, "--port", "0", *(["--trust-native"] if trusted else [])]
    lines: list[str] = []
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = {}

    def follow() -> None:
        for line in process.stderr or ():
            lines.append(line)
            if match := _LOADED.search(line):
                loaded, asked, weights, runner, waited = map(float, match.groups())
                told = time.perf_counter() - began - loaded
                ends = (told - waited, told + asked, told + weights, told + runner, told + loaded)
                found.update({f"{phase}_s": end for phase, end in zip(PHASES, ends, strict=False)})

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        line = ""
        while " listening on " not in line:
            if not (line := process.stdout.readline() if process.stdout else ""):
                follower.join()
                raise SystemExit("the executor did not start:\n" + "".join(lines))
        found["listening_s"] = time.perf_counter() - began
        with grpc.insecure_channel(line.split()[-1]) as channel:
            call = ExecutorStub(channel).Generate(submit)
            output = next(iter(call))
            found["start_s"] = time.perf_counter() - began
        if len(output.token_ids) != 1:
            raise SystemExit(f"no token came: {output}")
    finally:
        process.terminate()
        process.wait(60)
        follower.join()
    print("".join(f"    {line}" for line in lines), end="", flush=True)
    found["compiled"] = len(
        [*cache.glob("*/*.cubin"), *cache.glob("*/*.so")]
    )  # by Triton: kernels, and what launches them
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("bench/models/llama-3.1-8b"))
    parser.add_argument(
        "--dir", type=Path, help="on the disk that is to be measured; by default the system's for temporary files"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=1, help="of each way to start")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="enginehouse-start-", dir=arguments.dir) as directory:
        root = Path(directory)
        began = time.perf_counter()
        store, manifest = make_engine(arguments.model, arguments.device, root)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        size = manifest.weight_bytes()
        kernels = sum(file.size for file in manifest.ranks[0].kernels)
        print(
            f"{size / 1e9:.2f} GB and {kernels / 1e3:.0f} kB of kernels made in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        ways = {"with_kernels": True, "without_kernels": False}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        forget(root)
        read_s = read_all(weight_files(store, manifest))
        found: dict[str, Any] = {"model": arguments.model.name, "bytes": size, "read_s": round(read_s, 3), "ways": runs}
        for number in range(arguments.rounds):
            for name, trusted in ways.items():
                cache = root / f"{name}-{number}"
                cache.mkdir()
                found["dropped"] = forget(root)
                print(f"  {name}, without {found['dropped']}")
                run = start(store, manifest, arguments.device, trusted, cache)
                runs[name].append(run)
                found["start_s"] = min(run["start_s"] for run in runs["with_kernels"])
                save(arguments.out, found)
    print(f"\n{'seconds to':18}" + "".join(f"{phase:>10}" for phase in (*PHASES, "compiled")))
    for name, made in runs.items():
        for run in made:
            ends = "".join(f"{run.get(phase + '_s', float('nan')):10.2f}" for phase in PHASES)
            print(f"{name:18}{ends}{run['compiled']:10}")
    print(f"reading the weights alone, {READERS} at a time: {read_s:.2f} s, {size / read_s / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
