"""All ranks of an engine in one process: a thread each, with collectives in memory over the operators' references."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Queue
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from engine import blobs
from engine.manifest import Manifest
from engine.ops import REFERENCE, Step
from engine.opset import OPERATORS
from engine.program import ROPE_LENGTHS, Program
from engine.store import Store
from executor_svc import kernels
from executor_svc.interpreter import Interpreter

PATIENCE = 60.0  # seconds, after which a rank that the others wait for is lost


class Stage:
    """Where the ranks of a tensor-parallel group meet."""

    def __init__(self, tp_size: int) -> None:
        self._barrier, self._given = threading.Barrier(tp_size), [torch.empty(0)] * tp_size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What each of them gives."""
        self._given[rank] = x
        self._barrier.wait(PATIENCE)
        found = list(self._given)
        self._barrier.wait(PATIENCE)
        return found


class ThreadGroup:
    """One rank's view of the others (`engine.ops.Group`)."""

    def __init__(self, stage: Stage, rank: int, before: "Queue[Tensor]", behind: "Queue[Tensor]") -> None:
        self._stage, self._rank, self._before, self._behind = stage, rank, before, behind

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._stage.exchange(self._rank, x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._stage.exchange(self._rank, x), -1)

    def send(self, x: Tensor) -> None:
        self._behind.put(x)

    def recv(self, columns: int, dtype: torch.dtype) -> Tensor:
        x = self._before.get(timeout=PATIENCE)
        assert (x.shape[1], x.dtype) == (columns, dtype)
        return x


def rank_weights(store: Store, manifest: Manifest, rank: int) -> dict[str, Tensor]:
    """The weights of one rank, of its own files alone."""
    found: dict[str, Tensor] = {}
    for file in manifest.ranks[rank].weights:
        found |= load(blobs.read(store, file))
    return found


def rank_program(store: Store, manifest: Manifest, rank: int) -> Program:
    """The program of one rank."""
    return Program.from_json(blobs.read(store, manifest.ranks[rank].program))


def run_ranks(
    store: Store, manifest: Manifest, tokens: list[int], steps: list[int], *, prepared: bool = False
) -> list[Tensor]:
    """A sequence through all ranks, so many tokens a step.

    Args:
        prepared: by the CPU's own operators, with weights as these take them, instead of the references.

    Returns:
        The logits [tokens, vocab_size] as each rank of the last stage has them.
    """
    mapping = manifest.mapping
    stages = [Stage(mapping.tp_size) for _ in range(mapping.pp_size)]
    pipes: list[Queue[Tensor]] = [Queue() for _ in range(mapping.world_size + mapping.tp_size)]

    def run(rank: int) -> Tensor | None:
        stage, place = divmod(rank, mapping.tp_size)
        group = ThreadGroup(stages[stage], place, pipes[rank], pipes[rank + mapping.tp_size])
        program, weights = rank_program(store, manifest, rank), rank_weights(store, manifest, rank)
        assert weights.keys() == program.weights.keys()
        for name, declared in program.weights.items():
            assert (str(weights[name].dtype), tuple(weights[name].shape)) == (f"torch.{declared.dtype}", declared.shape)
        if not prepared:
            return _run(program, weights, REFERENCE, group, tokens, steps)
        program, weights = kernels.unpack("cpu", program, weights)
        weights = kernels.prepare("cpu", program, weights)
        return _run(program, weights, kernels.implementations("cpu"), group, tokens, steps)

    with ThreadPoolExecutor(mapping.world_size) as pool:
        found = list(pool.map(run, range(mapping.world_size)))
    last = found[-mapping.tp_size :]
    assert all(part is None for part in found[: -mapping.tp_size])
    return [part for part in last if part is not None]


def _run(
    program: Program,
    weights: dict[str, Any],
    operators: dict[str, Any],
    group: ThreadGroup,
    tokens: list[int],
    steps: list[int],
) -> Tensor | None:
    bound = {name: partial(operators[name], group=group) for name, spec in OPERATORS.items() if spec.uses_group}
    interpreter = Interpreter(program, weights, {**operators, **bound})
    blocks = -(-len(tokens) // 16)
    keys, values = (
        [
            torch.zeros(blocks, 16, kept.num_kv_heads, kept.head_dim, dtype=getattr(torch, kept.dtype))
            for kept in program.caches
        ]
        for _ in range(2)
    )
    table, start, made = torch.arange(blocks, dtype=torch.int32)[None], 0, []
    for count in steps:
        at = torch.arange(start, start + count)
        inputs = {
            "token_ids": torch.tensor(tokens[start : start + count]).int(),
            "positions": at.int(),
            "logit_indices": torch.arange(count).int(),
            ROPE_LENGTHS: torch.full((count,), len(tokens)).int(),
        }
        with torch.inference_mode():
            made += interpreter.run(inputs, Step([count], [start + count], table, at, keys, values))
        start += count
    return torch.cat(made) if made else None
