"""The runner for CUDA: decodes are replayed graphs, tokens stay on the device, and the host is a step ahead.

A step in the stream: its columns come from a pinned buffer; `stage` fills in tokens that only the device knows, and finds each
token's row of the cache; the program runs; the most probable tokens are kept by table row, where the next step finds them,
and sent to the host. Nothing waits for the host but rows that want more than the most probable token.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.manifest import Limits
from engine.program import Program
from executor_svc.core import Batch, Sampled
from executor_svc.cuda_layout import CudaLayout, HostStep
from executor_svc.interpreter import Interpreter
from executor_svc.kernels import implementations
from executor_svc.kernels.fuse import fuse
from executor_svc.kernels.gpu import DeviceStep
from executor_svc.kernels.paged import TILE
from executor_svc.kernels.stage import keep, put, stage
from executor_svc.runner import BLOCK_SIZE, Capabilities, cache_blocks, caches
from executor_svc.sampler import answer

IN_FLIGHT = 2
_OPERATORS = frozenset((
    "embedding", "linear", "rms_norm", "add_rms_norm", "rope_table", "rope", "attention", "silu_mul", "split", "gather",
))  # fmt: skip
_KV_SHARE = 0.85  # of what is free when the weights are there; the rest is for activations and graphs
_MIXED_TOKENS = (128, 256, 512, 1024)  # of prompts in a step that a graph holds; more keep the device busy anyway
_MIXED_DECODES = (64, 128, 192, 256)
_MIXED_PROMPTS = 16
_LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass
class _Graph:
    """A step of a fixed shape: its columns, int32, and what it makes of them: logits, and the most probable tokens.

    Off the GPU there are no graphs, and it is computed each time.
    """

    columns: Tensor
    compute: Callable[[], tuple[Tensor, Tensor]]
    graph: Any = None
    results: tuple[Tensor, Tensor] | None = None

    def capture(self, pool: Any) -> None:
        """Compiles what is not compiled yet, then records."""
        self.compute()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.results = self.compute()

    def run(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The step with other columns, from pinned memory."""
        self.columns.view(-1).copy_(columns, non_blocking=True)
        if self.graph is None or self.results is None:
            return self.compute()
        self.graph.replay()
        return self.results


class _Columns:
    """Where a mixed step's columns lie in one static tensor: first the decodes, then the prompts, each filled up.

    Args:
        decodes, tokens: the rows that the step has for them.
        fill_row: the table row of what only fills it up.
    """

    def __init__(self, decodes: int, tokens: int, fill_row: int) -> None:
        self.decodes, self.tokens, self._fill_row = decodes, tokens, fill_row
        sequences, rows = decodes + _MIXED_PROMPTS, decodes + tokens
        tiles, self.updates = tokens // TILE + _MIXED_PROMPTS, tokens // BLOCK_SIZE + sequences + _MIXED_PROMPTS
        self.sizes = (
            [rows] * 3 + [sequences + 1] * 2 + [_MIXED_PROMPTS + 2] + [sequences] * 2 + [tiles] * 2 + [2 * self.updates]
        )

    def empty(self) -> list[np.ndarray]:
        """Columns of nothing: a sequence behind the last one has no tokens, and tiles are its."""
        values = [0, 0, self._fill_row, self._fill_row, 0, self.decodes, 0, self._fill_row, _MIXED_PROMPTS, 0, -1]
        found = [np.full(size, value, dtype=np.int32) for size, value in zip(self.sizes, values, strict=True)]
        found[4][: self.decodes] = 1
        return found

    def fill(self, layout: HostStep) -> np.ndarray:
        """The columns of a step that fits; updates that do not fit are left out."""
        whole, count, gap = self.empty(), layout.num_decodes, self.decodes - layout.num_decodes
        parts = (layout.tokens, layout.positions, layout.token_rows, layout.rows, layout.lengths)
        for column, part in zip(whole, parts, strict=False):
            column[:count] = part[:count]
            column[self.decodes : self.decodes + len(part) - count] = part[count:]
        _, _, _, _, _, starts, samples, sampling_rows, tile_rows, tile_first, updates = whole
        begins = layout.starts[count:] + gap
        starts[: len(begins)], starts[len(begins) :] = begins, begins[-1]
        samples[: len(layout.samples)] = np.where(layout.samples < count, layout.samples, layout.samples + gap)
        sampling_rows[: len(layout.samples)] = layout.sampling_rows
        rows, first = layout.tiles()
        tile_rows[: len(rows)], tile_first[: len(rows)] = rows, first
        news = layout.updates[: self.updates].reshape(-1)
        updates[: len(news)] = news
        return np.concatenate(whole)


