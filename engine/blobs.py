"""Content-addressed files: describe, put, and read back verified, in parallel."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.errors import DataLoss
from engine.manifest import CHUNK_SIZE, FileRef
from engine.store import Progress, Store

_AHEAD_SIZE = 1024 * 1024  # bytes that `read_ahead` reads at a time
_PART_SIZE = 4 * 1024 * 1024  # bytes that `fetch` reads at a time on each thread: all of them hold 32 MiB
PARALLEL_READS = 8  # chunks in flight; each is read and hashed on its thread, both without the interpreter lock


def blob_key(digest: str) -> str:
    """The address of a blob in the store."""
    return f"blobs/sha256/{digest[:2]}/{digest}"


class Hasher:
    """Digests of a file that is being written: of the whole and of each chunk."""

    def __init__(self) -> None:
        self.size = 0
        self._whole = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._chunks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        self.update_whole(data)
        self.update_chunks(data)

    def update_whole(self, data: bytes | memoryview) -> None:
        """One half of `update`; the other may run at the same time, in another thread."""
        self._whole.update(data)

    def update_chunks(self, data: bytes | memoryview) -> None:
        """The other half."""
        view = memoryview(data).cast("B")
        while view:
            room = CHUNK_SIZE - self.size % CHUNK_SIZE
            part, view = view[:room], view[room:]
            self._chunk.update(part)
            self.size += len(part)
            if self.size % CHUNK_SIZE == 0:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk = hashlib.sha256()

    def ref(self, name: str) -> FileRef:
        """The description of what was written."""
        tail = [self._chunk.hexdigest()] if self.size % CHUNK_SIZE or not self.size else []
        return FileRef(name, self.size, self._whole.hexdigest(), tuple(self._chunks + tail))


def describe(name: str, data: bytes) -> FileRef:
    """The description of a file that is at hand."""
    hasher = Hasher()
    hasher.update(data)
    return hasher.ref(name)


def put_bytes(store: Store, name: str, data: bytes) -> FileRef:
    """Stores a small file; does nothing where it is there already, in its full size."""
    ref = describe(name, data)
    if store.size(blob_key(ref.digest)) != ref.size:
        store.replace(blob_key(ref.digest), data)
    return ref


def put_file(store: Store, ref: FileRef, path: Path, progress: Progress | None = None, *, move: bool = False) -> None:
    """Stores a described file; resumes, and does nothing where it is there already, in its full size.

    Args:
        move: the file is not needed any more, and may become the blob.
    """
    store.upload(blob_key(ref.digest), path, progress, move=move)


def read(store: Store, ref: FileRef) -> bytes:
    """A whole file, verified. Raises NotFound and DataLoss."""
    buffer = bytearray(ref.size)
    read_into(store, [(ref, memoryview(buffer))])
    return bytes(buffer)


def read_into(
    store: Store, files: list[tuple[FileRef, memoryview]], progress: Callable[[int], None] | None = None
) -> None:
    """Reads whole files to where they belong, chunks in parallel, each verified before the call returns.

    Args:
        files: each file with a writable buffer of its size.
        progress: called with the bytes of each chunk that has arrived.

    Raises:
        NotFound: a blob is missing.
        DataLoss: a chunk does not match its digest or ends early; no buffer may be used then.
    """

    def fetch(ref: FileRef, buffer: memoryview, index: int) -> int:
        part = buffer[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]
        if not read_chunk(store, ref, index, part):
            raise damaged(store, ref, index, "build the engine again")
        return len(part)

    with ThreadPoolExecutor(PARALLEL_READS, "blob-read") as pool:
        reads = [pool.submit(fetch, ref, buffer, index) for ref, buffer in files for index in range(len(ref.chunks))]
        try:
            for done in reads:
                count = done.result()
                if progress:
                    progress(count)
        finally:
            for pending in reads:
                pending.cancel()


def read_ahead(store: Store, files: Iterable[FileRef], enough: Callable[[], bool]) -> None:
    """Has files in main memory before they are read, as far as a local store gets until it is enough.

    One read at a time leaves most of a disk to others: with more, importing torch from the same disk takes three times as long.

    Raises:
        NotFound: a blob is missing.
    """
    for ref in files:
        for offset in range(0, ref.size, _AHEAD_SIZE):
            if enough() or not store.read_ahead(blob_key(ref.digest), offset, _AHEAD_SIZE):
                return


def fetch(
    store: Store, files: list[tuple[FileRef, Path]], remedy: str, arrived: Callable[[int], None] = lambda _: None
) -> None:
    """Writes whole files, chunks in parallel and each verified; memory stays at 32 MiB.

    Args:
        files: each file, and where it goes.
        remedy: what makes a damaged blob anew.
        arrived: called with the bytes of each part that was written, from several threads.

    Raises:
        NotFound: a blob is missing.
        DataLoss: a chunk does not match its digest or ends early; no file may be used then.
        OSError: the file system's.
    """

    def chunk(ref: FileRef, file: int, index: int) -> None:
        def write(offset: int, part: memoryview) -> None:
            done = 0
            while done < len(part):
                done += os.pwrite(file, part[done:], offset + done)
            arrived(len(part))

        buffer = memoryview(bytearray(min(_PART_SIZE, ref.size - index * CHUNK_SIZE)))
        if not read_chunk(store, ref, index, buffer, write):
            raise damaged(store, ref, index, remedy)

    opened = [(ref, path.open("wb", buffering=0)) for ref, path in files]
    try:
        with ThreadPoolExecutor(PARALLEL_READS, "blob-fetch") as pool:
            chunks = [
                pool.submit(chunk, ref, file.fileno(), index)
                for ref, file in opened
                for index in range(len(ref.chunks))
            ]
            try:
                for done in chunks:
                    done.result()
            finally:
                for pending in chunks:
                    pending.cancel()
    finally:
        for _, file in opened:
            file.close()


def check_chunks(
    store: Store, files: list[FileRef], progress: Callable[[int], None] | None = None
) -> list[tuple[FileRef, int, bool]]:
    """Reads whole files and keeps nothing of them: each chunk of each file, by number, and whether it is as it should be.

    Chunks are read in parallel, with some 256 MiB of memory for any size of the files.

    Args:
        progress: called with the bytes of each chunk that was read.

    Raises:
        NotFound: a blob is missing.
    """
    own = threading.local()

    def check(ref: FileRef, index: int) -> tuple[FileRef, int, bool]:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(CHUNK_SIZE)
        part = memoryview(own.buffer)[: min(CHUNK_SIZE, ref.size - index * CHUNK_SIZE)]
        try:
            return ref, index, read_chunk(store, ref, index, part)
        except DataLoss:  # it ends before
            return ref, index, False

    found = []
    with ThreadPoolExecutor(PARALLEL_READS, "blob-check") as pool:
        reads = [pool.submit(check, ref, index) for ref in files for index in range(len(ref.chunks))]
        try:
            for done in reads:
                found.append(done.result())
                if progress:
                    ref, index, _ = found[-1]
                    progress(min(CHUNK_SIZE, ref.size - index * CHUNK_SIZE))
        finally:
            for pending in reads:
                pending.cancel()
    return found


def read_chunk(
    store: Store,
    ref: FileRef,
    index: int,
    buffer: memoryview,
    take: Callable[[int, memoryview], object] = lambda *_: None,
) -> bool:
    """Reads a chunk of a file, and tells whether it matches its digest; before that nothing of it may be used.

    Args:
        buffer: of the chunk's size, or smaller and not empty: then it is filled several times.
        take: called with each filling, and with where in the file that begins.

    Raises:
        NotFound: the blob is missing.
        DataLoss: it ends before the chunk does.
    """
    offset, end = index * CHUNK_SIZE, min((index + 1) * CHUNK_SIZE, ref.size)
    digest = hashlib.sha256()
    while True:  # once for an empty file, too: its blob may be missing
        part = buffer[: min(len(buffer), end - offset)]
        store.read_into(blob_key(ref.digest), offset, part)
        digest.update(part)
        take(offset, part)
        offset += len(part)
        if offset >= end:
            return digest.hexdigest() == ref.chunks[index]


def damaged(store: Store, ref: FileRef, index: int, remedy: str) -> DataLoss:
    """What to raise for a chunk that `read_chunk` did not find as it should be.

    Args:
        remedy: what makes the blob anew.
    """
    return DataLoss(
        # without the delete the next build would find the blob there in its size, and leave it
        f"{ref.name} in {store.url} is damaged: chunk {index} (from byte {index * CHUNK_SIZE}) does not match its digest. "
        f"Delete {blob_key(ref.digest)} in {store.url} and {remedy}",
        reason="CHUNK_DIGEST_MISMATCH",
        metadata={"digest": ref.digest, "chunk": str(index)},
    )
