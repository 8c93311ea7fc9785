"""An engine's weights, brought into the page cache while the worker that will load them still imports torch.

That takes seconds in which the disk would do nothing. Of stores that no page cache holds, nothing is read.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path

from engine import registry
from engine.blobs import PARALLEL_READS, blob_key
from engine.directory import DirectoryStore
from engine.errors import EnginehouseError
from engine.store import Store
from executor_svc.budget import available

_CHUNK = 4 << 20  # bytes that a thread reads at a time, into memory that stays in its core's cache


def read_ahead(store: Store, engine_id: str, machines: int, stopped: Callable[[], bool]) -> int:
    """The bytes read, when all is there that half of the free memory can hold, or `stopped` says that nobody waits for it.

    Errors are the worker's to tell, which will meet them.

    Args:
        machines: among which the engine's ranks are divided; this one has the first.
    """
    if not isinstance(store, DirectoryStore):
        return 0
    chunks: list[tuple[Path, int]] = []
    with suppress(EnginehouseError):
        ranks = registry.manifest(store, engine_id).ranks
        of_ranks = [
            [(store.file(blob_key(file.digest)), at) for file in rank.weights for at in range(0, file.size, _CHUNK)]
            for rank in ranks[: len(ranks) // machines]
        ]
        chunks = [chunk for chunk in chain(*zip_longest(*of_ranks)) if chunk]  # ranks read side by side
    own = threading.local()

    def read(chunk: tuple[Path, int]) -> int:
        if stopped():
            return 0
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(_CHUNK)
        path, at = chunk
        with suppress(OSError), path.open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [own.buffer], at)
        return 0

    with ThreadPoolExecutor(PARALLEL_READS, "read-ahead") as pool:
        return sum(pool.map(read, chunks[: available() // 2 // _CHUNK]))
