"""Main memory that a device reads and writes by itself: a step's columns on their way there, its tokens on their way back."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class HostMemory:
    """Pinned buffers, of each kind one more than there are batches in flight, which take them in turn.

    What is in flight for the scheduler says little of what copies are under way: nobody waits for a part of a prompt in a
    pipeline, nor ever on ranks that follow. So columns are overwritten when the batch that had them before is computed.

    Args:
        device: "cuda"; of another one nothing is pinned, and copies are there at once.
        in_flight: batches. columns, rows: int32 of a batch, so many columns at first, and tokens.
    """

    def __init__(self, device: torch.device, in_flight: int, columns: int, rows: int) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._columns = [self._buffer(columns) for _ in range(in_flight + 1)]
        self._computed = [torch.cuda.Event() if self._on_gpu else None for _ in self._columns]
        self._tokens = [self._buffer(rows) for _ in range(in_flight + 1)]
        self._turn = 0

    def pin(self, *parts: np.ndarray) -> Tensor:
        """The next batch's columns of int32, one after another: pinned. The last batch is in the stream by now."""
        values = np.concatenate([part.astype(np.int32, copy=False) for part in parts])
        if last := self._computed[self._turn]:
            last.record()
        self._turn = (self._turn + 1) % len(self._columns)
        if before := self._computed[self._turn]:
            before.synchronize()
        if len(self._columns[self._turn]) < len(values):
            self._columns[self._turn] = self._buffer(len(values))
        buffer = self._columns[self._turn][: len(values)]
        return buffer.copy_(torch.from_numpy(values))

    def send(self, *parts: np.ndarray) -> list[Tensor]:
        """The next batch's columns on the device, in one copy."""
        moved = self.pin(*parts).to(self._device, non_blocking=True)
        return list(moved.split([len(part) for part in parts]))

    def column(self, values: np.ndarray) -> Tensor:
        """A column by itself, on the device when the stream comes to it."""
        column = torch.from_numpy(values)
        return (column.pin_memory() if self._on_gpu else column).to(self._device, non_blocking=True)

    def fetch(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """The batch's tokens on their way to the host: they are there when the event, if there is one, has passed."""
        found = self._tokens[self._turn][: len(tokens)]
        found.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event() if self._on_gpu else None
        if event:
            event.record()
        return found, event

    def _buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)
