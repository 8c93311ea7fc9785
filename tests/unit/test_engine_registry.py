"""Engines by id and by name, on every backend of the `store` fixture."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from engine import names, registry
from engine.blobs import blob_key, describe, put_bytes
from engine.directory import DirectoryStore
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from engine.fingerprint import Fingerprint
from engine.manifest import Limits, Manifest, ModelFacts, Parallelism, Rank, engine_id
from engine.store import Store


def manifest(variant: int = 0) -> Manifest:
    identity = {"variant": variant}
    return Manifest(
        engine_id=engine_id(identity),
        identity=identity,
        source="demo",
        created="2026-01-01T00:00:00+00:00",
        model=ModelFacts("LlamaForCausalLM", 10, 1, 8, 2, 1, "float32", 64, (2,), 100),
        limits=Limits(4, 128, 64),
        mapping=Parallelism(),
        fingerprint=Fingerprint("torch", "cpu"),
        ranks=(Rank(describe("program.json", b"{}"), (describe("weights", b"w"),)),),
        tokenizer=(describe("tokenizer.json", b"t"),),
    )


def history(store: Store, name: str) -> list[registry.NameRecord]:
    """What a name has stood for, oldest first."""
    return list(registry.newest_first(store, name))[::-1]


def publish(store: Store, variant: int = 0) -> str:
    for name, data in (("program.json", b"{}"), ("weights", b"w"), ("tokenizer.json", b"t")):
        put_bytes(store, name, data)
    return registry.publish(store, manifest(variant)).engine_id


# Engines


def test_a_published_engine_is_found(store: Store):
    engine = publish(store)
    assert registry.manifest(store, engine) == manifest()
    assert registry.find_manifest(store, engine) == manifest()


def test_an_engine_that_is_not_there(store: Store):
    assert registry.find_manifest(store, "0" * 64) is None
    with pytest.raises(NotFound, match="no engine 000000000000") as caught:
        registry.manifest(store, "0" * 64)
    assert caught.value.metadata == {"engine_id": "0" * 64}


@pytest.mark.parametrize("engine", ["", "abc", "G" * 64, "0" * 63, "0" * 65, "A" * 64, "../" + "0" * 61])
def test_what_is_no_engine_id(store: Store, engine: str):
    with pytest.raises(InvalidArgument, match="64 hexadecimal digits"):
        registry.manifest(store, engine)


@pytest.mark.parametrize("missing", ["program.json", "weights", "tokenizer.json"])
def test_an_engine_without_one_of_its_files_is_not_published(store: Store, missing: str):
    for name, data in (("program.json", b"{}"), ("weights", b"w"), ("tokenizer.json", b"t")):
        if name != missing:
            put_bytes(store, name, data)
    with pytest.raises(NotFound, match=missing) as caught:
        registry.publish(store, manifest())
    assert caught.value.reason == "BLOB_NOT_FOUND"
    assert registry.find_manifest(store, manifest().engine_id) is None


def test_an_engine_with_a_truncated_file_is_not_published(store: Store):
    publish(store, 1)
    weights = manifest().ranks[0].weights[0]
    store.replace(f"blobs/sha256/{weights.digest[:2]}/{weights.digest}", b"")
    with pytest.raises(NotFound, match="weights"):
        registry.publish(store, manifest(2))


def test_the_first_manifest_wins(store: Store):
    publish(store)
    later = msgspec.structs.replace(manifest(), created="2027-01-01T00:00:00+00:00")
    assert registry.publish(store, later) == manifest()
    assert registry.manifest(store, manifest().engine_id) == manifest()


def test_an_earlier_manifest_of_which_a_file_is_lost_does_not_count_silently(store: Store):
    """It names a file that this build has in another form: nobody would put it there again."""
    publish(store)
    extra = put_bytes(store, "extra", b"extra")
    earlier = msgspec.structs.replace(manifest(5), tokenizer=(extra,))
    registry.publish(store, earlier)
    assert registry.publish(store, manifest(5)) == earlier
    store.delete(blob_key(extra.digest))
    with pytest.raises(DataLoss, match=f"{extra.digest}.* is lost: .*engines rm {earlier.engine_id}") as caught:
        registry.publish(store, manifest(5))
    assert caught.value.reason == "ENGINE_DAMAGED"
    put_bytes(store, "extra", b"extra")
    assert registry.publish(store, manifest(5)) == earlier


def test_racing_publishers_agree(store: Store):
    publish(store, 1)
    gate = threading.Barrier(8)

    def race(writer: int) -> Manifest:
        gate.wait()
        return registry.publish(store, msgspec.structs.replace(manifest(), source=f"writer {writer}"))

    with ThreadPoolExecutor(8) as pool:
        assert len({found.source for found in pool.map(race, range(8))}) == 1


def test_a_manifest_under_another_engines_id_is_data_loss(store: Store):
    publish(store)
    store.create(f"engines/{'0' * 64}.json", manifest().to_json())
    with pytest.raises(DataLoss, match="holds engine"):
        registry.manifest(store, "0" * 64)


# Names


def test_a_name_stands_for_the_engine_it_was_given_last(store: Store):
    first, second = publish(store, 1), publish(store, 2)
    assert registry.latest(store, "demo") is None
    for sequence, engine in ((1, first), (2, second)):
        record = registry.set_name(store, "demo", engine)
        assert (record.name, record.sequence, record.engine_id) == ("demo", sequence, engine)
        assert abs(datetime.fromisoformat(record.created) - datetime.now(UTC)) < timedelta(minutes=1)
    assert registry.resolve(store, "demo").engine_id == second
    assert registry.set_name(store, "demo", first).sequence == 3
    assert [(record.sequence, record.engine_id) for record in history(store, "demo")] == [
        (1, first),
        (2, second),
        (3, first),
    ]


def test_a_name_that_has_the_engine_already_stays(store: Store):
    engine = publish(store)
    assert registry.set_name(store, "demo", engine) == registry.set_name(store, "demo", engine)
    assert len(history(store, "demo")) == 1


def test_the_tenth_change_comes_after_the_ninth(store: Store):
    engines = [publish(store, 1), publish(store, 2)]
    for turn in range(12):
        registry.set_name(store, "demo", engines[turn % 2])
    last = registry.resolve(store, "demo")
    assert (last.sequence, last.engine_id) == (12, engines[1])
    assert [record.sequence for record in history(store, "demo")] == list(range(1, 13))


def test_names_are_listed_sorted_and_kept_apart(store: Store):
    engine = publish(store)
    for name in ("b", "a", "a.1", "a-b"):
        registry.set_name(store, name, engine)
    assert registry.names(store) == ["a", "a-b", "a.1", "b"]
    assert len(history(store, "a")) == 1


def test_an_unknown_name_comes_with_those_there_are(store: Store):
    with pytest.raises(NotFound, match="no model 'demo'; there are: none yet"):
        registry.resolve(store, "demo")
    registry.set_name(store, "other", publish(store))
    with pytest.raises(NotFound, match="there are: other") as caught:
        registry.resolve(store, "demo")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert history(store, "demo") == []


def test_no_name_for_an_engine_that_is_not_there(store: Store):
    with pytest.raises(NotFound, match="no engine"):
        registry.set_name(store, "demo", "0" * 64)
    assert registry.names(store) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", ".a", "a..b", "a b", "é", "a\n", "a" * 129])
def test_bad_names_are_refused(store: Store, name: str):
    engine = publish(store)
    for attempt in (
        lambda: registry.check_name(name),
        lambda: registry.set_name(store, name, engine),
        lambda: registry.resolve(store, name),
        lambda: history(store, name),
    ):
        with pytest.raises(InvalidArgument, match="model name"):
            attempt()


def test_names_may_be_long_and_have_dots():
    assert registry.check_name("Qwen2.5-0.5B_instruct") == "Qwen2.5-0.5B_instruct"
    assert registry.check_name("a" * 128)


def test_two_writers_of_one_name_lose_nothing(store: Store):
    pairs = [[publish(store, 1), publish(store, 2)], [publish(store, 3), publish(store, 4)]]
    gate = threading.Barrier(2)

    def write(engines: list[str]) -> list[registry.NameRecord]:
        gate.wait()
        return [registry.set_name(store, "demo", engines[turn % 2]) for turn in range(15)]

    with ThreadPoolExecutor(2) as pool:
        records = [record for written in pool.map(write, pairs) for record in written]
    kept = history(store, "demo")
    assert [record.sequence for record in kept] == list(range(1, 31))
    assert sorted(records, key=lambda record: record.sequence) == kept


def test_a_record_without_a_time_is_read(store: Store):
    engine = publish(store)
    store.create("models/demo/0000000001.json", f'{{"name":"demo","sequence":1,"engine_id":"{engine}"}}'.encode())
    assert registry.resolve(store, "demo") == registry.NameRecord("demo", 1, engine, "")


def test_what_is_no_record_is_no_name(store: Store):
    registry.set_name(store, "demo", publish(store))
    store.create("models/demo/README.md", b"x")
    store.create("models/other/notes/0000000001.json", b"x")
    assert registry.names(store) == ["demo"]
    assert registry.resolve(store, "demo").sequence == 1


def test_a_damaged_record_hides_no_other_name(store: Store):
    registry.set_name(store, "demo", publish(store))
    store.create("models/bad/0000000001.json", b"{")
    assert registry.names(store) == ["bad", "demo"]
    for read in (lambda: registry.resolve(store, "bad"), lambda: registry.named(store)):
        with pytest.raises(DataLoss, match="models/bad/0000000001.json"):
            read()


class CountingStore(DirectoryStore):
    """Counts listings and reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()

    def list(self, prefix: str):
        self.calls["list"] += 1
        return super().list(prefix)

    def read(self, key: str) -> bytes:
        self.calls["read"] += 1
        return super().read(key)


