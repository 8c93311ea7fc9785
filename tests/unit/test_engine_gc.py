"""Garbage collection: what it deletes, what it never does, and builds that run beside it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from store_harness import keys
from test_engine_registry import manifest

from engine import backends, checkpoints, gc, inventory, pins, registry, s3_transport, signing, sweeps
from engine.blobs import blob_key, describe, put_bytes
from engine.directory import DirectoryStore
from engine.errors import DataLoss, EnginehouseError, FailedPrecondition, NotFound, Unavailable
from engine.gc import DAY, collect
from engine.manifest import Manifest
from engine.pins import pinned
from engine.store import Store
from engine.sweeps import sweeping

FILES = (("program.json", b"{}"), ("weights", b"w"), ("tokenizer.json", b"t"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    """A directory, so that objects can be made old."""
    return DirectoryStore(root)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol in a second instead of a minute; a sweep that stands still is not lost."""
    for name, seconds in (("_POLL", 0.01), ("_BEAT", 0.03), ("_DEAD", 1.0), ("_LOST", 20.0)):
        monkeypatch.setattr(sweeps, name, seconds)


def age(root: Path, seconds: float, *prefixes: str) -> None:
    """Makes all objects under these prefixes so much older."""
    for prefix in prefixes or ("",):
        for path in (root / prefix).rglob("*"):
            if path.is_file():
                modified = path.stat().st_mtime - seconds
                os.utime(path, (modified, modified))


def put(store: Store, data: bytes) -> str:
    return blob_key(put_bytes(store, "x", data).digest)


def publish(store: Store, variant: int = 0, extra: bytes | None = None) -> Manifest:
    """An engine of the same files as every other variant, and one of its own if given."""
    for name, data in FILES:
        put_bytes(store, name, data)
    new = manifest(variant)
    if extra is not None:
        put_bytes(store, "extra", extra)
        new = msgspec.structs.replace(new, tokenizer=(*new.tokenizer, describe("extra", extra)))
    return registry.publish(store, new)


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What is deleted


def test_old_blobs_that_nothing_names_are_deleted(store: Store, root: Path) -> None:
    kept, lost = publish(store, extra=b"mine"), put(store, b"lost" * 10)
    age(root, 2 * DAY)
    young = put(store, b"young")
    report = collect(store)
    assert (report.kept, report.young, report.deleted) == (gc.Amount(4, 8), gc.Amount(1, 5), gc.Amount(1, 40))
    assert store.size(lost) is None
    assert store.size(young) == 5
    assert registry.missing_files(store, kept) == []
    assert keys(store, "gc/") == []
    assert collect(store).deleted == gc.Amount(0, 0)


@pytest.mark.parametrize(
    ("grace", "hours", "deleted"), [(DAY, 23.9, 0), (DAY, 24.1, 1), (3600, 0.9, 0), (3600, 1.1, 1)]
)
def test_grace(store: Store, root: Path, grace: float, hours: float, deleted: int) -> None:
    put(store, b"x")
    age(root, hours * 3600)
    assert collect(store, grace).deleted.count == deleted


