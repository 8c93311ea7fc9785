"""A pipeline's first place on a GPU takes what the last one sends, while it computes later steps."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from engine.errors import Internal
from executor_svc.core import Batch, Sampled
from executor_svc.cuda_host import HostMemory
from executor_svc.cuda_layout import HostStep
from executor_svc.group import Group
from executor_svc.kernels.stage import keep
from executor_svc.sampler import answer


class FirstPlace:
    """Receives in a stream of its own, in the order of the steps: of each its tokens, or logits that the host is to look at.

    Args:
        last: int32 by table row, where tokens are kept for the steps that take them.
    """

    def __init__(self, group: Group, host: HostMemory, last: Tensor) -> None:
        self._group, self._host, self._last = group, host, last
        self._stream, self._aside = (torch.cuda.Stream() if last.is_cuda else None for _ in range(2))
        self._coming: deque[Any] = deque()  # events behind the tokens of steps, the oldest first

    def wait(self, apart: int) -> None:
        """To be called before a step, which takes tokens of all steps before it but the last so many."""
        while len(self._coming) > apart:
            if event := self._coming.popleft():
                event.wait()

    def receive(self, layout: HostStep, *, drawn: bool) -> tuple[Tensor, Any]:
        """To rank 0 a step's tokens, int32 [n] on the host, or float32 logits [n, vocab_size] on its device; to others nothing.

        They are there when the event, if there is one, has passed.
        """
        with torch.cuda.stream(self._stream):  # of None: no stream
            if drawn:
                brought = self._group.bring_tokens(None, len(layout.samples))
                if brought is None:
                    raise Internal("no rank sends tokens")
                keep(self._last, self._host.column(layout.sampling_rows), brought)
            else:
                brought = self._group.bring_home(None, layout.num_logits)
            event = self._stream.record_event() if self._stream else None
            self._coming.append(event)
            if self._group.rank:  # it follows, and nobody asks it
                return self._last[:0], event
            return self._host.fetch(brought) if drawn else (brought, event)

    @torch.inference_mode()
    def answer(self, logits: Tensor, batch: Batch) -> Sampled:
        """What rank 0 makes of logits that are there, beside what is still to be received."""
        with torch.cuda.stream(self._aside):
            if self._aside:
                logits.record_stream(self._aside)
            return answer(logits, batch)
