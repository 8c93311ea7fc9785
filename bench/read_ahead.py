"""Reads files into the page cache, 16 chunks at a time, and does nothing with them: python -m bench.read_ahead FILE ...

As a process of its own it imports next to nothing, so that it reads while an executor imports torch.
"""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READERS = 16
_CHUNK = 32 << 20  # bytes, as executors read


def read_all(paths: list[Path]) -> float:
    """Seconds in which all of the files are read, their beginnings first, in parallel."""
    own = threading.local()

    def read(path: Path, offset: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(_CHUNK)
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.readinto(own.buffer)

    began = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        chunks = [pool.submit(read, path, at) for path in paths for at in range(0, path.stat().st_size, _CHUNK)]
        for chunk in chunks:
            chunk.result()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(f"read in {read_all([Path(name) for name in sys.argv[1:]]):.2f} s", file=sys.stderr)
