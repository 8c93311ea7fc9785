"""Checkpoints that clients upload: which files are missing, and where those go that come.

uploads/<digest>.json      in the store, beside the blob: its chunk digests, which a checkpoint's record needs
<spool>/<digest>.partial   on this machine: what has come of a file that is not whole yet
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from builder_svc.spool import SpoolFile, errors_of_disk, prepare
from engine import checkpoints, pins
from engine.blobs import blob_key, put_file
from engine.checkpoints import UploadedCheckpoint
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from engine.manifest import FileRef
from engine.store import Store

MAX_FILES = 1000
SPOOL_AGE = 24 * 3600.0  # seconds after which what nobody goes on with is removed


@dataclass(frozen=True)
class OfferedFile:
    """A file that a client has; `digest` is its SHA-256, hexadecimal, and `size` in bytes."""

    name: str
    digest: str
    size: int


@dataclass(frozen=True)
class Offer:
    """What is missing: digest -> bytes that are there. `checkpoint` is for a build, empty unless nothing is missing."""

    checkpoint: str
    missing: dict[str, int]


class Uploads:
    """Methods block; they are called from threads: `offer` from those of `offers`, all others from those of `pool`.

    An offer waits for a garbage collection for as long as that takes. Files must come meanwhile, and so must the beats of
    builds, which go through asyncio's own threads: so offers have theirs.

    Args:
        store: where whole files go.
        spool: a directory of this machine, made if it is not there; several builders of one machine may share it.
    """

    def __init__(self, store: Store, spool: Path) -> None:
        self._store = store
        self._spool = spool
        self.pool = ThreadPoolExecutor(8, "upload")
        self.offers = ThreadPoolExecutor(8, "offer")

    def offer(self, files: Sequence[OfferedFile]) -> Offer:
        """Makes a checkpoint of files that are in the store, or says which are not. Waits for garbage collections that run.

        Raises:
            InvalidArgument: the files are no checkpoint; names the first that is wrong.
        """
        check_offer(files)
        pins.hold(self._store, [file.digest for file in files])  # what is not missing now is there when it is built
        with errors_of_disk(self._spool):
            self._remove_old()
            refs = {file.digest: self._find(file.digest, file.size) for file in files}
            missing = {file.digest: self._there(file) for file in files if refs[file.digest] is None}
        if missing:
            return Offer("", missing)
        named = [
            msgspec.structs.replace(ref, name=file.name)
            for file in sorted(files, key=lambda file: file.name)
            if (ref := refs[file.digest]) is not None
        ]
        return Offer(f"upload://{checkpoints.put(self._store, UploadedCheckpoint(tuple(named)))}", {})

    def is_whole(self, digest: str, size: int) -> bool:
        """Whether the file is in the store."""
        return self._find(digest, size) is not None

    def receive(self, digest: str, size: int, offset: int) -> SpoolFile:
        """Where the bytes of a file go, from `offset` on; `finish` takes it when all have come. Opens nothing yet.

        Raises:
            InvalidArgument: no digest, or an offset behind the end.
        """
        check_digest(digest, "the upload's header")
        if offset > size:
            raise InvalidArgument(
                f"offset {offset} is behind the end of a file of {size} bytes", reason="OFFSET_INVALID"
            )
        return SpoolFile(self._path(digest), digest, size, offset)

    def finish(self, file: SpoolFile) -> None:
        """Verifies a file that has come, and puts it into the store.

        Raises:
            FailedPrecondition: bytes are missing; those that are there are kept.
            DataLoss: they are not what the digest says, and are removed.
        """
        with errors_of_disk(self._spool), file.held() as hasher:
            if hasher.size != file.size:
                raise FailedPrecondition(
                    f"{hasher.size} of {file.size} bytes of {file.digest[:12]} have come: send the rest",
                    reason="UPLOAD_INCOMPLETE",
                    metadata={"offset": str(hasher.size)},
                )
            ref = hasher.ref(file.digest)
            if ref.digest != file.digest:
                file.path.unlink(missing_ok=True)
                raise DataLoss(
                    f"the {file.size} bytes that came for {file.digest[:12]} have the digest {ref.digest[:12]}: send the "
                    "file again from its beginning",
                    reason="UPLOAD_DIGEST_MISMATCH",
                )

            def progress(_done: int, _total: int) -> None:
                file.check_open()

            put_file(self._store, ref, file.path, progress)
            self._store.replace(_record_key(file.digest), msgspec.json.encode(ref))
            file.path.unlink(missing_ok=True)

    def _find(self, digest: str, size: int) -> FileRef | None:
        """The description of a file that is in the store as a whole."""
        try:
            ref = msgspec.json.decode(self._store.read(_record_key(digest)), type=FileRef)
        except (NotFound, msgspec.MsgspecError):
            return None
        if (ref.digest, ref.size) != (digest, size) or self._store.size(blob_key(digest)) != size:
            return None
        return ref

    def _there(self, file: OfferedFile) -> int:
        """Bytes in the spool."""
        try:
            size = self._path(file.digest).stat().st_size
        except FileNotFoundError:
            return 0
        return size if size <= file.size else 0

    def _path(self, digest: str) -> Path:
        return self._spool / f"{digest}.partial"

    def _remove_old(self) -> None:
        prepare(self._spool)  # it may have been cleared, like everything temporary
        for path in self._spool.glob("*.partial"):
            with suppress(FileNotFoundError):  # it has just become whole
                if path.stat().st_mtime < time.time() - SPOOL_AGE:
                    path.unlink()


def check_offer(files: Sequence[OfferedFile]) -> None:
    """Raises InvalidArgument, naming the file, unless they could be a checkpoint."""
    if len(files) > MAX_FILES:
        raise InvalidArgument(f"{len(files)} files: a checkpoint may have {MAX_FILES} at most", reason="TOO_MANY_FILES")
    seen: dict[str, OfferedFile] = {}
    sizes: dict[str, int] = {}
    for file in files:
        checkpoints.check_file_name(file.name)
        check_digest(file.digest, file.name)
        if file.size < 0:
            raise InvalidArgument(f"{file.name}: size {file.size} is negative", reason="FILE_SIZE_INVALID")
        if file.name in seen:
            raise InvalidArgument(f"two files are called {file.name!r}", reason="FILE_TWICE")
        if sizes.setdefault(file.digest, file.size) != file.size:
            raise InvalidArgument(
                f"{file.name}: another file of the same digest has {sizes[file.digest]} bytes, not {file.size}",
                reason="FILE_SIZE_INVALID",
            )
        seen[file.name] = file
    checkpoints.choose_files(seen, weights=False)  # builds with dummy weights do without


def check_digest(digest: str, where: str) -> None:
    """Raises InvalidArgument unless it is a SHA-256 in lower-case hexadecimal digits."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise InvalidArgument(f"{where}: sha256 {digest[:80]!r} is not 64 hexadecimal digits", reason="DIGEST_INVALID")


def _record_key(digest: str) -> str:
    return f"uploads/{digest}.json"
