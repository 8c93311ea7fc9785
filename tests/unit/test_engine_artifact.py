"""Engines as things: saved into directories, read back, brought from store to store, and gone with their last reference."""

import gc
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry, signing
from engine.artifact import CONFIG, Engine, is_engine_dir
from engine.backends import open_store
from engine.blobs import blob_key
from engine.directory import DirectoryStore
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unimplemented
from engine.store import Store
from engine.verify import verify
from enginehouse.process import service_environment
from tests.conftest import save_checkpoint, small_file_system


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(checkpoint)
    return build(checkpoint)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    checkpoint = tmp_path_factory.mktemp("other")
    save_checkpoint(checkpoint)
    return build(checkpoint, BuildConfig(max_batch_size=3, dtype="bfloat16"))


def whole(engine: Engine) -> bool:
    return {state.state for state in verify(engine.store, engine.manifest)} == {"ok"}


def blobs(root: Path) -> int:
    return sum(path.is_file() for path in (root / "blobs").rglob("*"))


def test_a_directory_holds_the_engine_and_says_which(engine: Engine, tmp_path: Path) -> None:
    target = tmp_path / "a" / "engine"
    engine.save(str(target))
    found = Engine.from_dir(target)
    assert found.manifest == engine.manifest and found.store.url == target.as_uri() and whole(found)
    facts = msgspec.json.decode((target / CONFIG).read_bytes())
    assert facts["engine_id"] == engine.engine_id and facts["build_config"]["max_batch_size"] == 64
    assert facts["pretrained_config"]["architecture"] == "LlamaForCausalLM"
    with pytest.raises(InvalidArgument, match="is an engine already: load it with LLM"):
        build(target)
    assert is_engine_dir(target) and not is_engine_dir(tmp_path)
    engine.save(target)  # again: nothing changes
    found.save(target)  # into itself
    assert whole(Engine.from_dir(target)) and list((target / "pins").glob("*")) == []


def test_on_one_file_system_files_are_linked(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "one")
    Engine.from_dir(tmp_path / "one").save(tmp_path / "two")
    key = blob_key(engine.manifest.ranks[0].weights[0].digest)
    one, two = (tmp_path / name / key for name in ("one", "two"))
    assert one.stat().st_ino == two.stat().st_ino
    one.unlink()
    assert whole(Engine.from_dir(tmp_path / "two"))


def test_an_engine_takes_the_place_of_the_one_before(engine: Engine, other: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path)
    other.save(tmp_path)
    found = Engine.from_dir(tmp_path)
    assert found.engine_id == other.engine_id and whole(found)
    assert registry.engine_ids(found.store) == [other.engine_id]
    assert blobs(tmp_path) == len({file.digest for file in other.manifest.files()})


def test_an_engine_that_has_a_name_there_stays(engine: Engine, other: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path)
    registry.set_name(DirectoryStore(tmp_path), "kept", engine.engine_id)
    other.save(tmp_path)
    assert Engine.from_dir(tmp_path).engine_id == other.engine_id
    assert whole(Engine(DirectoryStore(tmp_path), engine.manifest))


def test_without_a_store_it_lasts_as_long_as_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = build(tmp_path / "checkpoint")
    (place,) = tmp_path.glob("enginehouse-build-*")
    assert whole(made) and place.is_dir()
    del made
    gc.collect()
    assert not place.exists()
    with pytest.raises(InvalidArgument):
        build(tmp_path / "checkpoint", BuildConfig(max_seq_len=10**6))
    assert list(tmp_path.glob("enginehouse-build-*")) == []


