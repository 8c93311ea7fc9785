"""What the benchmarks on a GPU share: an engine in this process, a loop over it, and what is written down beside results."""

import json
import os
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry
from engine.directory import DirectoryStore
from engine.manifest import Manifest
from executor_svc.core import Batch, Sequence
from executor_svc.group import ALONE, Group
from executor_svc.kernels import prepare, unpack
from executor_svc.loader import begin_load
from executor_svc.loop import scheduler_config
from executor_svc.meeting import meet
from executor_svc.node import this_node
from executor_svc.runner import Runner, TorchRunner
from executor_svc.scheduler import Scheduler


@dataclass
class Loaded:
    """An engine of a directory store, and a runner of it.

    Attributes:
        seconds: that tuning and making the runner took.
        tactics: that were measured, of products.
    """

    store: DirectoryStore
    manifest: Manifest
    runner: Any
    weight_bytes: int
    seconds: tuple[float, float]
    group: Group
    tactics: dict[Any, Any]


def build_dummy(model: Path, store: Path, *, layers: int | None = None, **options: Any) -> str:
    """The id of an engine with dummy weights, of a directory with a config.json; with fewer layers if that is asked for."""
    with tempfile.TemporaryDirectory() as place:
        if layers:
            config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": layers}
            model = Path(place)
            (model / "config.json").write_text(json.dumps(config))
        return build(model, BuildConfig(dummy_weights=True, **options), store=DirectoryStore(store)).manifest.engine_id


def load(
    store: Path, engine_id: str, *, kv_blocks: int | None = None, cuda_runner: bool | None = None, tuned: bool = False
) -> Loaded:
    """Loads an engine into this process as a worker does.

    Args:
        kv_blocks: of the cache; by default what the runner takes.
        cuda_runner: by default on CUDA. On the CPU it needs TRITON_INTERPRET=1, and is slow.
        tuned: whether tactics are measured first, as a builder does.
    """
    directory = DirectoryStore(store)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group = ALONE
    if "RANK" in os.environ:  # of several that torchrun has started
        group = meet(registry.manifest(directory, engine_id), device, 300)
    loaded = begin_load(directory, engine_id, this_node(device), which=lambda _: group.rank)
    with loaded.arriving:
        pass
    manifest, weights = loaded.manifest, loaded.weights
    size, began = sum(weight.nbytes for weight in weights.values()), time.perf_counter()
    ready = began
    memory = kv_blocks and (kv_blocks + 1) * 16 * manifest.model.kv_bytes_per_token
    table: dict[Any, Any] = {}
    runner: Runner
    if device == "cuda" if cuda_runner is None else cuda_runner:
        from executor_svc.cuda_runner import CudaRunner
        from executor_svc.kernels.fuse import fuse
        from executor_svc.kernels.tuning import tune

        if tuned:
            table = tune(fuse(loaded.program), manifest.limits)
        ready = time.perf_counter()
        runner = CudaRunner(
            loaded.program, weights, manifest.limits, kv_memory=memory, table=table, device=device, group=group
        )
    else:
        program, weights = unpack(device, loaded.program, weights)
        prepared = prepare(device, program, weights)
        runner = TorchRunner(program, prepared, manifest.limits, device=device, kv_memory=memory, group=group)
    took = ready - began, time.perf_counter() - ready
    return Loaded(directory, manifest, runner, size, took, group, table)


def run(loaded: Loaded, work: list[Sequence], ended: Callable[[Batch], None] = lambda _: None) -> float:
    """Seconds in which all sequences run to their end, from an empty cache.

    Args:
        ended: called with each batch when its tokens are known.
    """
    scheduler = Scheduler(scheduler_config(loaded.runner, loaded.manifest, max_waiting=1 << 20))
    started: deque[Batch] = deque()
    began = time.perf_counter()
    for sequence in work:
        scheduler.add(sequence)
    while not scheduler.idle:
        while batch := scheduler.schedule():
            loaded.runner.start(batch)
            started.append(batch)
        batch = started.popleft()
        scheduler.commit(batch, loaded.runner.finish())
        ended(batch)
    return time.perf_counter() - began


def facts() -> dict[str, str]:
    """Date, device, commit and torch's version; the commit is $COMMIT where git knows none."""
    commit = ""
    with suppress(OSError):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit or os.environ.get("COMMIT", "unknown"),
        "torch": torch.__version__,
    }


def save(out: Path | None, found: dict[str, Any]) -> None:
    """Writes what was found, and the facts, as JSON."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(facts() | found, indent=1, ensure_ascii=False) + "\n")
