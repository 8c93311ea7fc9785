"""Whether an engine is in its store as its manifest says."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.blobs import blob_key, check_chunks
from engine.manifest import FileRef, Manifest
from engine.store import Store


@dataclass(frozen=True)
class FileState:
    """What was found of a file.

    Attributes:
        state: "ok", "missing", "truncated" (the blob is shorter than it should be) or "damaged".
        chunks: numbers of the chunks of 32 MiB that do not match their digests, when it is damaged; none if the blob is
            longer than it should be, for then nothing of it was read.
    """

    file: FileRef
    state: str
    chunks: tuple[int, ...] = ()


def verify(
    store: Store, engine: Manifest, deep: bool = True, progress: Callable[[int, int], None] = lambda *_: None
) -> list[FileState]:
    """Looks at every file of an engine; a file of several ranks or roles is reported for each.

    Args:
        deep: read all bytes and compare them with their digests, not only existence and sizes.
        progress: called with (bytes done, bytes in all) when it is deep.

    Raises:
        NotFound: a blob was deleted while it was read.
    """
    sizes = {file.digest: store.size(blob_key(file.digest)) for file in engine.files()}
    whole = list({file.digest: file for file in engine.files() if sizes[file.digest] == file.size}.values())
    damaged: dict[str, list[int]] = {}
    if deep:
        done, total = 0, sum(file.size for file in whole)

        def read(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        for file, chunk, good in check_chunks(store, whole, read):
            if not good:
                damaged.setdefault(file.digest, []).append(chunk)

    def state(file: FileRef) -> FileState:
        size = sizes[file.digest]
        if size is None:
            return FileState(file, "missing")
        if size != file.size:
            return FileState(file, "truncated" if size < file.size else "damaged")
        chunks = tuple(damaged.get(file.digest, ()))
        return FileState(file, "damaged" if chunks else "ok", chunks)

    return [state(file) for file in engine.files()]
