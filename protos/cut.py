"""Ends calls that still run when their service ends, with a status."""

import asyncio
from types import TracebackType
from typing import Any, Self

from engine.errors import EnginehouseError


class Scissors:
    """Ends calls that run when their service ends."""

    def __init__(self) -> None:
        self.error: EnginehouseError | None = None
        self.tasks: set[asyncio.Task[Any] | None] = set()

    def cut(self, error: EnginehouseError) -> None:
        """Ends all of them with this error."""
        self.error = error
        for task in self.tasks:
            if task:
                task.cancel()


class Cuttable:
    """A call that can be cut where it waits in our code. While grpc sends it cannot: that would lose its status, too."""

    def __init__(self, scissors: Scissors) -> None:
        self._scissors, self._task = scissors, asyncio.current_task()

    def __enter__(self) -> Self:
        self.go_on()
        return self

    def pause(self) -> None:
        """A response is handed to grpc."""
        self._scissors.tasks.discard(self._task)

    def go_on(self) -> None:
        """It has been sent. Raises the error of a cut meanwhile."""
        if self._scissors.error:
            raise self._scissors.error
        self._scissors.tasks.add(self._task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pause()
        if isinstance(error, asyncio.CancelledError) and self._scissors.error:  # else it is the client that has left
            raise self._scissors.error from None
