"""An engine run in this process: through scheduler and runner, without the services."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from executor_svc.core import Batch, Sequence
from executor_svc.kernels import prepare, unpack
from executor_svc.loader import LoadedEngine, load_engine
from executor_svc.runner import Runner, TorchRunner
from executor_svc.scheduler import Scheduler
from executor_svc.worker import scheduler_config, this_node


def make_engine(
    checkpoint: Path, store: Path, device: str = "cpu", *, prepared: bool = True, **options: Any
) -> LoadedEngine:
    """Built and loaded, its weights on the device, and as its operators take them if they are to be prepared."""
    directory = DirectoryStore(store)
    built = build(checkpoint, BuildConfig(device=device, **options), store=directory)
    loaded = load_engine(directory, built.manifest.engine_id, this_node(device))
    if not prepared:
        return loaded
    program, weights = unpack(device, loaded.program, loaded.weights)
    return replace(loaded, program=program, weights=prepare(device, program, weights))


class Engine:
    """A runner and its scheduler, which keep their cache from one call to the next."""

    def __init__(self, loaded: LoadedEngine, kv_blocks: int | None = None) -> None:
        memory = kv_blocks and kv_blocks * 16 * loaded.manifest.model.kv_bytes_per_token
        device = loaded.manifest.fingerprint.device
        self.runner = TorchRunner(
            loaded.program, loaded.weights, loaded.manifest.limits, device=device, kv_memory=memory
        )
        self.scheduler = Scheduler(scheduler_config(self.runner, loaded.manifest))

    def run(self, sequences: list[Sequence]) -> None:
        """All of them at once, to their end."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        while not self.scheduler.idle:
            batch = self.scheduler.schedule()
            assert batch is not None
            self.runner.start(batch)
            self.scheduler.commit(batch, self.runner.finish())
            self.scheduler.check_integrity()


def run_ahead(runner: Runner, scheduler: Scheduler, work: list[Sequence]) -> None:
    """As the worker does: batches are started while earlier ones are under way."""
    started: deque[Batch] = deque()
    for sequence in work:
        scheduler.add(sequence)
    while not scheduler.idle:
        while batch := scheduler.schedule():
            runner.start(batch)
            started.append(batch)
        scheduler.commit(started.popleft(), runner.finish())
    scheduler.check_integrity()
