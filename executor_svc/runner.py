"""What computes a batch. A runner is thin: it declares what it can, takes a batch and gives what was sampled."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.errors import FailedPrecondition, Internal
from engine.manifest import Limits
from engine.ops import Step
from engine.program import ROPE_LENGTHS, KVCache, Program
from executor_svc import memory
from executor_svc.budget import BLOCK_SIZE, available
from executor_svc.core import Batch, Sampled
from executor_svc.group import ALONE, Group, bind
from executor_svc.interpreter import Interpreter
from executor_svc.kernels import implementations
from executor_svc.layout import Layout, StepLayout
from executor_svc.plans import unpack
from executor_svc.rope_lengths import RopeLengths, rope_lengths
from executor_svc.sampler import answer

KV_SHARE = 0.5  # of the free memory, where nobody says how much


@dataclass(frozen=True)
class Capabilities:
    """What a runner declares.

    Attributes:
        num_blocks, block_size: of the cache that it has allocated. A runner of slots has blocks as long as a sequence may be.
        mixed_batches: whether a batch may hold prompts and decodes.
        prefix_cache: whether sequences may share blocks.
        future_tokens: whether it can take as input what a batch in flight is still sampling (see SchedulerConfig).
        max_in_flight: batches that may be started before the first is finished.
        places: of a pipeline.
        overlaps: whether `start` returns before the batch is computed, so that the worker can do other work meanwhile.
        rope: what its program says of rotary frequencies that depend on a sequence's length.
    """

    num_blocks: int
    block_size: int
    mixed_batches: bool = True
    prefix_cache: bool = True
    future_tokens: bool = False
    max_in_flight: int = 1
    places: int = 1
    overlaps: bool = False
    rope: RopeLengths | None = None


class Runner(Protocol):
    """Batches are finished in the order in which they were started."""

    capabilities: Capabilities

    def start(self, batch: Batch) -> None:
        """Begins to compute a batch."""

    def finish(self) -> Sampled:
        """Waits for the oldest batch that was started: a token for each of its items that samples, and its log-probabilities."""


class TorchRunner:
    """Interprets the program with torch. On the CPU a batch is computed when it is started.

    Of several ranks, rank 0's is used as any runner, and the others' `follow`. Each place of a pipeline has a batch of its own.
    """

    def __init__(
        self,
        program: Program,
        weights: dict[str, Any],
        limits: Limits,
        *,
        device: str = "cpu",
        kv_memory: int | None = None,
        kv_share: float | None = None,
        operators: dict[str, Callable[..., Any]] | None = None,
        group: Group = ALONE,
    ) -> None:
        """Allocates the KV cache, once.

        Args:
            weights: by the program's names, on the device, as `kernels.prepare` gives them.
            kv_memory: bytes of KV cache a rank; by default what max_batch_size sequences of max_seq_len need, but at most
                kv_share of the memory that is free.
            kv_share: in [0, 1]; by default half, divided among the ranks that have the same memory. Given, it bounds kv_memory.
            operators: implementations to use instead of the device's.
            group: the ranks that run the engine.

        Raises:
            FailedPrecondition: that is too little for one sequence of max_seq_len.
            Unimplemented: the program's layers differ in what a sequence's length does to them.
        """
        rope = rope_lengths(program)
        self._group = group
        self._interpreter = Interpreter(program, weights, bind(operators or implementations(device), group))
        self._device = torch.device(device)
        self._started: deque[tuple[Batch, int, Tensor | None]] = deque()
        per_sequence = -(-limits.max_seq_len // BLOCK_SIZE)
        share = (KV_SHARE if kv_share is None else kv_share) / (group.here if device == "cpu" else 1)
        num_blocks = group.least(cache_blocks(program, limits, device, kv_memory, share, capped=kv_share is not None))
        self._k, self._v = caches(program, num_blocks, device)
        self._inputs = tuple(program.inputs)
        self._layout = Layout(
            limits.max_batch_size, per_sequence, BLOCK_SIZE, rope_lengths=ROPE_LENGTHS in program.inputs
        )
        group.agree_on_logits(program)
        places = group.pp_size
        self.capabilities = Capabilities(num_blocks, BLOCK_SIZE, max_in_flight=places, places=places, rope=rope)

    @torch.inference_mode()
    def start(self, batch: Batch) -> None:
        layout = self._layout.lay_out(batch)
        self._group.tell(vars(layout))
        self._started.append((batch, len(layout.logit_indices), self._logits(layout)))

    @torch.inference_mode()
    def finish(self) -> Sampled:
        batch, rows, logits = self._started.popleft()
        logits = self._group.bring_home(logits, rows)
        if logits is None:
            raise Internal("rank 0 has no logits")
        return answer(logits, batch)

    @torch.inference_mode()
    def follow(self, plan: bytes) -> None:
        """Computes this rank's part of a step that rank 0 has started."""
        values = unpack(plan).items()
        layout = StepLayout(
            **{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in values}
        )
        self._group.bring_home(self._logits(layout), len(layout.logit_indices))

    def _logits(self, layout: StepLayout) -> Tensor | None:
        """[items that sample + prompt_rows of all items, vocab_size], float32; None on a rank that has none."""
        self._group.rows = len(layout.token_ids)
        step = Step(
            query_lens=layout.query_lens,
            context_lens=layout.context_lens,
            block_tables=layout.block_tables.to(self._device),
            slots=layout.slots.to(self._device),
            k_caches=self._k,
            v_caches=self._v,
        )
        inputs = {name: getattr(layout, name).to(self._device) for name in self._inputs}
        results = self._interpreter.run(inputs, step)
        return results[0].float() if results else None