@dataclass
class _Flight:
    """A batch that was started.

    Attributes:
        tokens: int32, on the host, there when the event has passed.
        sampled: of one that had to wait for its tokens, these.
    """

    tokens: Tensor
    event: Any = None
    sampled: Sampled | None = None


class CudaRunner:
    """Interprets a program on a GPU.

    Args:
        program: one that `takes` takes.
        weights: by the program's names, on the device.
        kv_memory: bytes of KV cache; by default what max_batch_size sequences of max_seq_len need, but at most kv_share of
            the memory that is free.
        kv_share: in (0, 1]; by default 0.85.
        device: "cuda", or "cpu" where Triton interprets its kernels; then there are no graphs.

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
        device: str = "cuda",
    ) -> None:
        self._device = torch.device(device)
        self._on_gpu = device == "cuda"
        self._interpreter = Interpreter(fuse(program), weights, implementations("gpu"))
        per_sequence = -(-limits.max_seq_len // BLOCK_SIZE)
        # one block more takes the keys of rows that only fill a graph up
        num_blocks = cache_blocks(program, limits, device, kv_memory, kv_share or _KV_SHARE, spare=1)
        self._k, self._v = caches(program, num_blocks + 1, device)
        rows = limits.max_batch_size + 1  # the last one is the fill's
        self._fill_row = rows - 1
        self._tables = torch.zeros(rows, per_sequence, dtype=torch.int32, device=self._device)
        self._tables[self._fill_row] = num_blocks
        self._last = torch.zeros(rows, dtype=torch.int32, device=self._device)
        self._layout = CudaLayout(limits.max_batch_size, per_sequence)
        self._flights: deque[_Flight] = deque()
        self._graphs: list[tuple[int, _Graph]] = []  # by rows, the fewest first
        self._mixed: list[tuple[_Graph, _Columns]] = []  # the smallest first
        self._pinned = [self._host(max(limits.max_num_tokens, rows) * 12 + 4096) for _ in range(IN_FLIGHT + 1)]
        self._results = [self._host(rows) for _ in range(IN_FLIGHT + 1)]
        self._turn = 0
        self.capabilities = Capabilities(
            num_blocks, BLOCK_SIZE, future_tokens=True, max_in_flight=IN_FLIGHT, overlaps=True
        )
        self._capture(limits.max_batch_size, limits.max_num_tokens)

    @staticmethod
    def takes(program: Program) -> bool:
        """Whether it has been measured on such a program: LLaMA's operators, heads of up to 128 numbers of 16 bits."""
        plain = all(len(op.inputs) == 3 and not op.attrs.get("soft_cap") for op in program.ops if op.op == "attention")
        heads = all(cache.head_dim <= 128 and cache.dtype in ("bfloat16", "float16") for cache in program.caches)
        return plain and heads and {op.op for op in program.ops} <= _OPERATORS

    @torch.inference_mode()
    def start(self, batch: Batch) -> None:
        layout = self._layout.lay_out(batch)
        plain = all(item.sequence.plain for item in batch.items if item.samples)
        size = len(layout.rows)
        graph = self._graph_of(size) if layout.decodes else None
        if graph:
            logits, sampled = self._replay(graph, layout)
        elif mixed := self._mixed_of(layout):
            logits, sampled = self._replay_mixed(*mixed, layout)
        else:
            logits, sampled = self._run(layout)
        count = len(layout.samples)
        if plain and not len(layout.prompt_rows):
            self._flights.append(self._send(sampled[:count]))
            return
        wanted = count + len(layout.prompt_rows)
        found = answer(logits[:wanted].float(), batch)
        keep(self._last, self._column(layout.sampling_rows), self._column(np.array(found.token_ids, dtype=np.int32)))
        self._flights.append(_Flight(sampled[:0], sampled=found))

    def finish(self) -> Sampled:
        flight = self._flights.popleft()
        if flight.sampled is not None:
            return flight.sampled
        if flight.event is not None:
            flight.event.synchronize()
        return Sampled(flight.tokens.tolist())

    def _run(self, layout: HostStep) -> tuple[Tensor, Tensor]:
        """A step of any shape, operator by operator: logits of its samples and prompt rows, and the most probable tokens."""
        rows, first = layout.tiles()
        parts = [
            layout.tokens, layout.positions, layout.token_rows, layout.rows, layout.starts, layout.lengths,
            layout.samples, layout.prompt_rows, layout.sampling_rows, rows, first, layout.updates.reshape(-1),
        ]  # fmt: skip
        columns = self._to_device(parts)
        tokens, positions, token_rows, seq_rows, starts, lengths = columns[:6]
        samples, prompt_rows, sampling_rows, tile_rows, tile_first, updates = columns[6:]
        put(self._tables, updates)
        token_ids, slots = stage(tokens, positions, token_rows, self._last, self._tables, BLOCK_SIZE)
        tiles = (tile_rows, tile_first) if len(tile_rows) else None
        step = self._step(slots, layout.num_decodes, seq_rows, lengths, starts[layout.num_decodes :], tiles)
        inputs = {"token_ids": token_ids, "positions": positions, "logit_indices": torch.cat((samples, prompt_rows))}
        (logits,) = self._interpreter.run(inputs, step)
        sampled = logits[: len(samples)].argmax(-1).int() if len(samples) else samples
        keep(self._last, sampling_rows, sampled)
        return logits, sampled

    def _replay(self, graph: _Graph, layout: HostStep) -> tuple[Tensor, Tensor]:
        size = graph.columns.shape[1]
        count, updates = len(layout.rows), layout.updates
        if len(updates) > size:  # a sequence that comes back brings more than one block
            put(self._tables, self._column(updates[size:].reshape(-1)))
            updates = updates[:size]
        columns = self._empty_decode(size)
        columns[:3, :count] = layout.tokens, layout.positions, layout.rows
        columns[3:, : len(updates)] = updates.T
        return graph.run(self._pin(columns.reshape(-1)))

    def _mixed_of(self, layout: HostStep) -> tuple[_Graph, _Columns] | None:
        """The smallest graph that holds such a step."""
        prompts, tokens = len(layout.rows) - layout.num_decodes, len(layout.tokens) - layout.num_decodes
        if not prompts or prompts > _MIXED_PROMPTS or len(layout.prompt_rows):
            return None
        fits = (held for held in self._mixed if held[1].decodes >= layout.num_decodes and held[1].tokens >= tokens)
        return next(fits, None)

    def _replay_mixed(self, graph: _Graph, columns: _Columns, layout: HostStep) -> tuple[Tensor, Tensor]:
        if len(layout.updates) > columns.updates:
            put(self._tables, self._column(layout.updates[columns.updates :].reshape(-1)))
        return graph.run(self._pin(columns.fill(layout)))

    def _compute_mixed(self, whole: Tensor, columns: _Columns) -> tuple[Tensor, Tensor]:
        """What a graph of a step with prompts holds."""
        tokens, positions, token_rows, rows, lengths, starts, *rest = whole.split(columns.sizes)
        samples, sampling_rows, tile_rows, tile_first, updates = rest
        put(self._tables, updates)
        token_ids, slots = stage(tokens, positions, token_rows, self._last, self._tables, BLOCK_SIZE)
        step = self._step(slots, columns.decodes, rows, lengths, starts, (tile_rows, tile_first))
        inputs = {"token_ids": token_ids, "positions": positions, "logit_indices": samples}
        (logits,) = self._interpreter.run(inputs, step)
        sampled = logits.argmax(-1).int()
        keep(self._last, sampling_rows, sampled)
        return logits, sampled

    def _decode(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What a graph holds."""
        tokens, positions, rows, entries, blocks = columns.unbind(0)
        put(self._tables, torch.stack((entries, blocks), -1).view(-1))
        token_ids, slots = stage(tokens, positions, rows, self._last, self._tables, BLOCK_SIZE)
        step = self._step(slots, len(rows), rows, positions + 1, None, None)
        inputs = {"token_ids": token_ids, "positions": positions}
        inputs["logit_indices"] = torch.arange(len(tokens), dtype=torch.int32, device=self._device)
        (logits,) = self._interpreter.run(inputs, step)
        sampled = logits.argmax(-1).int()
        keep(self._last, rows, sampled)
        return logits, sampled

    @torch.inference_mode()
    def _capture(self, max_batch_size: int, max_num_tokens: int) -> None:
        """Graphs for a ladder of batch sizes and of mixed steps, the largest first, which share their memory."""
        pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        for size in reversed(_up_to(_LADDER, max_batch_size)):
            columns = torch.from_numpy(self._empty_decode(size)).to(self._device)
            self._graphs.insert(0, (size, _Graph(columns, functools.partial(self._decode, columns))))
        for decodes in reversed((0, *_up_to(_MIXED_DECODES, max_batch_size))):
            for tokens in reversed(_up_to(_MIXED_TOKENS, max_num_tokens)):
                shape = _Columns(decodes, tokens, self._fill_row)
                whole = torch.from_numpy(np.concatenate(shape.empty())).to(self._device)
                self._mixed.insert(0, (_Graph(whole, functools.partial(self._compute_mixed, whole, shape)), shape))
        if self._on_gpu:
            for graph in (
                *(graph for _, graph in reversed(self._graphs)),
                *(graph for graph, _ in reversed(self._mixed)),
            ):
                graph.capture(pool)
            torch.cuda.synchronize()

    def _graph_of(self, size: int) -> _Graph | None:
        """The smallest that holds so many rows."""
        return next((graph for rows, graph in self._graphs if rows >= size), None)

    def _empty_decode(self, size: int) -> np.ndarray:
        """Columns of a decode step of nothing: token, position and table row of each row; entry and block of each update."""
        columns = np.zeros((5, size), dtype=np.int32)
        columns[2], columns[3] = self._fill_row, -1
        return columns

    def _step(
        self,
        slots: Tensor,
        num_decodes: int,
        rows: Tensor,
        lengths: Tensor,
        starts: Tensor | None,
        tiles: tuple[Tensor, Tensor] | None,
    ) -> DeviceStep:
        return DeviceStep([], [], self._tables, slots, self._k, self._v, num_decodes, rows, lengths, starts, tiles)

    def _send(self, sampled: Tensor) -> _Flight:
        """Tokens on their way to the host."""
        tokens = self._results[self._turn][: len(sampled)]
        tokens.copy_(sampled, non_blocking=True)
        event = torch.cuda.Event() if self._on_gpu else None
        if event:
            event.record()
        return _Flight(tokens, event)

    def _to_device(self, parts: list[np.ndarray]) -> list[Tensor]:
        """Columns of int32, in one copy."""
        whole = np.concatenate([part.astype(np.int32, copy=False) for part in parts])
        moved = self._pin(whole).to(self._device, non_blocking=True)
        return list(moved.split([len(part) for part in parts]))

    def _column(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _pin(self, values: np.ndarray) -> Tensor:
        """In pinned memory that no copy under way reads: each batch takes the next buffer, one more than there are in flight."""
        self._turn = (self._turn + 1) % len(self._pinned)
        if len(self._pinned[self._turn]) < len(values):
            self._pinned[self._turn] = self._host(len(values))
        buffer = self._pinned[self._turn][: len(values)]
        return buffer.copy_(torch.from_numpy(values))

    def _host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)


def _up_to(ladder: tuple[int, ...], most: int) -> list[int]:
    """The steps of a ladder below `most`, and `most` or the ladder's last."""
    return sorted({*(step for step in ladder if step < most), min(most, ladder[-1])})