def test_the_stores_clock_decides(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose clock is a year behind; this machine's clock plays no part."""

    class Behind(DirectoryStore):
        def list(self, prefix: str) -> Iterator[Any]:
            return (entry._replace(modified=entry.modified - 365 * DAY) for entry in super().list(prefix))

    store = Behind(root)
    put(store, b"x")
    assert collect(store).young.count == 1
    age(root, 2 * DAY)
    assert collect(store).deleted.count == 1


def test_a_dry_run_changes_nothing(store: Store, root: Path) -> None:
    publish(store)
    put(store, b"lost")
    checkpoint = checkpoints.put(store, checkpoints.UploadedCheckpoint((put_bytes(store, "c", b"c" * 7),)))
    store.create("builds/b1/job.json", b"1")
    store.create("pins/p.json", b'{"digests":[]}')
    age(root, 40 * DAY)
    before = everything(root)
    told = collect(store, dry_run=True)
    assert everything(root) == before
    assert (told.deleted, told.checkpoints, told.builds, told.pins) == (gc.Amount(2, 11), 1, 1, 1)
    done = collect(store)
    assert (done.deleted, done.checkpoints, done.builds, done.pins) == (gc.Amount(2, 11), 1, 1, 1)
    assert (told.dry_run, done.dry_run) == (True, False)
    assert keys(store, "builds/") == keys(store, "pins/") == []
    with pytest.raises(NotFound):
        checkpoints.get(store, checkpoint)


def test_blobs_that_a_removed_engine_shared_stay(store: Store, root: Path) -> None:
    first, second = publish(store, 1, extra=b"first"), publish(store, 2, extra=b"second")
    age(root, 2 * DAY)
    store.delete(f"engines/{first.engine_id}.json")
    assert collect(store).deleted == gc.Amount(1, 5)
    assert registry.missing_files(store, second) == []
    store.delete(f"engines/{second.engine_id}.json")
    assert collect(store).deleted.count == 4
    assert keys(store, "blobs/") == []


def test_uploaded_checkpoints_are_kept_for_a_week(store: Store, root: Path) -> None:
    ref = put_bytes(store, "model.safetensors", b"weights")
    uploaded = checkpoints.UploadedCheckpoint((ref,))
    checkpoints.put(store, uploaded)
    age(root, 6.9 * DAY)
    assert collect(store).deleted.count == 0
    age(root, 0.2 * DAY)
    checkpoints.put(store, uploaded)  # offered again
    assert collect(store).checkpoints == 0
    age(root, 7.1 * DAY)
    with pinned(store, [ref.digest]):  # being offered again
        assert collect(store).checkpoints == 0
    report = collect(store)
    assert (report.checkpoints, report.deleted.count) == (1, 1)
    assert keys(store) == []


def test_records_of_jobs_go_when_the_newest_is_30_days_old(store: Store, root: Path) -> None:
    for key in ("builds/a/job.json", "builds/a/events/0.json", "builds/b/job.json", "joins/x.json", "joins/y.json"):
        store.create(key, b"1")
    age(root, 31 * DAY)
    for key in ("builds/b/events/1.json", "joins/z.json"):
        store.create(key, b"1")
    os.utime(root / "joins/y.json")
    assert collect(store).builds == 2
    assert keys(store) == ["builds/b/events/1.json", "builds/b/job.json", "joins/y.json", "joins/z.json"]


def test_a_job_that_still_waits_keeps_its_records_however_old(store: Store, root: Path):
    for key in ("builds/a/0.json", "queue/a", "builds/b/0.json", "ended/b.json"):
        store.create(key, b"1")
    age(root, gc.BUILD_LIFE + 60, "builds", "queue", "ended")
    collect(store)
    assert keys(store) == ["builds/a/0.json", "queue/a"]


def test_records_of_uploaded_files_go_with_the_checkpoints_that_need_them(store: Store, root: Path):
    ref = put_bytes(store, "config.json", b"{}")
    other = put_bytes(store, "x", b"x")
    for digest in (ref.digest, other.digest):
        store.create(f"uploads/{digest}.json", b"1")
    age(root, gc.CHECKPOINT_LIFE + 60, "uploads", "blobs")
    checkpoints.put(store, checkpoints.UploadedCheckpoint((ref,)))
    collect(store)
    assert keys(store, "uploads/") == [f"uploads/{ref.digest}.json"]
    assert keys(store, "blobs/") == [blob_key(ref.digest)]


def test_interrupted_uploads_are_dropped(store: Store, root: Path) -> None:
    (root / ".partial/blobs,x").write_bytes(b"half")
    assert collect(store).partial == 0
    age(root, 2 * DAY, ".partial")
    assert collect(store).partial == 1


def test_signatures_without_an_engine_go(store: Store, root: Path, tmp_path: Path) -> None:
    private = signing.generate(tmp_path / "key")
    engine, other = publish(store, 1).engine_id, publish(store, 2).engine_id
    for engine_id in (engine, other):
        signing.sign(store, engine_id, private)
    store.delete(f"engines/{other}.json")
    assert collect(store).signatures == 0
    age(root, 2 * DAY)
    assert collect(store).signatures == 1
    assert signing.all_claims(store) == {engine: [private.public.id]}


@pytest.mark.parametrize(
    ("key", "data", "kind"),
    [
        (f"engines/{'0' * 64}.json", b"{", DataLoss),
        (f"engines/{'0' * 64}.json", b'{"format_version": 9}', FailedPrecondition),
        ("engines/x.json", b"{}", DataLoss),
        (f"checkpoints/{'0' * 64}.json", b"{", DataLoss),
        ("checkpoints/x.json", b"{}", DataLoss),
        ("pins/x.json", b"{", DataLoss),
    ],
)
def test_what_cannot_be_read_stops_it_before_the_first_delete(
    store: Store, root: Path, key: str, data: bytes, kind: type[EnginehouseError]
) -> None:
    publish(store)
    put(store, b"lost")
    store.create("builds/a/job.json", b"1")
    age(root, 100 * DAY)
    store.create(key, data)
    before = everything(root)
    for dry_run in (True, False):
        with pytest.raises(kind, match=key.split("/")[1].removesuffix(".json")):
            collect(store, dry_run=dry_run)
    assert everything(root) == before


# Beside builds


class Pausing(DirectoryStore):
    """Stops at the first call that is chosen, until it is told to go on."""

    def __init__(self, root: Path, at: Callable[[str, str], bool]) -> None:
        super().__init__(root)
        self._at = at
        self.reached, self.go_on = threading.Event(), threading.Event()

    def _pass(self, verb: str, key: str) -> None:
        if not self.reached.is_set() and self._at(verb, key):
            self.reached.set()
            assert self.go_on.wait(60)

    def read(self, key: str) -> bytes:
        self._pass("read", key)
        return super().read(key)

    def size(self, key: str) -> int | None:
        self._pass("size", key)
        return super().size(key)

    def create(self, key: str, data: bytes) -> bool:
        self._pass("create", key)
        return super().create(key, data)

    def replace(self, key: str, data: bytes) -> None:
        self._pass("replace", key)
        super().replace(key, data)

    def list(self, prefix: str) -> Iterator[Any]:
        self._pass("list", prefix)
        return super().list(prefix)

    def delete(self, key: str) -> None:
        self._pass("delete", key)
        super().delete(key)


def build(store: Store, variant: int = 0) -> Manifest:
    """What the pipeline does: everything is there already, and old."""
    with pinned(store, [file.digest for file in manifest(variant).files()]):
        return publish(store, variant)


def at(verb: str, prefix: str) -> Callable[[str, str], bool]:
    return lambda *call: call[0] == verb and call[1].startswith(prefix)


@pytest.fixture
def old(store: Store, root: Path) -> None:
    """Blobs that a build will find and no manifest names."""
    for name, data in FILES:
        put_bytes(store, name, data)
    age(root, 2 * DAY)


SWEEP_STOPS = [
    ("create", "gc/sweeps/"),
    ("list", "gc/sweeps/"),
    ("replace", "gc/sweeps/"),
    ("replace", "gc/clock/"),
    ("list", "pins/"),
    ("list", "checkpoints/"),
    ("list", "engines/"),
    ("list", "blobs/"),
    ("delete", "blobs/"),
    ("delete", "gc/sweeps/"),
]
BUILD_STOPS = [
    ("replace", "pins/"),
    ("list", "gc/sweeps/"),
    ("size", "blobs/"),
    ("create", "engines/"),
    ("read", "engines/"),
    ("delete", "pins/"),
]


@pytest.mark.usefixtures("old", "quick")
@pytest.mark.parametrize("stop", SWEEP_STOPS, ids="-".join)
def test_a_build_that_begins_while_a_sweep_stands_anywhere_loses_nothing(
    root: Path, stop: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "_DEAD", 60.0)
    paused = Pausing(root, at(*stop))
    with ThreadPoolExecutor(2) as pool:
        sweep = pool.submit(collect, paused)
        assert paused.reached.wait(60)
        building = pool.submit(build, DirectoryStore(root))
        time.sleep(0.15)  # the build may end, or wait for the sweep
        paused.go_on.set()
        built = building.result(50)
        sweep.result(50)
    assert registry.missing_files(DirectoryStore(root), built) == []


@pytest.mark.usefixtures("old", "quick")
@pytest.mark.parametrize("stop", BUILD_STOPS, ids="-".join)
def test_a_build_that_stands_anywhere_loses_nothing_to_a_whole_sweep(root: Path, stop: tuple[str, str]) -> None:
    paused = Pausing(root, at(*stop))
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build, paused)
        assert paused.reached.wait(60)
        collect(DirectoryStore(root))
        paused.go_on.set()
        built = building.result(50)
    assert registry.missing_files(DirectoryStore(root), built) == []
    assert collect(DirectoryStore(root)).deleted.count == 0