def test_names_are_one_listing_and_a_record_each(tmp_path: Path):
    store = CountingStore(tmp_path)
    engines = [publish(store, 1), publish(store, 2)]
    for turn in range(4):
        for name in ("a", "b", "c"):
            registry.set_name(store, name, engines[turn % 2])
    store.calls.clear()
    assert registry.names(store) == ["a", "b", "c"]
    assert store.calls == {"list": 1, "read": 3}


# An engine by what a person types


def ids_that_begin_alike(store: Store, digits: int) -> tuple[str, str]:
    """Manifests whose ids share their first digits, made by changing what `engine_ids` sees: keys alone decide."""
    first = publish(store, 1)
    second = first[:digits] + ("0" if first[digits] != "0" else "1") + first[digits + 1 :]
    store.create(f"engines/{second}.json", b"{}")
    return first, second


def test_an_engine_is_found_by_id_prefix_or_name(store: Store):
    engine, other = publish(store, 1), publish(store, 2)
    registry.set_name(store, "demo", engine)
    for text in (engine, engine[:6], engine[:63], "demo"):
        assert registry.find_engine(store, text) == engine
    assert registry.find_engine(store, other[:6]) == other


def test_a_short_or_unknown_prefix_is_not_found(store: Store):
    engine = publish(store)
    registry.set_name(store, "demo", engine)
    for text in (engine[:5], "0" * 6, engine[:6].upper() + "Z"):
        with pytest.raises(NotFound, match=f"no model '{text}'.*there are: demo"):
            registry.find_engine(store, text)
    with pytest.raises(NotFound, match="no engine 000000000000"):
        registry.find_engine(store, "0" * 64)


