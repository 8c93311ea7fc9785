"""Which garbage collections run on a store: their markers, and how others know that one is alive.

gc/sweeps/<random>.json      a sweep that runs: a counter that it raises every few seconds, and whether it has begun to delete
gc/clock/<random>.json       written to learn the store's time, and deleted

A store has no compare-and-swap, so that a marker which several could take over from each other could always be taken by two.
Each sweep therefore has a marker of its own, writes it first and looks for others then: of two that start at once, each sees
the other or is seen by it. Nobody compares clocks: a sweep is dead when its marker has not changed for 60 s of the observer's
own time, and one that could not change its marker for 10 s of its own time begins no delete any more. The difference is for
a delete that has begun: the store's client may try it again for as long as its patience lasts.
"""

import enum
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from engine.errors import EnginehouseError, FailedPrecondition, NotFound, Unavailable
from engine.store import Store

_PREFIX = "gc/sweeps/"
_CLOCK = "gc/clock/"
_BEAT = 3.0  # seconds between two changes of a marker
_LOST = 10.0  # seconds without a change after which a sweep gives up
# Seconds without a change after which others take it for dead. A delete that began at the last moment lands before: _LOST, then
# a store's patience (10 s) and twice its read timeout (15 s), for the last attempt and for the store that works on it; and some.
_DEAD = 60.0
_POLL = 1.0  # seconds between two looks at the markers of others

log = logging.getLogger(__name__)


class _Beat(msgspec.Struct, frozen=True):
    number: int
    running: bool  # it has found no other one and goes to work


class _Sign(enum.Enum):
    """What a look at a marker says."""

    GONE = enum.auto()
    SILENT = enum.auto()  # not known yet
    BEATING = enum.auto()
    DEAD = enum.auto()


class Sweep:
    """A sweep that this process runs; made by `sweeping`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = f"{_PREFIX}{secrets.token_hex(8)}.json"
        self._number = 0
        self._running = False
        self._lost = False
        self._last = 0.0
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="sweep-beat", daemon=True)

    def check(self) -> None:
        """To be called before each delete. Raises Unavailable when others may take this sweep for dead, from then on."""
        if clock() - self._last > _LOST:
            self._lost = True  # for good: a beat that succeeds later changes nothing
        if self._lost:
            raise Unavailable(
                f"the garbage collection could not tell {self._store.url} for {_LOST:.0f} s that it is alive, and has "
                "stopped; what it has deleted so far nothing needed. Start it again",
                reason="SWEEP_LOST",
            )

    def _begin(self) -> None:
        self._beat(self._store.create)
        self._thread.start()

    def _claim(self) -> None:
        """Returns when no other sweep is alive. Raises FailedPrecondition when one is that goes first."""
        observer = _Observer(self._store)
        while True:
            self.check()
            others = [entry.key for entry in self._store.list(_PREFIX) if entry.key != self._key]
            signs = {key: observer.look(key) for key in others}
            for key, (sign, running) in signs.items():
                if sign is _Sign.BEATING and (running or key < self._key):
                    raise FailedPrecondition(
                        f"another garbage collection runs on {self._store.url}: wait until it has ended",
                        reason="SWEEP_RUNNING",
                    )
                if sign is _Sign.DEAD:
                    self._store.delete(key)
            if not {_Sign.SILENT, _Sign.BEATING} & {sign for sign, _ in signs.values()}:
                break
            time.sleep(_POLL)
        self._running = True
        self._beat(self._store.replace)

    def _finish(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(EnginehouseError):  # others see that it does not change any more
            self._store.delete(self._key)

    def _beat_on(self) -> None:
        while not self._end.wait(_BEAT) and not self._lost:
            try:
                self._beat(self._store.replace)
            except EnginehouseError as error:
                log.warning("the garbage collection could not tell that it is alive: %s", error.message)

    def _beat(self, write: Callable[[str, bytes], object]) -> None:
        """Changes the marker, unless so much time has passed that others may have seen it dead: then never again."""
        with self._lock:
            began = clock()
            if self._number and began - self._last > _LOST:
                self._lost = True
            if self._lost:
                return
            self._number += 1
            write(self._key, msgspec.json.encode(_Beat(self._number, self._running)))
            if self._number > 1 and clock() - self._last > _LOST:  # it may have become visible only now
                self._lost = True
            self._last = began


@contextmanager
def sweeping(store: Store) -> Iterator[Sweep]:
    """The right to delete what nothing needs, for as long as `check` of what it gives does not raise.

    What is read after this has begun includes the pins of every build that has not seen this sweep (`engine/pins.py`).

    Raises:
        FailedPrecondition: another sweep runs. It takes up to 60 s to know that one is dead.
    """
    sweep = Sweep(store)
    try:
        sweep._begin()
        sweep._claim()
        yield sweep
    finally:
        sweep._finish()


def wait_until_over(store: Store, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Returns when each sweep that runs now has ended or is dead; those that begin later do not count.

    Args:
        meanwhile: called every second.
    """
    observer = _Observer(store)
    keys = [entry.key for entry in store.list(_PREFIX)]
    if keys:
        log.info("waiting until the garbage collection of %s is over", store.url)
    while keys := [key for key in keys if observer.look(key)[0] in (_Sign.SILENT, _Sign.BEATING)]:
        time.sleep(_POLL)
        meanwhile()


def store_time(store: Store) -> float:
    """Seconds since the epoch by the store's clock: the time that it gives to an object which is written now."""
    key = f"{_CLOCK}{secrets.token_hex(8)}.json"
    store.replace(key, b"{}")
    try:
        return next(entry.modified for entry in store.list(_CLOCK) if entry.key == key)
    except StopIteration:
        raise Unavailable(
            f"{key} is not listed in {store.url} right after it was written", reason="CLOCK_LOST"
        ) from None
    finally:
        store.delete(key)


class _Observer:
    """Watches markers with this process' own clock; only reads that succeed tell anything."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, tuple[bytes, float]] = {}  # marker -> its content, and when that had been read first

    def look(self, key: str) -> tuple[_Sign, bool]:
        """What is known of a sweep by now, and whether it has begun its work."""
        began = time.monotonic()
        try:
            content = self._store.read(key)
        except NotFound:
            return _Sign.GONE, False
        try:
            running = msgspec.json.decode(content, type=_Beat).running
        except msgspec.MsgspecError:
            running = True
        known = self._seen.get(key)
        if known and known[0] == content:
            return (_Sign.DEAD if began - known[1] >= _DEAD else _Sign.SILENT), running
        self._seen[key] = (content, time.monotonic())
        return (_Sign.BEATING if known else _Sign.SILENT), running


def clock() -> float:
    """Seconds that also pass while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