@pytest.mark.usefixtures("old", "quick")
@pytest.mark.parametrize("sweep_stop", [("list", "pins/"), ("list", "engines/"), ("list", "blobs/")], ids="-".join)
@pytest.mark.parametrize("build_stop", BUILD_STOPS, ids="-".join)
def test_both_stand_and_the_build_ends_first(
    root: Path, sweep_stop: tuple[str, str], build_stop: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "_DEAD", 60.0)
    build_store, sweep_store = Pausing(root, at(*build_stop)), Pausing(root, at(*sweep_stop))
    with ThreadPoolExecutor(2) as pool:
        building = pool.submit(build, build_store)
        assert build_store.reached.wait(60)
        sweep: Future[gc.Report] = pool.submit(collect, sweep_store)
        assert sweep_store.reached.wait(60)
        build_store.go_on.set()
        time.sleep(0.1)
        sweep_store.go_on.set()
        sweep.result(50)
        built = building.result(50)
    assert registry.missing_files(DirectoryStore(root), built) == []


@pytest.mark.usefixtures("old", "quick")
def test_without_a_pin_the_same_build_loses_its_blobs(root: Path) -> None:
    """The interleaving that pins are for, to show that these tests see it."""
    paused = Pausing(root, at("create", "engines/"))
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(publish, paused)
        assert paused.reached.wait(60)
        collect(DirectoryStore(root))
        paused.go_on.set()
        built = building.result(50)
    assert len(registry.missing_files(DirectoryStore(root), built)) == 3