def test_an_ambiguous_prefix_names_the_candidates(store: Store):
    first, second = ids_that_begin_alike(store, 8)
    with pytest.raises(InvalidArgument) as caught:
        registry.find_engine(store, first[:8])
    assert caught.value.reason == "ENGINE_AMBIGUOUS"
    assert first in caught.value.message
    assert second in caught.value.message
    assert registry.find_engine(store, first[:9]) == first


def test_a_name_wins_over_a_prefix_but_not_over_an_id(store: Store):
    engine, other = publish(store, 1), publish(store, 2)
    registry.set_name(store, engine[:6], other)
    registry.append(store, engine, None, other)  # as releases did that let such names be given
    assert registry.find_engine(store, engine[:6]) == other
    assert registry.find_engine(store, engine[:7]) == engine
    assert registry.find_engine(store, engine) == engine
    names.remove_name(store, engine[:6])
    assert registry.find_engine(store, engine[:6]) == engine
    names.remove_name(store, engine)  # it protects the other engine: it must not be there for ever
    assert registry.names(store) == []


def test_an_id_is_no_name_to_give(store: Store):
    engine = publish(store)
    registry.set_name(store, "demo", engine)
    for attempt in (
        lambda: registry.check_name("ab" * 32),
        lambda: registry.set_name(store, "ab" * 32, engine),
        lambda: names.rename(store, "demo", "ab" * 32),
    ):
        with pytest.raises(InvalidArgument, match="always read as an engine id") as caught:
            attempt()
        assert caught.value.reason == "MODEL_NAME_INVALID"
    assert registry.names(store) == ["demo"]
    assert registry.check_name("ab" * 31 + "a") == "ab" * 31 + "a"


