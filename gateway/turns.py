"""Which streams write now, when more have something to say than the process can send."""

import asyncio


class Turns:
    """Lets few writes be under way at a time, in the order in which they were asked for.

    gRPC answers completed writes and the executors' steps in one line: with a write under way for every stream, a step
    would wait for all of them, and steps would pile up at the executor. A stream that waits for its turn instead finds
    several steps' tokens in its inbox and sends them as one message. A write that a slow client holds up keeps its turn
    for PATIENCE only.
    """

    WIDTH = 8
    PATIENCE = 0.01  # seconds

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(self.WIDTH)

    def turn(self) -> "_Turn":
        """One write: `async with turns.turn(): ...`."""
        return _Turn(self._free)


class _Turn:
    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free = free
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._free.acquire()
        self._timer = asyncio.get_running_loop().call_later(Turns.PATIENCE, self._end)

    async def __aexit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
            self._free.release()