@pytest.mark.usefixtures("old")
def test_a_pin_is_gone_after_its_build_and_keeps_what_it_names_for_a_day_after_its_death(
    store: Store, root: Path
) -> None:
    with pinned(store, ["ab" * 32]):
        assert len(keys(store, "pins/")) == 1
    assert keys(store, "pins/") == []
    pins.hold(
        store, [file.digest for file in manifest().files()]
    )  # as a pin whose holder was killed: nobody removes it
    assert collect(store).deleted.count == 0
    age(root, DAY - 60, "pins")
    assert collect(store).deleted.count == 0
    age(root, 61, "pins")
    report = collect(store)
    assert (report.pins, report.deleted.count) == (1, 3)
    assert keys(store) == []


def test_a_held_pin_is_written_again_every_hour(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(sweeps, "clock", lambda: now[0])
    with pinned(store, ["ab" * 32]) as pin:
        age(root, 50 * 60, "pins")
        (entry,) = store.list("pins/")
        now[0] += 50 * 60
        pin.refresh()
        assert list(store.list("pins/")) == [entry]
        now[0] += 11 * 60
        pin.refresh()
        assert [renewed.modified - entry.modified > 2900 for renewed in store.list("pins/")] == [True]
        now[0] += 24 * 3600
        with pytest.raises(Unavailable, match="may have been deleted") as caught:
            pin.refresh()
        assert caught.value.reason == "PIN_LOST"


def test_a_pin_survives_a_store_that_is_away_for_a_while(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(DirectoryStore):
        away = False
        tries = 0

        def replace(self, key: str, data: bytes) -> None:
            self.tries += 1
            if self.away:
                raise Unavailable("away")
            super().replace(key, data)

    now = [1000.0]
    monkeypatch.setattr(sweeps, "clock", lambda: now[0])
    store = Away(root)
    with pinned(store, ["ab" * 32]) as pin:
        store.away, now[0] = True, now[0] + 3601
        pin.refresh()
        pin.refresh()
        assert store.tries == 2
        now[0] += 61
        pin.refresh()
        assert store.tries == 3


@pytest.mark.usefixtures("quick")
def test_an_engine_that_is_restored_has_its_files(root: Path) -> None:
    """A whole sweep runs between the delete of the manifest and its return, because a name was given meanwhile."""

    class Racing(DirectoryStore):
        def delete(self, key: str) -> None:
            if key == f"engines/{engine.engine_id}.json":
                registry.append(self, "demo", None, engine.engine_id)
                super().delete(key)
                collect(DirectoryStore(root))
            else:
                super().delete(key)

    store = Racing(root)
    engine = publish(store)
    age(root, 2 * DAY, "blobs")
    with pytest.raises(FailedPrecondition, match="has the name demo"):
        inventory.remove_engine(store, engine.engine_id)
    assert registry.missing_files(store, registry.manifest(store, engine.engine_id)) == []
    assert keys(store, "pins/") == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stop", [("list", "engines/"), ("list", "blobs/")], ids="-".join)
def test_no_manifest_is_taken_from_under_a_sweep_that_has_read_the_pins(
    root: Path, stop: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "_DEAD", 60.0)
    store = DirectoryStore(root)
    engine = publish(store).engine_id
    paused = Pausing(root, at(*stop))
    with ThreadPoolExecutor(2) as pool:
        sweep = pool.submit(collect, paused)
        assert paused.reached.wait(60)
        removing = pool.submit(inventory.remove_engine, store, engine)
        time.sleep(0.15)
        assert registry.engine_ids(store) == [engine]
        paused.go_on.set()
        sweep.result(50)
        removing.result(50)
    assert registry.engine_ids(store) == []


def test_an_engine_with_a_name_is_refused_without_waiting_for_a_sweep(store: Store) -> None:
    registry.set_name(store, "demo", publish(store).engine_id)
    store.create("gc/sweeps/x.json", b'{"number":7,"running":true}')
    began = time.monotonic()
    with pytest.raises(FailedPrecondition, match="has the name demo"):
        inventory.remove_engine(store, manifest().engine_id)
    assert time.monotonic() - began < 30


def test_an_engine_that_is_restored_without_its_files_is_told(root: Path) -> None:
    """A blob that somebody deletes by hand: no pin helps."""

    class Racing(DirectoryStore):
        def delete(self, key: str) -> None:
            if key == f"engines/{engine.engine_id}.json":
                registry.append(self, "demo", None, engine.engine_id)
                super().delete(blob_key(engine.tokenizer[0].digest))
            super().delete(key)

    store = Racing(root)
    engine = publish(store)
    with pytest.raises(DataLoss, match=f"{engine.tokenizer[0].digest}.*build it again from demo") as caught:
        inventory.remove_engine(store, engine.engine_id)
    assert caught.value.reason == "ENGINE_DAMAGED"
    assert registry.manifest(store, engine.engine_id) == engine


# Several sweeps, dead sweeps


def test_a_delete_has_landed_before_others_take_its_sweep_for_dead() -> None:
    """It begins when the marker is as old as it may be, and is tried until the store's patience is over."""
    assert sweeps._DEAD > sweeps._LOST + backends.PATIENCE + 2 * s3_transport.READ_TIMEOUT


def test_a_marker_that_does_not_change_is_no_dead_sweep_before_its_deletes_have_landed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: now[0])
    store.create("gc/sweeps/x.json", b'{"number":7,"running":true}')
    observer = sweeps._Observer(store)
    for seconds, sign in ((0.0, sweeps._Sign.SILENT), (59.0, sweeps._Sign.SILENT), (1.5, sweeps._Sign.DEAD)):
        now[0] += seconds
        assert observer.look("gc/sweeps/x.json") == (sign, True)


@pytest.mark.usefixtures("quick")
def test_a_second_sweep_is_refused_while_the_first_is_alive(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_DEAD", 60.0)
    with sweeping(store) as first:
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match="another garbage collection runs") as caught:
                collect(store)
            assert caught.value.reason == "SWEEP_RUNNING"
        first.check()
        assert len(keys(store, "gc/")) == 1
    assert keys(store, "gc/") == []
    collect(store)


@pytest.mark.usefixtures("quick")
def test_of_sweeps_that_start_at_once_one_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_DEAD", 60.0)
    gate, inside, most, lock = threading.Barrier(6), 0, 0, threading.Lock()

    def sweep(_: int) -> bool:
        nonlocal inside, most
        gate.wait()
        try:
            with sweeping(store):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.3)
                with lock:
                    inside -= 1
        except FailedPrecondition:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(sweep, range(6)))
    assert (sum(won), most) == (1, 1)
    assert keys(store, "gc/") == []