def cache_blocks(
    program: Program,
    limits: Limits,
    device: str,
    kv_memory: int | None,
    kv_share: float,
    spare: int = 0,
    steps: int = 0,
    *,
    capped: bool = False,
) -> int:
    """How many blocks the KV cache has.

    Args:
        kv_memory: bytes; None is what max_batch_size sequences of max_seq_len need, at most kv_share of the free memory.
        spare: blocks that are no sequence's, and not counted.
        steps: bytes of the free memory that steps will take.
        capped: whether kv_memory, too, is at most kv_share of the free memory.

    Raises:
        FailedPrecondition: less than one sequence of max_seq_len needs.
    """
    block_bytes = BLOCK_SIZE * sum(cache.bytes_per_token for cache in program.caches)
    per_sequence = -(-limits.max_seq_len // BLOCK_SIZE)
    if kv_memory is None or capped:
        most = (limits.max_batch_size * per_sequence + spare) * block_bytes if kv_memory is None else kv_memory
        kv_memory = min(most, int(kv_share * max(0, free_memory(device) - steps)))
    num_blocks = max(kv_memory // block_bytes - spare, 0)
    if num_blocks < per_sequence:
        raise FailedPrecondition(
            f"{kv_memory >> 20} MiB of KV cache hold {num_blocks * BLOCK_SIZE} tokens, less than one sequence of "
            f"{limits.max_seq_len}: start the executor with --kv-memory {(per_sequence + spare) * block_bytes} or more, or "
            "build the engine with a smaller --max-seq-len",
            reason="KV_MEMORY_TOO_SMALL",
        )
    return num_blocks


def caches(program: Program, num_blocks: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each of the program's caches, [num_blocks, BLOCK_SIZE, num_kv_heads, head_dim]."""
    keys, values = ([_cache(spec, num_blocks, device) for spec in program.caches] for _ in range(2))
    return keys, values


def _cache(spec: KVCache, num_blocks: int, device: str) -> Tensor:
    """[num_blocks, BLOCK_SIZE, num_kv_heads, head_dim] zeros."""
    shape, dtype = (num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim), getattr(torch, spec.dtype)
    if device == "cpu":
        return memory.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def free_memory(device: str) -> int:
    """Bytes of the device's memory that nobody uses; on the CPU, that can be had without swapping."""
    if device == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free
    return available()
