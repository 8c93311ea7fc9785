"""What only the directory store can show: leftovers, locks, full disks, paths."""

import errno
import fcntl
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from store_harness import MIB, interrupt, keys

from engine.backends import open_store
from engine.directory import DirectoryStore
from engine.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from tests.conftest import small_file_system


def test_urls(tmp_path: Path):
    strange = tmp_path / "with space % and é"
    DirectoryStore(strange).create("key", b"x")
    assert open_store(strange.as_uri()).read("key") == b"x"
    assert open_store(f"file://localhost{tmp_path}").url == tmp_path.as_uri()
    for url in ("", "ftp://host/x", "file://host/x", "file:"):
        with pytest.raises(InvalidArgument, match="no store"):
            open_store(url)


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def leftover(directory: DirectoryStore, large_file: Path) -> Path:
    """The file that an upload leaves when its process dies."""
    interrupt(directory, "blobs/x", large_file, at=4 * MIB)
    (partial,) = (directory.root / ".partial").iterdir()
    return partial


@pytest.mark.parametrize(
    "left", ["nothing", "good", "good, not at a step", "wrong first byte", "wrong later byte", "whole", "longer"]
)
def test_whatever_an_upload_left_the_next_one_is_right(directory: DirectoryStore, large_file: Path, left: str):
    data = large_file.read_bytes()
    content = {
        "nothing": b"",
        "good": data[: 4 * MIB],
        "good, not at a step": data[: 5 * MIB + 3],
        "wrong first byte": b"\0" + data[1 : 6 * MIB] if data[0] else b"\1" + data[1 : 6 * MIB],
        "wrong later byte": data[: 5 * MIB] + bytes([data[5 * MIB] ^ 1]),
        "whole": data,
        "longer": data + b"more",
    }[left]
    leftover(directory, large_file).write_bytes(content)
    directory.upload("blobs/x", large_file)
    assert directory.read("blobs/x") == data
    assert list((directory.root / ".partial").iterdir()) == []


def test_a_file_that_may_move_becomes_the_object(directory: DirectoryStore, large_file: Path):
    data, inode = large_file.read_bytes(), large_file.stat().st_ino
    directory.upload("blobs/x", large_file, move=True)
    assert not large_file.exists()
    assert directory.read("blobs/x") == data
    assert (directory.root / "blobs/x").stat().st_ino == inode
    large_file.write_bytes(data)
    directory.upload("blobs/x", large_file, move=True)  # it is there: nothing to do
    assert large_file.exists()


def test_a_file_of_another_file_system_is_copied_though_it_may_move(directory: DirectoryStore, tmp_path: Path):
    with small_file_system(tmp_path / "other", "1m") as mount:
        (mount / "file").write_bytes(b"data")
        directory.upload("blobs/x", mount / "file", move=True)
    assert directory.read("blobs/x") == b"data"


def test_keys_that_look_alike_share_no_partial_file(directory: DirectoryStore, tmp_path: Path, large_file: Path):
    other = tmp_path / "other"
    other.write_bytes(random.Random(2).randbytes(9 * MIB))
    gate = threading.Barrier(2)

    def upload(key: str, path: Path) -> None:
        gate.wait()
        directory.upload(key, path)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(upload, "a/b", large_file), pool.submit(upload, "a-b", other)]:
            done.result()
    assert directory.read("a/b") == large_file.read_bytes()
    assert directory.read("a-b") == other.read_bytes()


def test_an_upload_that_waited_does_not_write_to_what_was_made_meanwhile(directory: DirectoryStore, large_file: Path):
    partial = leftover(directory, large_file)
    made = directory.root / "made"
    with ThreadPoolExecutor(1) as pool:
        with partial.open("a+b") as first:
            fcntl.flock(first, fcntl.LOCK_EX)
            second = pool.submit(directory.upload, "blobs/x", large_file)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            partial.rename(made)  # the first upload is done
            before = made.read_bytes()
        second.result(timeout=60)
    assert directory.read("blobs/x") == large_file.read_bytes()
    assert made.read_bytes() == before


def test_a_temporary_file_is_no_object_and_does_not_stay(directory: DirectoryStore):
    directory.create("key", b"x")
    directory.create("key", b"y")
    directory.replace("key", b"z")
    assert list((directory.root / ".partial").iterdir()) == []
    assert keys(directory, "") == ["key"]


