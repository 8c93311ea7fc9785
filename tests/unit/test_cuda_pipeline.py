"""A pipeline of CUDA runners on the CPU, by Triton's interpreter: both places in this process, a message at a time."""

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.manifest import Parallelism
from executor_svc.core import Sampling, Sequence
from executor_svc.group import Group
from executor_svc.loader import LoadedEngine, begin_load
from executor_svc.loop import scheduler_config
from executor_svc.node import this_node
from executor_svc.plans import pack
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine, run_ahead

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
cuda_runner = pytest.importorskip("executor_svc.cuda_runner")

LIMITS: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 4, "max_num_tokens": 24}


class Place(Group):
    """One of two. The second computes a step when the first waits for its tokens."""

    def __init__(self, rank: int, first: "Place | None" = None) -> None:
        super().__init__(rank, Parallelism(2, 1, 2))
        self.first = first or self
        self.runner: Any = None  # the second's
        self.plans: deque[bytes] = deque()
        self.hidden: deque[Tensor] = deque()
        self.home: deque[Tensor] = deque()
        self.kinds: list[str] = []

    def tell(self, plan: Mapping[str, Any]) -> None:
        self.plans.append(pack(plan))

    def send(self, x: Tensor) -> None:
        self.hidden.append(x.clone())

    def recv(self, columns: int, dtype: torch.dtype) -> Tensor:
        x = self.first.hidden.popleft()
        assert x.shape == (self.rows, columns) and x.dtype is dtype
        return x

    def bring_tokens(self, tokens: Tensor | None, rows: int) -> Tensor | None:
        return self._bring("tokens", tokens, rows)

    def bring_home(self, logits: Tensor | None, rows: int) -> Tensor | None:
        return self._bring("logits", logits, rows)

    def _bring(self, kind: str, values: Tensor | None, rows: int) -> Tensor | None:
        if self.rank:
            assert values is not None
            self.first.home.append(values[:rows].clone())
            return None
        if rows:  # not of a prompt that goes on
            self.kinds.append(kind)
        self.runner.follow(self.plans.popleft())
        return self.home.popleft()


def place(store: DirectoryStore, engine_id: str, group: Place) -> tuple[LoadedEngine, Any]:
    loaded = begin_load(store, engine_id, this_node("cpu"), which=lambda _: group.rank)
    with loaded.arriving:
        pass
    limits = loaded.manifest.limits
    runner = cuda_runner.CudaRunner(
        loaded.program, loaded.weights, limits, kv_memory=1 << 20, device="cpu", group=group
    )
    return loaded, runner


def test_gives_one_ranks_tokens_and_sends_no_logits_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But of rows that are edited on the host. A batch more is in flight than there are places."""
    monkeypatch.setattr("executor_svc.kernels.decodes.SPLITS_FOR", 8)
    checkpoint, store = save_checkpoint(tmp_path / "model", num_hidden_layers=2), DirectoryStore(tmp_path / "store")
    engine_id = build(checkpoint, BuildConfig(device="cpu", pp_size=2, **LIMITS), store=store).manifest.engine_id
    first = Place(0)
    second = Place(1, first)
    _, first.runner = place(store, engine_id, second)
    loaded, runner = place(store, engine_id, first)
    assert runner.capabilities.max_in_flight == 3

    def work(edited: bool) -> list[Sequence]:
        made = []
        for number in range(2 if edited else 3):
            prompt = [(7 * number + 3 * at) % 60 for at in range(5 + 12 * number)]
            sampling = Sampling(0.8 if number % 2 else 0.0, seed=number, repetition_penalty=1.3 if edited else 1.0)
            made.append(Sequence(0, number, prompt, len(prompt), 4, sampling))
        return made

    one = make_engine(checkpoint, tmp_path / "one", prepared=False, **LIMITS)
    for edited, kinds in ((False, {"tokens"}), (True, {"logits"})):
        expected, found = work(edited), work(edited)
        Engine(one).run(expected)
        first.kinds.clear()
        run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), found)
        assert set(first.kinds) == kinds
        assert [sequence.token_ids for sequence in found] == [sequence.token_ids for sequence in expected]
    assert not (first.plans or first.hidden or first.home)
