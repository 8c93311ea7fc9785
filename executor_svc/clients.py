"""The clients of the front: streams that the workers feed."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from engine.errors import EnginehouseError, ResourceExhausted

if TYPE_CHECKING:
    from executor_svc.workers import WorkerProcess

MAX_BUFFERED = 16 << 20  # bytes of step outputs that wait for a client to read; a minute or so of a full batch


class Client:
    """One Run or Generate stream: serialized StepOutputs for it, in order.

    Attributes:
        used: the workers that have got requests of it.

    Args:
        on_failure: called when the stream has failed, before its reader knows; it may be a reader that never comes.
    """

    _numbers = itertools.count(1)

    def __init__(self, on_failure: Callable[["Client"], None]) -> None:
        self.number = next(self._numbers)
        self._outputs: deque[bytes] = deque()
        self._buffered = 0
        self._news = asyncio.Event()
        self._done = self._held = False
        self._draining: set[str] | None = None
        self._error: EnginehouseError | None = None
        self._on_failure = on_failure
        self.used: set[WorkerProcess] = set()

    @property
    def idle(self) -> bool:
        """Whether the engines have told all, after `drain`, or nobody waits for it any more."""
        return self._error is not None or (self._draining is not None and not self._draining)

    def put(self, output: bytes) -> None:
        """Adds an output. A client that leaves more than MAX_BUFFERED bytes unread fails."""
        if self._error:
            return
        self._outputs.append(output)
        self._buffered += len(output)
        if self._buffered > MAX_BUFFERED:
            message = f"the client has left more than {MAX_BUFFERED >> 20} MiB of step outputs unread"
            self.fail(ResourceExhausted(message, reason="CLIENT_TOO_SLOW"))
        self._news.set()

    def fail(self, error: EnginehouseError) -> None:
        """Ends the whole stream with an error, whatever is still buffered."""
        if self._error is None:
            self._error = error
            self._outputs.clear()
            self._news.set()
            self._on_failure(self)

    def drain(self, engine_ids: set[str], hold: bool = False) -> None:
        """The client will send no more, or nothing more is taken of it: the stream ends when these engines have told all.

        Args:
            hold: it stands nevertheless, until `drain` is called without, or it fails.
        """
        self._draining, self._held = engine_ids, hold
        self._check_done()

    def drained(self, engine_id: str) -> None:
        """An engine has nothing more for this client."""
        if self._draining is not None:
            self._draining.discard(engine_id)
            self._check_done()

    def _check_done(self) -> None:
        self._done = not self._draining and not self._held
        self._news.set()

    async def outputs(self) -> AsyncIterator[bytes]:
        """The outputs as they come. Raises what the stream has failed with."""
        while True:
            if self._error:
                raise self._error
            if self._outputs:
                output = self._outputs.popleft()
                self._buffered -= len(output)
                yield output
            elif self._done:
                return
            else:
                self._news.clear()
                await self._news.wait()