def test_what_is_being_written_is_not_discarded(directory: DirectoryStore, large_file: Path):
    discarded: list[int] = []
    directory.upload("blobs/x", large_file, lambda *_: discarded.append(directory.discard_partial(age=-10)))
    assert set(discarded) == {0}
    assert directory.read("blobs/x") == large_file.read_bytes()
    with directory._written(b"x") as temporary:
        assert directory.discard_partial(age=-10) == 0
        assert temporary.read_bytes() == b"x"
    interrupt(directory, "blobs/y", large_file, at=4 * MIB)
    assert directory.discard_partial(age=-10) == 1  # nobody holds its lock


def test_a_temporary_file_that_goes_before_it_is_locked_is_made_again(
    directory: DirectoryStore, monkeypatch: pytest.MonkeyPatch
):
    flock = fcntl.flock
    discarded: list[int] = []

    def late(file: BinaryIO, how: int) -> None:
        if not discarded:
            discarded.append(0)
            discarded.append(directory.discard_partial(age=-10))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert directory.create("key", b"x")
    assert discarded == [0, 1]
    assert directory.read("key") == b"x"


@pytest.mark.parametrize("other", [False, True])
def test_an_upload_whose_partial_file_goes_begins_again(directory: DirectoryStore, large_file: Path, other: bool):
    """Somebody deletes it by hand; another upload may have begun at the same place."""
    partial = directory.root / ".partial" / "blobs,x"
    taken: list[int] = []

    def progress(done: int, total: int) -> None:
        if not taken:
            taken.append(done)
            partial.unlink()
            if other:
                partial.write_bytes(b"other")

    directory.upload("blobs/x", large_file, progress)
    assert directory.read("blobs/x") == large_file.read_bytes()
    assert list((directory.root / ".partial").iterdir()) == []


def test_others_may_read_objects(directory: DirectoryStore, large_file: Path):
    directory.create("small", b"x")
    directory.upload("large", large_file)
    assert (directory.root / "small").stat().st_mode & 0o444 == 0o444


def test_a_full_disk_in_words(directory: DirectoryStore, large_file: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory.create("before", b"x")
    monkeypatch.setattr(os, "fsync", full)
    for attempt in (
        lambda: directory.create("a/small", b"x"),
        lambda: directory.replace("before", b"y"),
        lambda: directory.upload("a/large", large_file),
    ):
        with pytest.raises(ResourceExhausted, match="is full") as caught:
            attempt()
        assert caught.value.reason == "STORE_FULL"
    monkeypatch.undo()
    assert keys(directory, "") == ["before"]
    assert directory.read("before") == b"x"
    directory.upload("a/large", large_file)
    assert directory.read("a/large") == large_file.read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with small_file_system(tmp_path / "small", "1m") as mount:
        yield mount


def test_a_disk_that_is_really_full(small_disk: Path, large_file: Path):
    store = DirectoryStore(small_disk / "store")
    store.create("before", b"x")
    for attempt in (
        lambda: store.upload("a/large", large_file),
        lambda: store.create("a/small", bytes(MIB)),
        lambda: store.replace("before", bytes(MIB)),
    ):
        with pytest.raises(ResourceExhausted, match="is full"):
            attempt()
    assert keys(store, "") == ["before"]
    assert store.read("before") == b"x"


def test_a_store_that_refuses(directory: DirectoryStore, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionDenied, match="Permission denied"):
        directory.read("key")


def test_a_store_that_cannot_be_opened(tmp_path: Path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(Unavailable, match="file"):
        DirectoryStore(tmp_path / "file" / "store")


def test_strange_files_are_not_listed(tmp_path: Path):
    store = DirectoryStore(tmp_path)
    store.create("models/demo/0000000001.json", b"1")
    (tmp_path / "models" / "demo" / ".nfs0001").touch()
    assert keys(store, "models/demo/") == ["models/demo/0000000001.json"]


def test_reading_ahead_brings_a_part_into_the_page_cache(directory: DirectoryStore, large_file: Path):
    directory.upload("blobs/x", large_file)
    file = os.open(directory.root / "blobs/x", os.O_RDONLY)

    def cached(offset: int) -> bool:
        try:
            return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError:
            pytest.skip("this file system does not tell what is cached")

    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached(large_file.stat().st_size - 1):
            pytest.skip("this file system keeps all its files in memory")
        assert directory.read_ahead("blobs/x", 0, MIB)
        assert cached(0) and cached(MIB - 1)
    finally:
        os.close(file)
    with pytest.raises(NotFound):
        directory.read_ahead("blobs/y", 0, MIB)
