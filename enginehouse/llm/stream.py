"""From the thread that hears of tokens to whoever waits for them, in a thread or in an event loop."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from protos.v1.gateway_pb2 import GenerateResponse


class News(NamedTuple):
    """What a stream has told since it was last asked.

    Attributes:
        responses: in order.
        ended: nothing more will come.
        error: why, if it has not ended well.
    """

    responses: Sequence[GenerateResponse]
    ended: bool
    error: BaseException | None


class Stream:
    """One request's responses. Written by one thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._responses: list[GenerateResponse] = []
        self._ended = False
        self._error: BaseException | None = None
        self._waiting: list[Future[None]] = []

    def push(self, responses: Sequence[GenerateResponse]) -> None:
        """Adds responses."""
        with self._lock:
            self._responses.extend(responses)
            self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes; what a stream that has ended is told does not count."""
        with self._lock:
            if not self._ended:
                self._ended, self._error = True, error
                self._wake()

    def take(self) -> News:
        """Everything that is there."""
        with self._lock:
            responses, self._responses = self._responses, []
            return News(responses, self._ended, self._error)

    def wait(self) -> "Future[None]":
        """Done when there is something to take. Who gives up cancels it."""
        future: Future[None] = Future()
        with self._lock:
            if self._responses or self._ended:
                future.set_result(None)
            else:
                self._waiting = [*(other for other in self._waiting if not other.cancelled()), future]
        return future

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(None)