# Names that are taken away, changed, taken back


def told(store: Store, name: str) -> list[str]:
    return [record.engine_id for record in history(store, name)]


def test_a_removed_name_stands_for_nothing_and_can_be_given_again(store: Store):
    first, second = publish(store, 1), publish(store, 2)
    registry.set_name(store, "demo", first)
    registry.set_name(store, "other", first)
    removed = names.remove_name(store, "demo")
    assert (removed.sequence, removed.engine_id) == (2, "")
    assert registry.names(store) == ["other"]
    assert [record.name for record in registry.named(store)] == ["other"]
    for attempt in (lambda: registry.resolve(store, "demo"), lambda: registry.find_engine(store, "demo")):
        with pytest.raises(NotFound, match="there are: other"):
            attempt()
    with pytest.raises(NotFound):
        names.remove_name(store, "demo")
    assert registry.set_name(store, "demo", second).sequence == 3
    assert told(store, "demo") == [first, "", second]
    assert registry.recent_engines(store, "demo", 3) == [second, first]
    assert registry.recent_engines(store, "demo", 1) == [second]


def test_rename(store: Store):
    first, second = publish(store, 1), publish(store, 2)
    registry.set_name(store, "old", first)
    registry.set_name(store, "taken", second)
    with pytest.raises(FailedPrecondition, match="'taken' stands for engine") as caught:
        names.rename(store, "old", "taken")
    assert caught.value.reason == "MODEL_NAME_TAKEN"
    with pytest.raises(FailedPrecondition):
        names.rename(store, "old", "old")
    with pytest.raises(NotFound):
        names.rename(store, "no", "new")
    with pytest.raises(InvalidArgument):
        names.rename(store, "old", "a/b")
    assert registry.names(store) == ["old", "taken"]
    assert names.rename(store, "old", "new").engine_id == first
    assert registry.names(store) == ["new", "taken"]
    assert told(store, "old") == [first, ""]
    assert names.rename(store, "new", "old").sequence == 3
    assert registry.names(store) == ["old", "taken"]


def test_a_rename_never_takes_away_what_was_given_meanwhile(tmp_path: Path):
    class Meddling(DirectoryStore):
        """Another writer gives the old name to another engine, as soon as the new name is there."""

        def create(self, key: str, data: bytes) -> bool:
            created = super().create(key, data)
            if key.startswith("models/new/"):
                registry.set_name(DirectoryStore(self.root), "old", second)
            return created

    store = Meddling(tmp_path)
    first, second = publish(store, 1), publish(store, 2)
    registry.set_name(store, "old", first)
    with pytest.raises(Unavailable, match="was changed while it was renamed"):
        names.rename(store, "old", "new")
    assert (registry.resolve(store, "old").engine_id, registry.resolve(store, "new").engine_id) == (second, first)