@pytest.mark.usefixtures("old", "quick")
@pytest.mark.parametrize("running", ["true", "false"])
def test_a_killed_sweep_stops_nobody_for_long(store: Store, running: str) -> None:
    key = f"gc/sweeps/{'0' * 16}.json"
    store.create(key, f'{{"number":7,"running":{running}}}'.encode())
    began = time.monotonic()
    with pinned(store, []):
        waited = time.monotonic() - began
    assert sweeps._DEAD <= waited < 50
    assert collect(store).deleted.count == 3
    assert keys(store) == []


@pytest.mark.usefixtures("old", "quick")
def test_a_sweep_whose_process_is_killed(store: Store, root: Path) -> None:
    code = (
        "import sys, time\nfrom engine.backends import open_store\nfrom engine.sweeps import sweeping\n"
        "with sweeping(open_store(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"in\n"
        process.kill()
    assert len(keys(store, "gc/sweeps/")) == 1
    assert collect(store).deleted.count == 3
    assert keys(store) == []


@pytest.mark.usefixtures("quick")
def test_a_build_waits_for_a_sweep_that_lives(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_DEAD", 3.0)  # a hundred beats: on a busy machine some come late
    with ThreadPoolExecutor(1) as pool:
        with sweeping(store):
            building = pool.submit(build, store)
            time.sleep(1.5 * sweeps._DEAD)
            assert not building.done()
        building.result(50)


@pytest.mark.usefixtures("old")
def test_a_sweep_that_cannot_tell_that_it_is_alive_deletes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process stands still between its mark and its first delete, as a machine that sleeps does."""
    now = [1000.0]
    monkeypatch.setattr(sweeps, "clock", lambda: now[0])
    store = Pausing(root, at("list", "blobs/"))
    with ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(collect, store)
        assert store.reached.wait(60)
        now[0] += 10.5
        store.go_on.set()
        with pytest.raises(Unavailable) as caught:
            sweep.result(50)
    assert caught.value.reason == "SWEEP_LOST"
    assert len(keys(store, "blobs/")) == 3


def test_a_sweep_that_others_may_have_seen_dead_never_counts_as_alive_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(sweeps, "clock", lambda: now[0])
    monkeypatch.setattr(sweeps, "_BEAT", 0.02)
    with sweeping(store) as sweep:
        now[0] += 10.5
        time.sleep(0.1)  # it would beat now, and look alive
        (before,) = [store.read(key) for key in keys(store, "gc/sweeps/")]
        now[0] -= 10.5
        with pytest.raises(Unavailable):
            sweep.check()
        time.sleep(0.1)
        assert [store.read(key) for key in keys(store, "gc/sweeps/")] == [before]


@pytest.mark.usefixtures("old", "quick")
def test_a_store_that_fails_amid_the_deletes_leaves_no_marker(root: Path) -> None:
    class Failing(DirectoryStore):
        def delete(self, key: str) -> None:
            if key.startswith("blobs/"):
                raise Unavailable("away")
            super().delete(key)

    with pytest.raises(Unavailable, match="away"):
        collect(Failing(root))
    assert collect(DirectoryStore(root)).deleted.count == 3
