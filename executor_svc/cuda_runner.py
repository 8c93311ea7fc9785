"""The runner for CUDA: decodes are replayed graphs, tokens stay on the device, and the host is a step ahead.

A step in the stream: its columns come from a pinned buffer; `stage` fills in tokens that only the device knows, and finds each
token's row of the cache; the program runs; a token of each row is drawn and kept by table row, where the next step finds it,
and sent to the host. Nothing waits for the host but batches with a row whose logits are edited, or of which more is told.
In a pipeline the first place gets tokens from the last (`first_place.py`).
"""

import functools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.manifest import Limits
from engine.program import ROPE_LENGTHS, Program
from executor_svc.core import Batch, Sampled
from executor_svc.cuda_graphs import Graph, memory, shapes
from executor_svc.cuda_host import HostMemory
from executor_svc.cuda_layout import NOTHING, CudaLayout, HostStep, Shape, draws, largest
from executor_svc.first_place import FirstPlace
from executor_svc.group import ALONE, Group, bind
from executor_svc.interpreter import Interpreter
from executor_svc.kernels import fp8, implementations
from executor_svc.kernels.fuse import fuse, rounds_to
from executor_svc.kernels.gpu import DeviceStep
from executor_svc.kernels.logit_keys import WIDTH
from executor_svc.kernels.sample import sample
from executor_svc.kernels.stage import choose, keep, put, stage
from executor_svc.kernels.tactics import RULE, Table
from executor_svc.kernels.target import roomy
from executor_svc.peers import open_buffers, summing
from executor_svc.plans import unpack
from executor_svc.prompt_rows import MAX_PROMPT_ROWS
from executor_svc.rope_lengths import rope_lengths
from executor_svc.runner import BLOCK_SIZE, Capabilities, cache_blocks, caches
from executor_svc.sampler import answer

IN_FLIGHT = 2
_KV_SHARE = 0.9  # of what weights, graphs and the largest step leave free; the rest is the libraries'
_VOCABULARY = 1 << 19  # what drawing sums exactly


@dataclass
class _Flight:
    """A batch that was started.

    Attributes:
        tokens: int32, on the host, there when the event has passed.
        sampled: of one that had to wait for its tokens, these.
        batch: of one that is answered when it is finished; then `tokens` are logits, of another rank.
    """

    tokens: Tensor
    event: Any = None
    sampled: Sampled | None = None
    batch: Batch | None = None


