"""Engines by id and by name, on every backend of the `store` fixture."""

import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from engine import registry
from engine.blobs import describe, put_bytes
from engine.errors import DataLoss, InvalidArgument, NotFound
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
    assert registry.set_name(store, "demo", first) == registry.NameRecord("demo", 1, first)
    assert registry.set_name(store, "demo", second) == registry.NameRecord("demo", 2, second)
    assert registry.resolve(store, "demo").engine_id == second
    assert registry.set_name(store, "demo", first).sequence == 3
    assert [(record.sequence, record.engine_id) for record in registry.history(store, "demo")] == [
        (1, first),
        (2, second),
        (3, first),
    ]


def test_a_name_that_has_the_engine_already_stays(store: Store):
    engine = publish(store)
    assert registry.set_name(store, "demo", engine) == registry.set_name(store, "demo", engine)
    assert len(registry.history(store, "demo")) == 1


def test_the_tenth_change_comes_after_the_ninth(store: Store):
    engines = [publish(store, 1), publish(store, 2)]
    for turn in range(12):
        registry.set_name(store, "demo", engines[turn % 2])
    assert registry.resolve(store, "demo") == registry.NameRecord("demo", 12, engines[1])
    assert [record.sequence for record in registry.history(store, "demo")] == list(range(1, 13))


def test_names_are_listed_sorted_and_kept_apart(store: Store):
    engine = publish(store)
    for name in ("b", "a", "a.1", "a-b"):
        registry.set_name(store, name, engine)
    assert registry.names(store) == ["a", "a-b", "a.1", "b"]
    assert len(registry.history(store, "a")) == 1


def test_an_unknown_name_comes_with_those_there_are(store: Store):
    with pytest.raises(NotFound, match="no model 'demo'; there are: none yet"):
        registry.resolve(store, "demo")
    registry.set_name(store, "other", publish(store))
    with pytest.raises(NotFound, match="there are: other") as caught:
        registry.resolve(store, "demo")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert registry.history(store, "demo") == []


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
        lambda: registry.history(store, name),
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
    history = registry.history(store, "demo")
    assert [record.sequence for record in history] == list(range(1, 31))
    assert sorted(records, key=lambda record: record.sequence) == history
