"""The store in a directory of a local or shared file system."""

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from engine.errors import DataLoss, EnginehouseError, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from engine.store import Entry, Progress, Store, check_key, check_prefix, is_key

_COPY_SIZE = 4 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINK = (errno.EEXIST, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


class DirectoryStore(Store):
    """Objects are files. What is being written stands under `.partial/`, and a link or a rename makes it visible.

    Needs atomic link and rename, as local file systems and NFS have them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = self.root.as_uri()
        self._partial = self.root / ".partial"
        with self._errors("open"):
            self._partial.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return self._path(key).read_bytes()

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        with self._errors(key), self._path(key).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    end = f"ends at byte {offset + done}, expected {offset + len(buffer)}"
                    fix = "delete it and build the engine again"
                    raise DataLoss(f"{key} in {self.root} {end}: {fix}", reason="OBJECT_TRUNCATED")
                done += count

    def read_ahead(self, key: str, offset: int, size: int) -> bool:
        with self._errors(key), self._path(key).open("rb", buffering=0) as file:
            if not _cached(file, offset + size - 1):
                os.pread(file.fileno(), size, offset)
        return True

    def size(self, key: str) -> int | None:
        with self._errors(key):
            path = self._path(key)
            return path.stat().st_size if path.is_file() else None

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self._errors(key), self._written(data) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                return False
            _sync(path.parent)
            return True

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors(key), self._written(data) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
            _sync(path.parent)

    def upload(self, key: str, path: Path, progress: Progress | None = None, *, move: bool = False) -> None:
        total = path.stat().st_size
        report = progress or (lambda *_: None)
        with self._errors(key):
            if move and self.size(key) != total:
                self._try_move(key, path)
            while self.size(key) != total and not self._try_upload(key, path, total, report):
                pass  # its partial was taken away: it begins again
        report(total, total)

    def _try_move(self, key: str, path: Path) -> None:
        """Does nothing where the file lies on another file system."""
        final = self._path(key)
        if path.stat().st_dev != self.root.stat().st_dev:
            return
        with path.open("rb") as file:
            os.fsync(file.fileno())
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.replace(final)
        except OSError as error:
            if error.errno == errno.EXDEV:  # two mounts of one device
                return
            raise
        _sync(final.parent)

    def link(self, key: str, file: Path) -> bool:
        """Makes a file that never changes an object, without a copy; False where its file system has no such links.

        Also False where an object of that key is there.
        """
        final = self._path(key)
        with self._errors(key):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                final.hardlink_to(file)
            except OSError as error:
                if error.errno in _NO_LINK:
                    return False
                raise
            _sync(final.parent)
            return True

    def file(self, key: str) -> Path:
        """Where an object lies."""
        return self._path(key)

    def _try_upload(self, key: str, path: Path, total: int, report: Progress) -> bool:
        """An upload under the partial file's lock; False if that file is not at its place any more when it is whole.

        Locks keep `discard_partial` away from it, but not people, nor file systems that have locks on one machine only.
        """
        final, partial = (
            self._path(key),
            self._partial / key.replace("/", ","),
        )  # a comma is in no key: none share a partial
        with path.open("rb") as source, self._locked(partial) as target:
            if self.size(key) == total:
                partial.unlink(missing_ok=True)
                return True
            try:
                self._copy(source, target, total, report)
            except OSError as error:
                if error.errno in _FULL:
                    partial.unlink(missing_ok=True)  # it would keep the disk full for everybody
                raise
            final.parent.mkdir(parents=True, exist_ok=True)
            if not _is_at(target, partial):
                return False
            partial.replace(final)
            _sync(final.parent)
            return True

    @staticmethod
    @contextmanager
    def _locked(partial: Path) -> Iterator[BinaryIO]:
        """The partial file, ours alone: a second upload of the same content waits, then finds it done."""
        while True:
            with partial.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_at(file, partial):
                    yield file
                    return
                # while we waited it became an object, which is never written to again, or was discarded

    @staticmethod
    def _copy(source: BinaryIO, target: BinaryIO, total: int, report: Progress) -> None:
        """Appends what is missing; an earlier upload's bytes count as far as they equal the source."""
        target.seek(0)
        done = 0
        while (there := target.read(_COPY_SIZE)) and there == source.read(len(there)):
            done += len(there)
        target.truncate(done)
        source.seek(done)
        while data := source.read(_COPY_SIZE):
            target.write(data)
            done += len(data)
            report(done, total)
        target.flush()
        os.fsync(target.fileno())

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._errors(prefix):
            base = self.root / check_prefix(prefix)
            found = [entry for path in base.rglob("*") if (entry := self._entry(path))]
        yield from sorted(found)

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._path(key).unlink(missing_ok=True)

    def discard_partial(self, age: float) -> int:
        count = 0
        with self._errors("what uploads have left"):
            for path in self._partial.iterdir():
                # FileNotFoundError: it has just ended; BlockingIOError: whoever writes it is alive
                with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(file, path) and path.stat().st_mtime <= time.time() - age:
                        path.unlink()
                        count += 1
        return count

    def _entry(self, path: Path) -> Entry | None:
        """What a listing says of a file; None for a directory, what is no key, and what has just been deleted."""
        key = path.relative_to(self.root).as_posix()
        with suppress(FileNotFoundError):
            if is_key(key) and path.is_file():
                status = path.stat()
                return Entry(key, status.st_size, status.st_mtime)
        return None

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A temporary file that holds `data`, locked like a partial one, gone afterwards."""
        with self._temporary() as (file, path):
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                path.chmod(0o644)
                yield path
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[BinaryIO, Path]]:
        while True:
            handle, name = tempfile.mkstemp(dir=self._partial)
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_at(file, Path(name)):  # else it was discarded before it was locked
                    yield file, Path(name)
                    return

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns the operating system's errors into ours, naming the store and the object."""
        try:
            yield
        except EnginehouseError:
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound(f"store {self.root} has no {what}", reason="OBJECT_NOT_FOUND") from None
        except PermissionError as error:
            raise PermissionDenied(
                f"store {self.root}: {error.strerror}: {error.filename}", reason="STORE_DENIED"
            ) from None
        except OSError as error:
            if error.errno in _FULL:
                full = f"store {self.root} is full while writing {what}: free some space and repeat"
                raise ResourceExhausted(full, reason="STORE_FULL") from None
            raise Unavailable(f"store {self.root}: {error}", reason="STORE_UNAVAILABLE") from None


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync(directory: Path) -> None:
    """Makes new names in a directory survive a loss of power."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cached(file: BinaryIO, offset: int) -> bool:
    """Whether the page cache has a byte of a file, where the system tells."""
    with suppress(OSError, AttributeError):  # it has not; or there is no such call
        return os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    return False