class CudaRunner:
    """Interprets a program on a GPU.

    Of several ranks, rank 0's is used as any runner, and the others' `follow`. In a tensor-parallel group all ranks have the same
    logits and draw the same tokens. Each place of a pipeline works on a batch of its own. The last one sends its tokens to the
    first, where they wait for the step that takes them; or logits, if they are to be edited or told of, to rank 0.

    Args:
        program: one that `takes` takes.
        weights: by the program's names, on the device.
        kv_memory: bytes of KV cache a rank; by default what max_batch_size sequences of max_seq_len need, but at most kv_share of
            the memory that is free and that steps do not take.
        kv_share: in [0, 1], where 0 is too little for anything; by default 0.9.
        table: tactics of products; by default the rule's.
        device: "cuda", or "cpu" where Triton interprets its kernels; then there are no graphs.
        group: the ranks that run the engine.

    Raises:
        FailedPrecondition: too little memory for one sequence of max_seq_len.
    """

    def __init__(
        self,
        program: Program,
        weights: dict[str, Any],
        limits: Limits,
        *,
        kv_memory: int | None = None,
        kv_share: float | None = None,
        table: Table = RULE,
        device: str = "cuda",
        group: Group = ALONE,
    ) -> None:
        self._group = group
        self._device = torch.device(device)
        self._on_gpu = device == "cuda"
        rope = rope_lengths(program)
        operators = bind(implementations("gpu"), group)
        for name in ("linear", "linear_silu_mul", "linear_int4", "linear_int8", "product_fp8", "product_int8"):
            operators[name] = functools.partial(operators[name], table=table)
        buffers = open_buffers(program, group, limits.max_num_tokens, self._device)
        if buffers:
            operators |= summing(buffers, group)
        fused = fuse(program, sums=buffers is not None)
        self._interpreter = Interpreter(fused, weights, operators)
        per_sequence = -(-limits.max_seq_len // BLOCK_SIZE)
        # one block more takes the keys of rows that only fill a graph up
        in_flight = group.pp_size - 1 + IN_FLIGHT
        home = in_flight * 4 * group.agree_on_logits(program) * (limits.max_batch_size + MAX_PROMPT_ROWS)
        steps = memory(fused, limits) + home
        share = _KV_SHARE if kv_share is None else kv_share
        capped = kv_share is not None
        num_blocks = group.least(
            cache_blocks(program, limits, device, kv_memory, share, spare=1, steps=steps, capped=capped)
        )
        self._k, self._v = caches(program, num_blocks + 1, device)
        rows = limits.max_batch_size + 1  # the last one is the fill's
        self._fill_row = rows - 1
        self._tables = torch.zeros(rows, per_sequence, dtype=torch.int32, device=self._device)
        self._tables[self._fill_row] = num_blocks
        self._last = torch.zeros(rows, dtype=torch.int32, device=self._device)
        groups = max(cache.num_kv_heads for cache in program.caches)
        self._arrived = torch.zeros(rows * groups, dtype=torch.int32, device=self._device)
        self._by_length = ROPE_LENGTHS in program.inputs
        self._layout = CudaLayout(limits.max_batch_size, per_sequence, rope_lengths=self._by_length)
        self._flights: deque[_Flight] = deque()
        self._host = HostMemory(self._device, in_flight, max(limits.max_num_tokens, rows) * 12 + 4096, rows)
        self._piped = group.pp_size > 1
        self._first = FirstPlace(group, self._host, self._last) if self._piped and group.rank < group.tp_size else None
        self.capabilities = Capabilities(
            num_blocks,
            BLOCK_SIZE,
            future_tokens=True,
            max_in_flight=in_flight,
            places=group.pp_size,
            overlaps=True,
            rope=rope,
        )
        self.graphs = self._capture(limits)

    @staticmethod
    def takes(program: Program) -> bool:
        """Whether it can run it: activations of 16 bits, keys and values of 16 or 8, heads whose tiles shared memory holds.

        Of float8 on Hopper and later; on GPUs with little shared memory nothing.
        """
        floats = {value.type.dtype for op in program.ops if op.op == "attention" for value in op.outputs}
        caches = {cache.dtype for cache in program.caches}
        halves = {"bfloat16", "float16"}
        small = "float8_e4m3fn" in caches or any(rounds_to(op, program) == "fp8" for op in program.ops)
        known = floats <= halves and caches <= {*halves, "float8_e4m3fn", "int8"} and (not small or fp8.able())
        logits = [value.type for op in program.ops for value in op.outputs if value.name in program.outputs]
        small_vocabulary = all(int(kind.shape[-1]) < _VOCABULARY for kind in logits)
        held = all(cache.head_dim <= 256 for cache in program.caches) and small_vocabulary
        return known and held and roomy()

    @torch.inference_mode()
    def start(self, batch: Batch) -> None:
        layout, logits, sampled = self._launch(batch)
        if self._first:
            received = self._first.receive(layout, drawn=batch.drawn)
            self._flights.append(_Flight(*received, batch=None if batch.drawn else batch))
        elif batch.drawn:
            self._flights.append(_Flight(*self._host.fetch(sampled[: len(layout.samples)])))
        else:
            found = answer(logits[: layout.num_logits].float(), batch)
            self._keep(layout, self._host.column(np.array(found.token_ids, dtype=np.int32)))
            self._flights.append(_Flight(sampled[:0], sampled=found))

    def _launch(self, batch: Batch) -> tuple[HostStep, Tensor, Tensor]:
        """A batch's columns, its logits and tokens."""
        layout = self._layout.lay_out(batch)
        items = [item for item in batch.items if item.samples]
        random = draws(items, layout.sampling_rows) if batch.drawn else NOTHING
        limited = len(random) > 0 and any(item.sequence.sampling.limited for item in items)
        self._group.tell(
            {**vars(layout), "random": random, "drawn": batch.drawn, "limited": limited, "apart": batch.apart}
        )
        return layout, *self._compute_step(layout, random, limited=limited, apart=batch.apart)

    @torch.inference_mode()
    def follow(self, plan: bytes) -> None:
        """Computes this rank's part of a step that rank 0 has started."""
        values = unpack(plan)
        random, drawn, limited, apart = (values.pop(name) for name in ("random", "drawn", "limited", "apart"))
        layout = HostStep(**values)
        logits, sampled = self._compute_step(layout, random, limited=limited, apart=apart)
        count = len(layout.samples)
        if self._first:
            self._first.receive(layout, drawn=drawn)
        elif self._piped and drawn:
            self._group.bring_tokens(sampled[:count], count)
        elif self._piped:
            self._group.bring_home(logits, layout.num_logits)
        elif not drawn:
            self._keep(layout, torch.empty(count, dtype=torch.int32, device=self._device))

    def _compute_step(
        self, layout: HostStep, random: np.ndarray, *, limited: bool, apart: int
    ) -> tuple[Tensor, Tensor]:
        """A step's logits and the tokens of its samples, the most probable ones but where `random` says otherwise.

        A place of a pipeline that has no logits has no tokens.
        """
        if self._first:
            self._first.wait(apart)
        graph = next((graph for graph in self.graphs if graph.shape.fits(layout)), None)
        logits, sampled, moved = self._replay(graph, layout, random) if graph else self._run(layout, random)
        if len(random) and logits.dim() > 1:
            count = len(layout.samples)
            self._sample(logits[:count], sampled[:count], moved, limited=limited)
        return logits, sampled

    def _keep(self, layout: HostStep, tokens: Tensor) -> None:
        """Keeps tokens that rank 0 has chosen."""
        if len(tokens):
            keep(self._last, self._host.column(layout.sampling_rows), self._group.from_leader(tokens))

    def finish(self) -> Sampled:
        flight = self._flights.popleft()
        if flight.sampled is not None:
            return flight.sampled
        if flight.event is not None:
            flight.event.synchronize()
        if self._first and flight.batch is not None:
            return self._first.answer(flight.tokens, flight.batch)
        return Sampled(flight.tokens.tolist())

    def _run(self, layout: HostStep, random: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """A step of any shape, operator by operator: logits of its samples and prompt rows, the best tokens; and `random`."""
        begins = layout.begins
        tiles = [column for chosen in (None, begins, ~begins) for column in layout.tiles(chosen)]
        parts = [
            layout.tokens, layout.positions, layout.token_rows, layout.rows, layout.starts, layout.lengths,
            layout.samples, layout.prompt_rows, layout.sampling_rows, layout.updates.reshape(-1), layout.rope_lengths, *tiles,
        ]  # fmt: skip
        moved, *columns = self._host.send(random, *parts)
        tokens, positions, token_rows, seq_rows, starts, lengths = columns[:6]
        samples, prompt_rows, sampling_rows, updates, lengths_of_rope = columns[6:11]
        put(self._tables, updates)
        token_ids, slots = stage(tokens, positions, token_rows, self._last, self._tables, BLOCK_SIZE)
        step = self._step(slots, layout.num_decodes, seq_rows, lengths, starts[layout.num_decodes :], *columns[11:])
        logits = self._logits(token_ids, positions, torch.cat((samples, prompt_rows)), lengths_of_rope, step)
        return logits, self._choose(logits[: len(samples)], sampling_rows), moved

    def _replay(self, graph: Graph, layout: HostStep, random: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        columns = graph.shape.fill(layout)
        rest = layout.updates[graph.shape.updates :].reshape(-1)  # a sequence that comes back brings many blocks
        pinned = self._host.pin(columns, random, rest)
        moved, updates = pinned[len(columns) :].to(self._device, non_blocking=True).split([len(random), len(rest)])
        put(self._tables, updates)
        return *graph.run(pinned[: len(columns)]), moved

    def _sample(self, logits: Tensor, sampled: Tensor, random: Tensor, *, limited: bool) -> None:
        """Draws tokens in place of the most probable ones, as `random` says, and keeps them."""
        settings, rows = random.split((len(sampled) * WIDTH, len(sampled)))
        sample(logits, sampled, settings, limited=limited)
        keep(self._last, rows, sampled)

    def _compute(self, columns: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """What a graph holds."""
        tokens, positions, token_rows, rows, lengths, starts, *rest = columns.split(shape.sizes)
        samples, sampling_rows, tile_rows, tile_first, updates, lengths_of_rope = rest
        put(self._tables, updates)
        token_ids, slots = stage(tokens, positions, token_rows, self._last, self._tables, BLOCK_SIZE)
        step = self._step(slots, shape.decodes, rows, lengths, starts, tile_rows, tile_first)
        logits = self._logits(token_ids, positions, samples, lengths_of_rope, step)
        return logits, self._choose(logits, sampling_rows)

    def _choose(self, logits: Tensor, sampling_rows: Tensor) -> Tensor:
        """The most probable tokens, which are kept; none where there are no logits."""
        return choose(logits, sampling_rows, self._last) if logits.dim() > 1 else self._last[:0]

    def _logits(
        self, token_ids: Tensor, positions: Tensor, indices: Tensor, rope_lengths: Tensor, step: DeviceStep
    ) -> Tensor:
        """The program's, [len(indices), vocab_size]; of a place in a pipeline that has none, nothing."""
        self._group.rows = len(token_ids)
        inputs = {"token_ids": token_ids, "positions": positions, "logit_indices": indices}
        if self._by_length:
            inputs[ROPE_LENGTHS] = rope_lengths
        results = self._interpreter.run(inputs, step)
        return results[0] if results else self._last[:0]

    @torch.inference_mode()
    def _capture(self, limits: Limits) -> list[Graph]:
        """Graphs for a ladder of decodes, then of decodes with prompts, the smallest first; then runs what none holds."""
        graphs = []
        for decodes, tokens in shapes(limits):
            shape = Shape(
                decodes, tokens, limits.max_batch_size, BLOCK_SIZE, self._fill_row, rope_lengths=self._by_length
            )
            columns = torch.from_numpy(np.concatenate(shape.empty())).to(self._device)
            graphs.append(Graph(shape, columns, functools.partial(self._compute, columns, shape)))
        if self._on_gpu:
            pool = torch.cuda.graph_pool_handle()
            for graph in reversed(graphs):  # the largest first, whose memory the others then share
                graph.capture(pool)
            self.walk(largest(limits))
            torch.cuda.synchronize()
        return graphs

    @torch.inference_mode()
    def walk(self, steps: Iterable[HostStep]) -> None:
        """Runs steps that no graph holds, and draws the tokens of each: so all is compiled, and its memory is there.

        Args:
            steps: of `trial`; they are the fill's, and leave nothing behind.
        """
        for step in steps:
            filled = step.of_row(self._fill_row)
            logits, sampled, _ = self._run(filled, NOTHING)
            if logits.dim() == 1:  # it has none
                continue
            count = len(filled.samples)
            greedy = torch.zeros(count * (WIDTH + 1), dtype=torch.int32)
            greedy[count * WIDTH :] = self._fill_row
            self._sample(logits[:count], sampled, greedy.to(self._device), limited=True)

    def _step(
        self, slots: Tensor, num_decodes: int, rows: Tensor, lengths: Tensor, starts: Tensor, *columns: Tensor
    ) -> DeviceStep:
        """columns: sequences and first queries of all tiles, and where known of the fresh and of the cached ones."""
        pairs = zip(columns[::2], columns[1::2], strict=True)
        tiles = [pair if len(pair[0]) else None for pair in pairs]
        return DeviceStep(
            [], [], self._tables, slots, self._k, self._v, num_decodes, rows, lengths, self._arrived, starts, *tiles
        )
