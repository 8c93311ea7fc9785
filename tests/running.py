"""An engine run in this process: through scheduler and runner, without the services."""

from pathlib import Path
from typing import Any

import torch

from builder_svc.options import BuildOptions
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.fingerprint import Node
from executor_svc.core import Sequence
from executor_svc.loader import LoadedEngine, load_engine
from executor_svc.runner import TorchRunner
from executor_svc.scheduler import Scheduler
from executor_svc.worker import scheduler_config


def make_engine(checkpoint: Path, store: Path, **options: Any) -> LoadedEngine:
    """Built and loaded, on the CPU."""
    directory = DirectoryStore(store)
    built = build(checkpoint, directory, BuildOptions(**options))
    return load_engine(directory, built.manifest.engine_id, Node("cpu", {"torch": torch.__version__}))


class Engine:
    """A runner and its scheduler, which keep their cache from one call to the next."""

    def __init__(self, loaded: LoadedEngine, kv_blocks: int | None = None) -> None:
        memory = kv_blocks and kv_blocks * 16 * loaded.manifest.model.kv_bytes_per_token
        self.runner = TorchRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=memory)
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
