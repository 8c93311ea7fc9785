"""When streams write, where more of them have something to say than the process can send."""

import asyncio
import time


class Turns:
    """Lets few writes be under way at a time, in the order in which they were asked for, and under load spaces them.

    A write costs more than the tokens in it. A process with little to do sends each token at once; the busier it is, the longer
    a stream waits after a write, up to INTERVAL, and what has come meanwhile goes out as one message. It also spreads the
    streams' writes, so that nothing stands behind a hundred of them. First tokens wait for neither.

    gRPC answers completed writes and the executors' steps in one line: with a write under way for every stream, a step
    would wait for all of them, and steps would pile up at the executor. A write that a slow client holds up keeps its
    turn for PATIENCE only.
    """

    WIDTH = 2
    PATIENCE = 0.01  # seconds
    INTERVAL = 0.016  # seconds from one write of a stream to its next
    IDLE, BUSY = 0.2, 0.5  # of a core that this process uses, between which the interval grows from nothing

    _WINDOW = 0.05  # seconds over which that is measured
    _SHORTEST = 0.001  # seconds, below which a timer does not pay

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(self.WIDTH)
        self._since, self._used = time.monotonic(), time.process_time()
        self._share = 0.0  # of a core, lately

    def turn(self, first: bool = False) -> "_Turn":
        """One write: `async with turns.turn(): ...`. A request's first one stands in no line."""
        return _Turn(None if first else self._free)

    async def pause(self, began: float) -> None:
        """What a stream waits for after a write that began at that time.monotonic()."""
        now = time.monotonic()
        rest = began + self._interval(now) - now
        if rest >= self._SHORTEST:
            await asyncio.sleep(rest)

    def _interval(self, now: float) -> float:
        if (passed := now - self._since) >= self._WINDOW:
            used = time.process_time()
            self._share += 0.5 * ((used - self._used) / passed - self._share)
            self._since, self._used = now, used
        return self.INTERVAL * min(max((self._share - self.IDLE) / (self.BUSY - self.IDLE), 0.0), 1.0)


class _Turn:
    def __init__(self, free: asyncio.Semaphore | None) -> None:
        self._free = free
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        if self._free is None:
            return
        await self._free.acquire()
        self._timer = asyncio.get_running_loop().call_later(Turns.PATIENCE, self._end)

    async def __aexit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._timer and self._free:
            self._timer.cancel()
            self._timer = None
            self._free.release()