def test_a_forked_child_puts_away_nothing_that_is_its_parents() -> None:
    """In a process without threads: those of gRPC, which other tests leave, make forks a matter of luck."""
    code = """
import gc, os, sys
from engine.lifetime import at_end
class Thing:
    pass
thing, parent = Thing(), os.getpid()
at_end(thing, lambda: print("put away by the parent:", os.getpid() == parent, flush=True))
if not os.fork():
    del thing
    gc.collect()
    sys.exit(0)
os.wait()
print("still there", flush=True)
del thing
gc.collect()
"""
    done = subprocess.run([sys.executable, "-c", code], env=service_environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("still there\nput away by the parent: True\n", "")


def test_it_is_pushed_into_any_store_once(engine: Engine, store: Store, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert engine.push(store, "mine", lambda done, total: seen.append((done, total))) == engine.engine_id
    assert registry.find_engine(store, "mine") == engine.engine_id and whole(Engine(store, engine.manifest))
    size = sum(file.size for file in {file.digest: file for file in engine.manifest.files()}.values())
    assert seen[-1] == (size, size) and sorted(seen) == seen
    engine.push(store)
    back = Engine(store, registry.manifest(store, engine.engine_id))
    back.save(tmp_path / "back")  # out of a bucket, too
    assert whole(Engine.from_dir(tmp_path / "back"))
    assert not list((tmp_path / "back").glob(".enginehouse-*"))


def test_a_url_is_a_store(engine: Engine, tmp_path: Path) -> None:
    engine.push(f"{tmp_path}/store", "mine")
    assert registry.names(open_store(f"{tmp_path}/store")) == ["mine"]
    with pytest.raises(InvalidArgument, match="model name"):
        engine.push(f"{tmp_path}/elsewhere", "no name")
    assert not (tmp_path / "elsewhere").exists()


def test_signatures_come_along(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "one")
    signed = Engine.from_dir(tmp_path / "one")
    key = signing.generate(tmp_path / "key.pem")
    signing.sign(signed.store, engine.engine_id, key, signed.digest)
    signed.push(str(tmp_path / "two"))
    assert signing.claims(DirectoryStore(tmp_path / "two"), engine.engine_id) == [key.public.id]


def test_what_is_no_engine_directory(engine: Engine, other: Engine, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is no engine directory"):
        Engine.from_dir(tmp_path / "nothing")
    (tmp_path / "trt").mkdir()
    (tmp_path / "trt" / "rank0.engine").touch()
    with pytest.raises(Unimplemented, match="engine of TensorRT-LLM"):
        Engine.from_dir(tmp_path / "trt")
    with pytest.raises(FailedPrecondition, match="another program's config.json or engine"):
        engine.save(tmp_path / "trt")
    engine.push(str(tmp_path / "store"))
    assert Engine.from_dir(tmp_path / "store").engine_id == engine.engine_id  # the only one
    with pytest.raises(InvalidArgument, match="rank 1, but the last of 1 ranks is 0"):
        Engine.from_dir(tmp_path / "store", rank=1)
    other.push(str(tmp_path / "store"))
    with pytest.raises(InvalidArgument, match="holds 2 engines"):
        Engine.from_dir(tmp_path / "store")


def test_nothing_else_is_overwritten(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(FailedPrecondition, match="another program's config.json"):
        engine.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]


def test_a_damaged_or_lost_file_is_told(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "one")
    file = tmp_path / "one" / blob_key(engine.manifest.ranks[0].program.digest)
    file.chmod(file.stat().st_mode | stat.S_IWUSR)
    file.unlink()
    with pytest.raises(NotFound):
        Engine.from_dir(tmp_path / "one").push(str(tmp_path / "two"))
    assert registry.engine_ids(DirectoryStore(tmp_path / "two")) == []
    (tmp_path / "one" / "engines" / f"{engine.engine_id}.json").write_text("{}")
    with pytest.raises(DataLoss):
        Engine.from_dir(tmp_path / "one")


def test_a_full_disk_leaves_no_half_engine(engine: Engine, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "200k") as mount:
        with pytest.raises(ResourceExhausted, match="is full"):
            engine.save(mount / "engine")
        assert not is_engine_dir(mount / "engine") or not (mount / "engine" / CONFIG).exists()
        assert registry.engine_ids(DirectoryStore(mount / "engine")) == []
