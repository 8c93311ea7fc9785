"""Results of blocking work, shared by all that ask."""

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from engine.errors import Unavailable

T = TypeVar("T")

_RENEWAL_WAIT = 0.2  # seconds for which a request waits for news of something that it knows


class Cache(Generic[T]):
    """Loads by key in a thread, once for all that ask at the same time; keeps the `size` results that were used last,
    `ttl` seconds each.

    Failures are not kept. Where a newer result is due and does not come at once, because the store is slow or cannot be
    reached, the old one serves on.
    """

    def __init__(self, load: Callable[[str], T], size: int, ttl: float = float("inf")) -> None:
        self._load = load
        self._size = size
        self._ttl = ttl
        self._results: dict[str, tuple[T, float]] = {}  # with the time that it is good until
        self._loading: dict[str, tuple[asyncio.Task[T], float]] = {}  # with the time at which it began

    async def get(self, key: str) -> T:
        """The result for a key. Raises what `load` raises."""
        kept = self._results.get(key)
        if kept and time.monotonic() < kept[1]:
            self._results[key] = self._results.pop(key)  # used last
            return kept[0]
        if key not in self._loading:
            task = asyncio.create_task(self._renew(key))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # someone may have left
            self._loading[key] = task, time.monotonic()
        loading, began = self._loading[key]
        if kept:
            await asyncio.wait((loading,), timeout=max(0.0, began + _RENEWAL_WAIT - time.monotonic()))
            if not loading.done():
                return kept[0]
        return await asyncio.shield(loading)  # one that leaves does not end it for the others

    async def _renew(self, key: str) -> T:
        try:
            result = await asyncio.to_thread(self._load, key)
        except Unavailable:
            if key not in self._results:
                raise
            result = self._results[key][0]
        finally:
            del self._loading[key]
        self._results.pop(key, None)
        self._results[key] = result, time.monotonic() + self._ttl
        while len(self._results) > self._size:
            del self._results[next(iter(self._results))]
        return result
