"""An engine run in this process: through scheduler and runner, without the services."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.fingerprint import Node
from engine.ops import REFERENCE, Step
from executor_svc import loader
from executor_svc.core import Batch, Sequence
from executor_svc.guides import Guides
from executor_svc.interpreter import Interpreter
from executor_svc.kernels import prepare, unpack
from executor_svc.loader import LoadedEngine, load_engine
from executor_svc.loop import scheduler_config
from executor_svc.node import this_node
from executor_svc.runner import Runner, TorchRunner
from executor_svc.scheduler import Scheduler


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

    def __init__(self, loaded: LoadedEngine, kv_blocks: int | None = None, guides: Guides | None = None) -> None:
        self.guides = guides
        memory = kv_blocks and kv_blocks * 16 * loaded.manifest.model.kv_bytes_per_token
        self.device = loaded.manifest.fingerprint.device
        self.runner: Any = TorchRunner(
            loaded.program, loaded.weights, loaded.manifest.limits, device=self.device, kv_memory=memory
        )
        self.scheduler = Scheduler(scheduler_config(self.runner, loaded.manifest))

    def run(self, sequences: list[Sequence]) -> None:
        """All of them at once, to their end."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        while not self.scheduler.idle:
            batch = self.scheduler.schedule()
            assert batch is not None
            if self.guides:
                self.guides.prepare(batch)
            self.runner.start(batch)
            self.scheduler.commit(batch, self.runner.finish())
            self.scheduler.check_integrity()


def load_into_main_memory(store: DirectoryStore, engine_id: str, node: Node) -> LoadedEngine:
    """An engine for a GPU, its weights where the kernels of the CPU and Triton's interpreter find them."""
    ours = loader._weights
    with patch.object(loader, "_weights", lambda store, rank, device, *rest: ours(store, rank, "cpu", *rest)):
        return load_engine(store, engine_id, node)


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


def reference_logits(loaded: LoadedEngine, tokens: list[int]) -> Tensor:
    """Of all of a sequence's tokens, computed at once by the references: float32 [tokens, vocab_size]."""
    device = next(iter(loaded.weights.values())).device
    at, blocks = torch.arange(len(tokens), device=device), -(-len(tokens) // 16)
    keys, values = (
        [
            torch.zeros(blocks, 16, kept.num_kv_heads, kept.head_dim, dtype=getattr(torch, kept.dtype), device=device)
            for kept in loaded.program.caches
        ]
        for _ in range(2)
    )
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    inputs = {"token_ids": torch.tensor(tokens, device=device).int(), "positions": at.int(), "logit_indices": at.int()}
    step = Step([len(tokens)], [len(tokens)], table, at, keys, values)
    (logits,) = Interpreter(loaded.program, loaded.weights, REFERENCE).run(inputs, step)
    return logits.float()


def shortfall(loaded: LoadedEngine, sequence: Sequence) -> Tensor:
    """By how much the references' logit of each completion token is less than their best, over their largest: [completion]."""
    logits = reference_logits(loaded, sequence.token_ids[:-1])[sequence.prompt_len - 1 :]
    tokens = torch.tensor(sequence.token_ids[sequence.prompt_len :], device=logits.device)
    return (logits.amax(1) - logits.gather(1, tokens[:, None])[:, 0]) / logits.abs().amax(1)


def random_step(
    lens: list[tuple[int, int]],
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    draw: random.Random,
    device: str = "cpu",
) -> Step:
    """A step of sequences whose pages lie anywhere in a cache of random numbers, and of NaN where nobody's keys are.

    Args:
        lens: of each sequence, tokens in this step, and those that the cache has already.
    """
    contexts = [new + old for new, old in lens]
    counts = [-(-context // 16) for context in contexts]
    total = sum(counts) + 3
    order = draw.sample(range(total), total)
    tables = torch.zeros(len(lens), -(-max(counts) // 16) * 16, dtype=torch.int32)
    caches = [torch.full((total * 16, groups, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    slots: list[int] = []
    for row, ((new, old), count) in enumerate(zip(lens, counts, strict=True)):
        blocks, order = order[:count], order[count:]
        tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        places = [blocks[at // 16] * 16 + at % 16 for at in range(old + new)]
        for cache in caches:
            cache[places[:old]] = torch.randn(old, groups, head_dim, device=device).to(dtype)
        slots += places[old:]
    keys, values = (cache.view(total, 16, groups, head_dim) for cache in caches)
    return Step(
        [new for new, _ in lens], contexts, tables.to(device), torch.tensor(slots, device=device), [keys], [values]
    )


def watch_logits(runner: Any) -> dict[tuple[int, int], torch.Tensor]:
    """Filled as a CudaRunner runs: (handle, position) -> logits [vocab_size] float32, of what samples or tells of its prompt."""
    rows: dict[tuple[int, int], torch.Tensor] = {}
    start, made = runner.start, []

    def kept(compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*arguments: Any) -> Any:
            results = compute(*arguments)
            made.append(results[0].to(torch.float32, copy=True))  # the next replay of a graph overwrites its results
            return results

        return computed

    def watched(batch: Batch) -> None:
        start(batch)
        logits = made.pop()
        sampling = [(item.sequence.handle, item.start + item.count - 1) for item in batch.items if item.samples]
        prompts = [(item.sequence.handle, position) for item in batch.items for position in item.prompt_rows]
        rows.update(zip([*sampling, *prompts], logits, strict=False))  # a graph may have room for more

    runner._run, runner._replay, runner.start = kept(runner._run), kept(runner._replay), watched
    return rows
