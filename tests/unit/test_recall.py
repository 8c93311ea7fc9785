"""A build that was made before is found without torch, unless anything that decides it has changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builder_svc import recall as cache
from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from engine.blobs import blob_key
from enginehouse.llm.source import build_engine
from enginehouse.process import service_environment
from enginehouse.progress import Bars, stderr


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def made(
    checkpoint: Path, config: BuildConfig | None = None, store: str | None = None, *, keep: bool = True
) -> tuple[str, bool]:
    engine = build_engine(
        checkpoint, config or BuildConfig(), store=store, revision=None, keep=keep, bars=Bars(stderr())
    )
    return engine.engine_id, engine.reused


def recalled(checkpoint: Path, config: BuildConfig) -> str | None:
    return cache.recall(cache.build_key(checkpoint, config))


def test_it_is_what_a_build_would_give(copy: Path, tmp_path: Path) -> None:
    assert recalled(copy, BuildConfig()) is None
    engine_id, reused = made(copy)
    assert not reused and recalled(copy, BuildConfig()) == engine_id
    assert made(copy) == (engine_id, True)
    assert made(copy, store=str(tmp_path / "other")) == (engine_id, False)  # known, but not there
    assert made(copy, keep=False) == (engine_id, False)


def test_whatever_changes_it_is_noticed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.remember(cache.build_key(copy, BuildConfig()), "a" * 64)
    assert recalled(copy, BuildConfig(max_seq_len=8)) is None
    for recipe in ("recall", "quant_config"):
        monkeypatch.setattr(f"builder_svc.{recipe}.RECIPE_VERSION", 10**6)
        assert recalled(copy, BuildConfig()) is None
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(copy.parent / "cache"))
        assert recalled(copy, BuildConfig()) is not None
    monkeypatch.setattr("builder_svc.recall.version", lambda _: "another")
    assert recalled(copy, BuildConfig()) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy.parent / "cache"))
    assert recalled(copy, BuildConfig()) == "a" * 64
    for file in sorted(copy.iterdir()):
        os.utime(file)  # as a file of the same bytes that was written again
        assert recalled(copy, BuildConfig()) is None
        cache.remember(cache.build_key(copy, BuildConfig()), "a" * 64)
    (copy / "generation_config.json").write_text("{}")
    assert recalled(copy, BuildConfig()) is None


def test_a_checkpoint_that_changes_while_it_is_built_is_not_taken_for_the_other(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*arguments: object, **options: object) -> object:
        os.utime(copy / "config.json")
        return build(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("builder_svc.pipeline.build", touched)
    made(copy)
    assert recalled(copy, BuildConfig()) is None


def test_an_engine_that_has_lost_a_file_is_built_again(copy: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    engine_id, _ = made(copy, store=store.url)
    (weights,) = registry.manifest(store, engine_id).ranks[0].weights
    store.delete(blob_key(weights.digest))
    assert made(copy, store=store.url) == (engine_id, False)
    assert store.size(blob_key(weights.digest)) == weights.size


def test_torch_is_not_imported_for_it(copy: Path) -> None:
    made(copy)
    code = f"""
import sys
from builder_svc.build_config import BuildConfig
from enginehouse.llm.source import build_engine
from enginehouse.progress import Bars, stderr
engine = build_engine({str(copy)!r}, BuildConfig(), store=None, revision=None, keep=True, bars=Bars(stderr()))
print(engine.reused, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=service_environment(), capture_output=True, text=True)
    assert done.stdout.endswith("True False\n"), done.stderr
