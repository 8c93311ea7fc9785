"""What the store's tests share."""

from pathlib import Path

import pytest

from engine.store import Store

MIB = 1024 * 1024


def keys(store: Store, prefix: str = "") -> list[str]:
    """What a store lists."""
    return [entry.key for entry in store.list(prefix)]


class Interrupted(Exception):
    pass


def interrupt(store: Store, key: str, path: Path, at: int) -> None:
    """An upload that ends when `at` bytes are written."""

    def stop(done: int, total: int) -> None:
        if done >= at:
            raise Interrupted

    with pytest.raises(Interrupted):
        store.upload(key, path, stop)
