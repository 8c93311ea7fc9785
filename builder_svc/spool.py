"""A file that comes in pieces, on this machine's disk until it is whole."""

import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.blobs import Hasher
from engine.errors import FailedPrecondition, InvalidArgument, PermissionDenied, ResourceExhausted, Unavailable

_READ_SIZE = 4 * 1024 * 1024


class SpoolFile:
    """What has come of a file, and its digests as far as that.

    It has one writer at a time, over all processes that share the directory. Methods block and may be called from any
    thread; `break_off` makes one end that is running.

    Args:
        path: where the bytes are, also when this object is gone.
        digest: SHA-256 that the whole is to have.
        size: bytes of the whole.
        offset: where the bytes begin that will be written.
    """

    def __init__(self, path: Path, digest: str, size: int, offset: int) -> None:
        self.path = path
        self.digest = digest
        self.size = size
        self._offset = offset
        self._file: int | None = None
        self._hasher = Hasher()
        self._busy = threading.Lock()
        self._closing = False

    def open(self) -> None:
        """Takes the file, reads what is there up to the offset, and drops what is behind it.

        Raises:
            FailedPrecondition: somebody else writes it, or less is there than the offset says (in the metadata: how much).
            ResourceExhausted: the disk is full.
            Unavailable: it was broken off before, or is while this runs.
        """
        with self._busy, errors_of_disk(self.path.parent):
            self._check_going_on()  # `close` may have been first: nobody would give back what is taken after it
            prepare(self.path.parent)
            self._file = self._lock()
            there = os.fstat(self._file).st_size
            if there < self._offset:
                raise FailedPrecondition(
                    f"{there} bytes of {self.digest[:12]} are here: the upload cannot go on from byte {self._offset}, but from "
                    f"byte {there}",
                    reason="UPLOAD_OFFSET",
                    metadata={"offset": str(there)},
                )
            while self._hasher.size < self._offset:
                self._check_going_on()
                part = os.pread(self._file, min(_READ_SIZE, self._offset - self._hasher.size), self._hasher.size)
                if not part:
                    raise Unavailable(f"{self.path} has become shorter while it was read: upload again")
                self._hasher.update(part)
            os.ftruncate(self._file, self._offset)
            os.utime(self._file)  # its day begins again

    def write(self, data: bytes) -> None:
        """Appends. Raises InvalidArgument when that is more than the whole, and ResourceExhausted."""
        with self._busy, errors_of_disk(self.path.parent):
            file = self.check_open()
            if self._hasher.size + len(data) > self.size:
                raise InvalidArgument(
                    f"more bytes than the {self.size} of {self.digest[:12]} have come: was the file changed?",
                    reason="UPLOAD_TOO_LONG",
                )
            done = 0
            while done < len(data):
                done += os.pwrite(file, memoryview(data)[done:], self._hasher.size + done)
            self._hasher.update(data)

    @contextmanager
    def held(self) -> Iterator[Hasher]:
        """All that has come, unchanged for as long as the block."""
        with self._busy:
            self.check_open()
            yield self._hasher

    def check_open(self) -> int:
        """The descriptor. Raises Unavailable when somebody waits for the end: a long step is not to go on for nobody."""
        self._check_going_on()
        if self._file is None:
            raise _broken_off()
        return self._file

    def break_off(self) -> None:
        """From now on every method but `close` raises Unavailable. Does not block."""
        self._closing = True

    def close(self) -> None:
        """Lets others have the file, once no other method runs."""
        self.break_off()
        with self._busy:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _check_going_on(self) -> None:
        if self._closing:
            raise _broken_off()

    def _lock(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), self.path.stat()):
                    return file
            except FileNotFoundError:
                pass  # it became whole just now, and is gone
            except BlockingIOError:
                os.close(file)
                raise FailedPrecondition(
                    f"{self.digest[:12]} is being uploaded by somebody else: wait for the end of that, or try again if it "
                    "breaks off",
                    reason="UPLOAD_IN_PROGRESS",
                ) from None
            os.close(file)


def _broken_off() -> Unavailable:
    return Unavailable("the upload has broken off: go on with it in another call", reason="UPLOAD_BROKEN_OFF")


def default_spool() -> Path:
    """In the system's temporary directory, one a user."""
    return Path(tempfile.gettempdir()) / f"enginehouse-uploads-{os.getuid()}"


def prepare(spool: Path) -> None:
    """Makes the directory unless it is there. Raises PermissionDenied where it may be another user's trap."""
    spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    if spool.parent.stat().st_mode & 0o002 and spool.stat().st_uid != os.getuid():
        raise PermissionDenied(
            f"{spool}, for uploads, belongs to another user: choose another --work-dir", reason="WORK_DIR_UNUSABLE"
        )


@contextmanager
def errors_of_disk(spool: Path) -> Iterator[None]:
    """Turns the operating system's errors into ours, naming the directory and the option."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"{spool}, for uploads, is full: free some space, or start the builder with another --work-dir; what has come "
                "is kept",
                reason="WORK_DIR_FULL",
            ) from None
        raise FailedPrecondition(
            f"{spool}, for uploads, cannot be used ({error}): start the builder with another --work-dir",
            reason="WORK_DIR_UNUSABLE",
        ) from None
