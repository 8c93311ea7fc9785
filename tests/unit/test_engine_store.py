"""The contract of a store, for every backend of the `store` fixture."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_harness import MIB, interrupt, keys

from engine.backends import open_store
from engine.errors import DataLoss, InvalidArgument, NotFound
from engine.store import Store, check_key, check_prefix

# Small objects


def test_read_gives_what_was_created(store: Store):
    assert store.create("a/b.json", b"one")
    assert store.read("a/b.json") == b"one"
    assert store.size("a/b.json") == 3


def test_objects_may_be_empty(store: Store):
    assert store.create("empty", b"")
    assert store.read("empty") == b""
    assert store.size("empty") == 0
    store.read_into("empty", 0, memoryview(bytearray()))


def test_create_leaves_what_is_there(store: Store):
    assert store.create("key", b"first")
    assert not store.create("key", b"second")
    assert store.read("key") == b"first"


def test_of_8_racing_threads_one_creates(store: Store):
    for turn in range(3):
        gate = threading.Barrier(8)

        def create(writer: int, key: str = f"race/{turn}", gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return store.create(key, b"writer %d" % writer)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert store.read(f"race/{turn}") == b"writer %d" % won.index(True)


def test_of_8_racing_processes_one_creates(store: Store):
    script = (
        "import sys; from engine.backends import open_store; store = open_store(sys.argv[1]); print(flush=True); input()\n"
        "print([store.create(f'race/{turn}', sys.argv[2].encode()) for turn in range(20)])"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, store.url, str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for writer in range(8)
    ]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [racer.communicate(timeout=60)[0].strip("[]\n").split(", ") for racer in racers]
    for turn, results in enumerate(zip(*won, strict=True)):
        assert results.count("True") == 1
        assert store.read(f"race/{turn}").decode() == str(results.index("True"))


def test_replace_writes_over_what_is_there(store: Store):
    store.replace("key", b"first, longer")
    store.replace("key", b"second")
    assert store.read("key") == b"second"


def test_readers_see_the_old_or_the_new_while_it_is_replaced(store: Store):
    texts = [bytes([letter]) * 100_000 for letter in b"ab"]
    store.replace("key", texts[0])
    done = threading.Event()

    def replace() -> None:
        for turn in range(20):
            store.replace("key", texts[turn % 2])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        while not done.is_set() and not writing.done():
            assert store.read("key") in texts
        writing.result()


def test_delete(store: Store):
    store.create("key", b"x")
    store.delete("key")
    store.delete("key")
    assert store.size("key") is None
    assert store.create("key", b"y")


def test_what_is_missing_is_not_found(store: Store):
    assert store.size("no/such") is None
    with pytest.raises(NotFound, match="no/such"):
        store.read("no/such")
    with pytest.raises(NotFound, match="no/such"):
        store.read_into("no/such", 0, memoryview(bytearray(1)))


def test_a_prefix_is_no_object(store: Store):
    store.create("a/b", b"x")
    assert store.size("a") is None
    with pytest.raises(NotFound):
        store.read("a")


def test_list_is_sorted_and_keeps_to_the_prefix(store: Store):
    for key in ("models/b/2", "models/b/10", "models/a/1", "models-2/a", "top"):
        store.create(key, b"")
    assert keys(store, "models/") == ["models/a/1", "models/b/10", "models/b/2"]
    assert keys(store, "models/b/") == ["models/b/10", "models/b/2"]
    assert keys(store, "") == ["models-2/a", "models/a/1", "models/b/10", "models/b/2", "top"]
    assert keys(store, "nothing/") == []


def test_list_tells_sizes_and_times(store: Store, large_file: Path):
    store.create("a/small", b"123")
    store.upload("a/large", large_file)
    large, small = store.list("a/")
    assert (large.key, large.size) == ("a/large", large_file.stat().st_size)
    assert (small.key, small.size) == ("a/small", 3)
    before = small.modified
    time.sleep(1.1)  # some stores tell whole seconds
    store.replace("a/small", b"1234")
    assert 1 <= next(entry for entry in store.list("a/") if entry.key == "a/small").modified - before < 60


BAD_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../b",
    "a/..",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a b",
    "a\\b",
    "a\n",
    "é",
    "a\0",
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys_are_refused(store: Store, key: str, tmp_path: Path):
    (tmp_path / "file").touch()
    for attempt in (
        lambda: store.read(key),
        lambda: store.read_into(key, 0, memoryview(bytearray(1))),
        lambda: store.size(key),
        lambda: store.create(key, b""),
        lambda: store.replace(key, b""),
        lambda: store.upload(key, tmp_path / "file"),
        lambda: store.delete(key),
    ):
        with pytest.raises(InvalidArgument, match="no valid key"):
            attempt()
    with pytest.raises(InvalidArgument):
        check_key(key)


@pytest.mark.parametrize("prefix", ["a", "../", "/", "a/../", "/etc/", ".partial/", "a//"])
def test_bad_prefixes_are_refused(store: Store, prefix: str):
    with pytest.raises(InvalidArgument):
        list(store.list(prefix))
    with pytest.raises(InvalidArgument):
        check_prefix(prefix)


# Ranges


def test_ranges(store: Store):
    store.create("key", bytes(range(100)))
    for start, count in ((0, 100), (0, 1), (99, 1), (40, 20), (100, 0)):
        buffer = bytearray(count)
        store.read_into("key", start, memoryview(buffer))
        assert buffer == bytes(range(100))[start : start + count]


def test_a_range_fills_only_its_place(store: Store):
    store.create("key", b"0123456789")
    buffer = bytearray(b"." * 6)
    store.read_into("key", 3, memoryview(buffer)[1:4])
    assert buffer == b".345.."


@pytest.mark.parametrize(("start", "count"), [(0, 11), (9, 2), (10, 1), (50, 1)])
def test_a_range_past_the_end_is_data_loss(store: Store, start: int, count: int):
    store.create("key", b"0123456789")
    with pytest.raises(DataLoss, match="key"):
        store.read_into("key", start, memoryview(bytearray(count)))


# Uploads


def test_upload_gives_the_bytes_and_says_how_far_it_is(store: Store, large_file: Path):
    steps: list[tuple[int, int]] = []
    store.upload("blobs/x", large_file, lambda done, total: steps.append((done, total)))
    assert store.read("blobs/x") == large_file.read_bytes()
    total = large_file.stat().st_size
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_upload_of_an_empty_file(store: Store, tmp_path: Path):
    (tmp_path / "empty").touch()
    store.upload("blobs/empty", tmp_path / "empty")
    assert store.size("blobs/empty") == 0


def test_upload_does_nothing_where_the_object_is(store: Store, tmp_path: Path, large_file: Path):
    store.upload("blobs/x", large_file)
    other = tmp_path / "other"
    other.write_bytes(large_file.read_bytes()[::-1])
    steps: list[int] = []
    store.upload("blobs/x", other, lambda done, _: steps.append(done))
    assert store.read("blobs/x") == large_file.read_bytes()
    assert steps == [large_file.stat().st_size]


def test_upload_replaces_an_object_that_was_cut_off(store: Store, large_file: Path):
    store.create("blobs/x", b"cut off")
    store.upload("blobs/x", large_file)
    assert store.read("blobs/x") == large_file.read_bytes()


def test_an_interrupted_upload_is_invisible(store: Store, large_file: Path):
    interrupt(store, "blobs/x", large_file, at=4 * MIB)
    assert store.size("blobs/x") is None
    assert keys(store, "") == []
    with pytest.raises(NotFound):
        store.read("blobs/x")


def test_an_interrupted_upload_goes_on_where_it_stopped(store: Store, large_file: Path):
    interrupt(store, "blobs/x", large_file, at=8 * MIB)
    steps: list[int] = []
    store.upload("blobs/x", large_file, lambda done, _: steps.append(done))
    assert steps[0] > 8 * MIB  # the first report is of new bytes
    assert store.read("blobs/x") == large_file.read_bytes()


def test_an_interrupted_upload_of_other_bytes_does_no_harm(store: Store, large_file: Path):
    interrupt(store, "blobs/x", large_file, at=8 * MIB)
    changed = bytearray(large_file.read_bytes())
    changed[5 * MIB] ^= 1
    large_file.write_bytes(changed)
    store.upload("blobs/x", large_file)
    assert store.read("blobs/x") == changed


def test_what_an_interrupted_upload_left_can_be_discarded(store: Store, large_file: Path):
    interrupt(store, "blobs/x", large_file, at=8 * MIB)
    assert store.discard_partial(age=3600) == 0
    time.sleep(1.1)  # some stores tell whole seconds
    assert store.discard_partial(age=0) == 1
    assert store.discard_partial(age=0) == 0
    steps: list[int] = []
    store.upload("blobs/x", large_file, lambda done, _: steps.append(done))
    assert steps[0] <= 8 * MIB  # from the beginning
    assert store.read("blobs/x") == large_file.read_bytes()


def test_racing_uploads_of_one_object(store: Store, large_file: Path):
    gate = threading.Barrier(4)

    def upload(_: int) -> None:
        gate.wait()
        store.upload("blobs/x", large_file)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upload, range(4)))
    assert store.read("blobs/x") == large_file.read_bytes()
    assert keys(store, "") == ["blobs/x"]


# Opening


def test_a_store_is_found_by_its_url(store: Store):
    store.create("key", b"x")
    assert open_store(store.url).read("key") == b"x"
