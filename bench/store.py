"""Engines in S3: upload and verified load beside the plain minio client, on a SeaweedFS of this machine.

python bench/store.py [--size 3GB] [--rounds 3] [--out FILE.json]; the two are measured in turn, on the same parts and threads.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from minio import Minio

from engine import blobs
from engine.backends import open_store
from engine.manifest import CHUNK_SIZE, FileRef
from engine.s3_upload import PARALLEL_PARTS, PART_SIZE
from tests.seaweed import SeaweedFS

ROOT = Path(__file__).parents[1]
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}

LEAST = 0.7  # of the plain client's speed


def parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+) *([MG]I?B)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 3GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def make_file(path: Path, size: int) -> FileRef:
    """Random bytes, and what the manifest would say of them."""
    hasher = blobs.Hasher()
    with path.open("wb") as file:
        while hasher.size < size:
            data = os.urandom(min(8 * 2**20, size - hasher.size))
            file.write(data)
            hasher.update(data)
    return hasher.ref(path.name)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@contextmanager
def memory_watched(peaks: list[int]) -> Iterator[None]:
    """Appends how far anonymous memory rises above where it was, sampled every 5 ms."""
    idle, done = anonymous_memory(), threading.Event()
    peak = idle

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peaks.append(peak - idle)


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def plain_get(client: Minio, bucket: str, key: str, size: int) -> None:
    """Ranged reads to memory by the plain client, as many at once and as long as the verified load's."""

    def fetch(offset: int) -> int:
        response = client.get_object(bucket, key, offset, min(CHUNK_SIZE, size - offset))
        try:
            return len(response.read())
        finally:
            response.close()
            response.release_conn()

    with ThreadPoolExecutor(blobs.PARALLEL_READS) as pool:
        if sum(pool.map(fetch, range(0, size, CHUNK_SIZE))) != size:
            raise SystemExit("the plain client got other bytes than there are")


def measure(server: SeaweedFS, path: Path, ref: FileRef, rounds: int) -> dict[str, object]:
    """MB/s of each, median of the rounds (loads have twice as many and one); ratios of the medians."""
    client, size = server.client(), ref.size
    rates: dict[str, list[float]] = {name: [] for name in ("upload_plain", "upload", "load_plain", "load")}
    peaks: list[int] = []

    def record(name: str, action: Callable[[], object]) -> None:
        rates[name].append(size / 1e6 / seconds(action))
        print(f"{name:14s} {rates[name][-1]:8.1f} MB/s", flush=True)

    for turn in range(rounds):
        store = open_store(server.url(f"round-{turn}"))
        plain = f"plain-{turn}"
        options = {"part_size": PART_SIZE, "num_parallel_uploads": PARALLEL_PARTS}

        def upload_plain(key: str = plain, options: dict[str, int] = options) -> None:
            client.fput_object(server.bucket, key, str(path), **options)

        def upload(store: object = store) -> None:
            with memory_watched(peaks):
                blobs.put_file(store, ref, path)  # type: ignore[arg-type]

        pair = [("upload_plain", upload_plain), ("upload", upload)]
        for name, action in pair if turn % 2 == 0 else reversed(pair):
            record(name, action)
    buffer = memoryview(bytearray(os.urandom(1) * size))  # written to, so that its pages are there
    store = open_store(server.url("round-0"))
    for turn in range(2 * rounds + 1):  # shorter than uploads, and so more easily disturbed
        pair = [
            ("load_plain", lambda: plain_get(client, server.bucket, "plain-0", size)),
            ("load", lambda: blobs.read_into(store, [(ref, buffer)])),
        ]
        for name, action in pair if turn % 2 == 0 else reversed(pair):
            record(name, action)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    results: dict[str, object] = {f"{name}_mb_per_second": round(value, 1) for name, value in medians.items()}
    results["upload_ratio"] = round(medians["upload"] / medians["upload_plain"], 3)
    results["load_ratio"] = round(medians["load"] / medians["load_plain"], 3)
    results["upload_anonymous_memory_mb"] = round(max(peaks) / 1e6, 1)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="3GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "store": "SeaweedFS 4.48 on the same machine",
        "bytes": arguments.size,
        "rounds": arguments.rounds,
        "part_bytes": PART_SIZE,
        "parallel_parts": PARALLEL_PARTS,
        "chunk_bytes": CHUNK_SIZE,
        "parallel_reads": blobs.PARALLEL_READS,
    }
    with SeaweedFS() as server:
        os.environ.update(server.environment)
        directory = Path(tempfile.mkdtemp(prefix="engine-"))
        try:
            path = directory / "weights.safetensors"
            results |= measure(server, path, make_file(path, arguments.size), arguments.rounds)
        finally:
            shutil.rmtree(directory)
    print(f"upload {results['upload_ratio']} of the plain client, verified load {results['load_ratio']}, ", end="")
    print(f"anonymous memory of the upload {results['upload_anonymous_memory_mb']} MB")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if min(float(str(results[name])) for name in ("upload_ratio", "load_ratio")) < LEAST:
        raise SystemExit(f"less than {LEAST} of what the same server gives to the plain client")


if __name__ == "__main__":
    main()