def test_rollback(store: Store):
    engines = [publish(store, variant) for variant in range(3)]
    for engine in engines:
        registry.set_name(store, "demo", engine)
    back = names.rollback(store, "demo")
    assert (back.sequence, back.engine_id) == (4, engines[1])
    assert names.rollback(store, "demo", 1).engine_id == engines[0]
    assert names.rollback(store, "demo", 1).sequence == 5  # it stands for that already
    assert told(store, "demo") == [*engines, engines[1], engines[0]]


def test_rollback_passes_over_engines_that_are_gone_and_brings_a_removed_name_back(store: Store):
    engines = [publish(store, variant) for variant in range(3)]
    for engine in engines:
        registry.set_name(store, "demo", engine)
    store.delete(f"engines/{engines[1]}.json")
    with pytest.raises(NotFound, match="no engine"):
        names.rollback(store, "demo", 2)
    assert names.rollback(store, "demo").engine_id == engines[0]
    names.remove_name(store, "demo")
    assert names.rollback(store, "demo").engine_id == engines[0]


def test_rollback_to_nothing(store: Store):
    with pytest.raises(NotFound, match="no model 'demo'"):
        names.rollback(store, "demo")
    registry.set_name(store, "demo", publish(store))
    with pytest.raises(FailedPrecondition, match="no other engine"):
        names.rollback(store, "demo")
    with pytest.raises(NotFound, match="no record 7"):
        names.rollback(store, "demo", 7)
    names.remove_name(store, "demo")
    with pytest.raises(FailedPrecondition, match="stood for nothing in record 2"):
        names.rollback(store, "demo", 2)


def test_a_name_is_not_left_with_an_engine_that_was_removed_meanwhile(tmp_path: Path):
    class Removing(DirectoryStore):
        """The engine goes just before the name's record is written."""

        def create(self, key: str, data: bytes) -> bool:
            if key == "models/demo/0000000001.json":
                self.delete(f"engines/{engine}.json")
            return super().create(key, data)

    store = Removing(tmp_path)
    engine = publish(store)
    with pytest.raises(NotFound, match="no engine"):
        registry.set_name(store, "demo", engine)
    assert registry.names(store) == []


@pytest.mark.parametrize("before", ["nothing", "another engine", "an engine that goes as well"])
def test_a_name_goes_back_when_its_engine_is_removed_and_restored_meanwhile(tmp_path: Path, before: str):
    """The remover deletes the manifest, the name is written, the remover sees it and restores the manifest."""

    class Removing(DirectoryStore):
        def create(self, key: str, data: bytes) -> bool:
            if is_new(data):
                self.delete(f"engines/{new}.json")
            return super().create(key, data)

        def size(self, key: str) -> int | None:
            found = super().size(key)
            if key == f"engines/{new}.json" and found is None:
                super().create(key, manifest(2).to_json())  # right after `set_name` has looked
                if before == "an engine that goes as well":
                    self.delete(f"engines/{old}.json")
            return found

    def is_new(data: bytes) -> bool:
        return b'"name"' in data and f'"engine_id":"{new}"'.encode() in data

    new = old = ""
    store = Removing(tmp_path)
    old = publish(store, 1)
    if before != "nothing":
        registry.set_name(store, "demo", old)
    new = publish(store, 2)
    with pytest.raises(NotFound, match="it was being removed while it got the name 'demo'") as caught:
        registry.set_name(store, "demo", new)
    assert caught.value.reason == "ENGINE_NOT_FOUND"
    back = old if before == "another engine" else ""
    assert told(store, "demo") == ([new, ""] if before == "nothing" else [old, new, back])
