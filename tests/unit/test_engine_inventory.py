"""Engines listed, looked at, verified and removed."""

from pathlib import Path

import msgspec
import pytest
from store_harness import keys
from test_engine_registry import manifest, publish

from engine import inventory, registry, signing
from engine.blobs import Hasher, blob_key
from engine.directory import DirectoryStore
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from engine.manifest import FileRef, Manifest, engine_id
from engine.store import Store
from engine.verify import FileState, verify

CHUNK = 1000


def test_engines_newest_first_with_names_and_signers(store: Store, tmp_path: Path) -> None:
    assert inventory.engines(store) == ([], [])
    old = publish(store, 1)
    new = registry.publish(store, msgspec.structs.replace(manifest(2), created="2026-06-01T00:00:00+00:00")).engine_id
    for name in ("b", "a"):
        registry.set_name(store, name, old)
    registry.set_name(store, "was", old)
    registry.set_name(store, "was", new)
    private = signing.generate(tmp_path / "key")
    signing.sign(store, old, private)
    store.create(f"engines/{'0' * 64}.json", b"{")
    engines, unreadable = inventory.engines(store)
    assert [(engine.engine_id, engine.models, engine.signers) for engine in engines] == [
        (new, ("was",), ()),
        (old, ("a", "b"), (private.public.id,)),
    ]
    assert [(engine.engine_id, "is damaged" in engine.problem) for engine in unreadable] == [("0" * 64, True)]
    first = engines[1]
    assert (first.architecture, first.dtype, first.device, first.num_parameters, first.size, first.source) == (
        "LlamaForCausalLM",
        "float32",
        "cpu",
        100,
        4,
        "demo",
    )
    assert inventory.inspect(store, old) == (first, manifest(1), manifest(1).to_json())


def test_an_engine_is_removed_when_no_name_stands_for_it(store: Store, tmp_path: Path) -> None:
    engine, other = publish(store, 1), publish(store, 2)
    signing.sign(store, engine, signing.generate(tmp_path / "key"))
    for name in ("a", "b"):
        registry.set_name(store, name, engine)
    with pytest.raises(FailedPrecondition, match="has the names a, b: .*enginehouse models rm a") as caught:
        inventory.remove_engine(store, engine)
    assert caught.value.reason == "ENGINE_NAMED"
    registry.set_name(store, "a", other)
    with pytest.raises(FailedPrecondition, match="has the name b:"):
        inventory.remove_engine(store, engine)
    registry.set_name(store, "b", other)
    inventory.remove_engine(store, engine)
    assert registry.engine_ids(store) == [other]
    assert keys(store, "signatures/") == []
    assert registry.missing_files(store, manifest(2)) == []
    with pytest.raises(NotFound, match="no engine"):
        inventory.remove_engine(store, engine)
    for wrong in ("abc", "../x"):
        with pytest.raises(InvalidArgument, match="64 hexadecimal digits"):
            inventory.remove_engine(store, wrong)


def test_a_damaged_engine_can_be_removed_and_a_damaged_name_protects(store: Store) -> None:
    store.create(f"engines/{'0' * 64}.json", b"{")
    store.create("models/demo/0000000001.json", b"{")
    with pytest.raises(DataLoss, match="models/demo/0000000001.json"):
        inventory.remove_engine(store, "0" * 64)
    store.delete("models/demo/0000000001.json")
    inventory.remove_engine(store, "0" * 64)
    assert keys(store) == []


def test_an_engine_that_gets_a_name_while_it_is_removed_stays(tmp_path: Path) -> None:
    class Racing(DirectoryStore):
        """The name's record is written just before the manifest goes, by a writer who has seen the engine."""

        def delete(self, key: str) -> None:
            if key == f"engines/{engine}.json":
                registry.append(self, "demo", None, engine)
            super().delete(key)

    store = Racing(tmp_path)
    engine = publish(store)
    with pytest.raises(FailedPrecondition, match="has the name demo"):
        inventory.remove_engine(store, engine)
    assert registry.manifest(store, registry.find_engine(store, "demo")) == manifest()


# Verify


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.blobs.CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("engine.manifest.CHUNK_SIZE", CHUNK)


def put(store: Store, tmp_path: Path, name: str, data: bytes) -> FileRef:
    hasher = Hasher()
    hasher.update(data)
    path = tmp_path / "file"
    path.write_bytes(data)
    ref = hasher.ref(name)
    store.upload(blob_key(ref.digest), path)
    return ref


@pytest.fixture
def engine(small_chunks: None, store: Store, tmp_path: Path) -> Manifest:
    publish(store)
    files = tuple(put(store, tmp_path, f"f{n}", bytes([n]) * (10 * CHUNK + n)) for n in range(5))
    identity = {"variant": "large"}
    return registry.publish(
        store,
        msgspec.structs.replace(manifest(), identity=identity, engine_id=engine_id(identity), tokenizer=files),
    )


def found(states: list[FileState]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {state.file.name: (state.state, state.chunks) for state in states if state.state != "ok"}


def test_a_whole_engine_is_ok(store: Store, engine: Manifest) -> None:
    seen: list[tuple[int, int]] = []
    states = verify(store, engine, progress=lambda *done: seen.append(done))
    assert [(state.file, state.state) for state in states] == [(file, "ok") for file in engine.files()]
    assert seen[-1] == (sum(file.size for file in engine.files()),) * 2
    assert len(seen) == sum(len(file.chunks) for file in engine.files())


def test_each_kind_of_damage_is_told(store: Store, engine: Manifest) -> None:
    keys = [blob_key(file.digest) for file in engine.tokenizer]
    data = [bytearray(store.read(key)) for key in keys]
    for place in (0, 3 * CHUNK, 3 * CHUNK + 1, 10 * CHUNK):
        data[1][place] ^= 1
    store.replace(keys[1], bytes(data[1]))
    store.replace(keys[2], bytes(data[2][:-1]))
    store.delete(keys[3])
    store.replace(keys[4], bytes(data[4]) + b"x")
    rest = {"f2": ("truncated", ()), "f3": ("missing", ()), "f4": ("damaged", ())}
    assert found(verify(store, engine)) == {"f1": ("damaged", (0, 3, 10)), **rest}
    assert found(verify(store, engine, deep=False)) == rest


def test_a_quick_look_reads_no_byte(engine: Manifest, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a byte was read")

    monkeypatch.setattr(type(store), "read_into", fail)
    assert found(verify(store, engine, deep=False)) == {}
