"""Pins: which blobs a build relies on, so that a garbage collection spares them before a manifest names them.

pins/<random>.json     digests; it counts for a day since it was written, by the store's clock

A build may find that a blob is there already which no manifest names, of an engine that was removed, and upload nothing.
It writes its pin BEFORE it looks which blobs are there, and THEN waits for the sweeps that run. A sweep writes its marker
FIRST and reads the pins THEN (`engine/gc.py`), and the manifests after them. The store shows each object to everybody as
soon as it is written, so that of a build and a sweep at least one sees the other; and a pin is removed when its manifest
is there, so that a sweep that does not see the pin any more sees the manifest. Who removes an engine pins its files for
the same reason (`engine/inventory.py`): its manifest may come back.
"""

import logging
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

from engine import sweeps
from engine.errors import DataLoss, EnginehouseError, NotFound, Unavailable
from engine.store import Store

LIFE = 24 * 3600.0  # seconds since it was written for which a pin counts
_REFRESH = 3600.0  # seconds after which its holder writes it again
_RETRY = 60.0  # seconds until the next try when that failed
_GIVE_UP = 23 * 3600.0  # seconds after which the holder does not rely on it any more

log = logging.getLogger(__name__)


class _Pinned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    digests: tuple[str, ...]


class Pin:
    """A pin that this process holds; made by `pinned`."""

    def __init__(self, store: Store, digests: Iterable[str]) -> None:
        self._store = store
        self._key = f"pins/{secrets.token_hex(16)}.json"
        self._data = msgspec.json.encode(_Pinned(tuple(sorted(set(digests)))))
        self._written = 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def write(self) -> None:
        """Makes it count for a day from now on."""
        began = sweeps.clock()
        self._store.replace(self._key, self._data)
        self._written, self._next = began, began + _REFRESH

    def refresh(self) -> None:
        """To be called now and then while it is held; writes it again every hour.

        Raises:
            Unavailable: it could not be written for so long that it may not count any more.
        """
        if sweeps.clock() < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            if sweeps.clock() - self._written > _GIVE_UP:
                raise Unavailable(
                    f"what this build relies on in {self._store.url} may have been deleted: it has not been able to say "
                    "for a day that it is alive. Start it again",
                    reason="PIN_LOST",
                )
            self.write()
        except Unavailable as error:
            if error.reason == "PIN_LOST":
                raise
            self._next = sweeps.clock() + _RETRY
            log.warning("%s could not be written again: %s", self._key, error.message)
        finally:
            self._lock.release()

    def remove(self) -> None:
        """Ends it; one that cannot be removed ends by itself."""
        try:
            self._store.delete(self._key)
        except EnginehouseError as error:
            log.warning("%s could not be removed: %s", self._key, error.message)


@contextmanager
def pinned(store: Store, digests: Iterable[str]) -> Iterator[Pin]:
    """Keeps blobs from being collected, those that are there and those that will be, until a manifest names them.

    To be entered before anybody asks which of them are there; waits for a garbage collection that runs. Whoever holds it
    longer than an hour calls `refresh`.
    """
    pin = Pin(store, digests)
    try:
        pin.write()
        sweeps.wait_until_over(store, pin.refresh)
        yield pin
    finally:
        pin.remove()


def hold(store: Store, digests: Iterable[str]) -> None:
    """Keeps blobs from being collected for a day from now on, for somebody who may come back in that time, or never.

    Waits as `pinned` does; after it, it can be asked which of them are there.
    """
    Pin(store, digests).write()
    sweeps.wait_until_over(store)


def read(store: Store, now: float) -> tuple[set[str], list[str]]:
    """What the pins that count name, and the keys of those that count no more.

    Args:
        now: by the store's clock.

    Raises:
        DataLoss: a pin that counts cannot be read.
    """
    digests: set[str] = set()
    dead = []
    for entry in store.list("pins/"):
        if now - entry.modified >= LIFE:
            dead.append(entry.key)
            continue
        try:
            digests.update(msgspec.json.decode(store.read(entry.key), type=_Pinned).digests)
        except NotFound:
            pass  # its build has just ended: the manifests, which are read after this, tell how
        except msgspec.MsgspecError as error:
            raise DataLoss(
                f"{entry.key} in {store.url} is damaged ({error}): delete it when no build has been running for a day",
                reason="PIN_INVALID",
            ) from None
    return digests, dead
