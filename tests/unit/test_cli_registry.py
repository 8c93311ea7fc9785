"""`enginehouse engines`, `models` and `keys` on a store in a directory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import standin
from click.testing import CliRunner, Result
from test_engine_registry import publish

from engine import registry, signing
from engine.backends import open_store
from engine.blobs import blob_key, put_bytes
from engine.store import Store
from enginehouse.cli import main
from enginehouse.home import Home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ENGINEHOUSE_GATEWAY", raising=False)
    monkeypatch.delenv("ENGINEHOUSE_BUILDER", raising=False)
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Store:
    """The data folder's: what commands take by default."""
    return open_store(Home.find().store)


def enginehouse(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def said(*arguments: str | Path) -> str:
    result = enginehouse(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def told(*arguments: str | Path) -> Any:
    return json.loads(said(*arguments, "--json"))


def error(*arguments: str | Path) -> str:
    result = enginehouse(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# engines


def test_engines_ls(store: Store, tmp_path: Path) -> None:
    assert said("engines", "ls") == f"no engines in {store.url} yet: enginehouse build CHECKPOINT\n"
    engine = publish(store)
    registry.set_name(store, "demo", engine)
    registry.set_name(store, "also", engine)
    assert said("engines", "ls").splitlines() == [
        "engine        models      architecture      for          size  created           signed by",
        f"{engine[:12]}  also, demo  LlamaForCausalLM  float32 cpu  4 B   2026-01-01 00:00  -",
    ]
    (listed,) = told("engines", "ls")
    assert (listed["engine_id"], listed["models"], listed["signers"], listed["size"]) == (
        engine,
        ["also", "demo"],
        [],
        4,
    )
    other = tmp_path / "other"
    assert told("engines", "ls", "--store", other) == []
    assert told("engines", "ls", "--data", tmp_path / "elsewhere") == []
    store.create(f"engines/{'0' * 64}.json", b"{")
    result = enginehouse("engines", "ls")
    assert (result.exit_code, engine[:12] in result.stdout) == (0, True)
    assert f"engine {'0' * 64} cannot be read" in result.stderr


def test_engines_inspect(store: Store) -> None:
    engine = publish(store)
    registry.set_name(store, "demo", engine)
    for text in (engine, engine[:6], "demo"):
        shown = said("engines", "inspect", text)
        for part in (
            engine,
            "demo",
            "LlamaForCausalLM, 100 parameters, float32",
            "torch, cpu, operator set",
            "weights",
        ):
            assert part in shown
    manifest = told("engines", "inspect", "demo")["manifest"]
    assert manifest == json.loads(store.read(f"engines/{engine}.json"))
    assert "no model 'nope'; there are: demo" in error("engines", "inspect", "nope")


def test_engines_verify(store: Store) -> None:
    engine = publish(store)
    assert f"engine {engine[:12]}: every byte is as it should be" in enginehouse("engines", "verify", engine).stdout
    weights = registry.manifest(store, engine).ranks[0].weights[0]
    store.replace(blob_key(weights.digest), b"x")
    assert f"engine {engine[:12]}: all files are there" in enginehouse("engines", "verify", engine, "--quick").stdout
    result = enginehouse("engines", "verify", engine[:8])
    assert (result.exit_code, result.stdout.splitlines()[2]) == (1, "weights         1 B   damaged: chunk 0")
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: engine {engine[:12]}: 1 of 3 files are not as they should be.")
    assert blob_key(weights.digest) in last
    store.delete(blob_key(weights.digest))
    result = enginehouse("engines", "verify", engine, "--quick", "--json")
    assert result.exit_code == 1
    states = {file["name"]: file["state"] for file in json.loads(result.stdout)["files"]}
    assert states == {"program.json": "ok", "weights": "missing", "tokenizer.json": "ok"}


def test_engines_rm(store: Store) -> None:
    engine = publish(store)
    registry.set_name(store, "demo", engine)
    for text in ("demo", engine[:8], engine):
        assert f"engine {engine[:12]} has the name demo" in error("engines", "rm", text)
    said("models", "rm", "demo")
    assert said("engines", "rm", engine[:8]).startswith(f"removed engine {engine[:12]}; ")
    assert registry.engine_ids(store) == []
    assert "no engine" in error("engines", "rm", engine)
    store.create(f"engines/{engine}.json", b"damaged")
    assert told("engines", "rm", engine) == {"engine_id": engine}


def test_engines_sign_and_verify_who_has(store: Store, tmp_path: Path) -> None:
    engine = publish(store)
    key, other = tmp_path / "my.key", tmp_path / "other.key"
    key_id = told("keys", "generate", key)["key_id"]
    said("keys", "generate", other)
    (tmp_path / "trusted.pem").write_text(said("keys", "show", key))
    (tmp_path / "other.pem").write_text(said("keys", "show", other))
    verify = ("engines", "verify", engine, "--trusted-keys")
    assert "is signed by nobody" in error(*verify, tmp_path / "trusted.pem")
    assert said("engines", "sign", engine[:6], "--key", key) == f"engine {engine[:12]} is signed by {key_id}\n"
    assert f"signed by {key_id}\n" in enginehouse(*verify, tmp_path / "trusted.pem").stdout
    assert f"signed only by {key_id}" in error(*verify, tmp_path / "other.pem")
    assert told("engines", "ls")[0]["signers"] == [key_id]
    assert f"{key_id} (not verified)" in said("engines", "inspect", engine)
    assert "key file" in error("engines", "sign", engine, "--key", tmp_path / "no.key")
    assert enginehouse("engines", "sign", engine).exit_code == 2


def test_engines_gc(store: Store, home: Path) -> None:
    publish(store)
    put_bytes(store, "x", b"lost" * 300)
    put_bytes(store, "x", b"young")
    for path in (home / "store/blobs").rglob("*"):
        if path.is_file() and path.read_bytes() != b"young":
            os.utime(path, (path.stat().st_mtime - 7200,) * 2)
    assert said("engines", "gc").startswith("deleted 0 files (0 B); kept 3 files (4 B), and 2 files (1.21 kB)")
    dry = said("engines", "gc", "--grace", "1h", "--dry-run")
    assert dry == "would delete 1 file (1.20 kB); kept 3 files (4 B), and 1 file (5 B) that are too young\n"
    report = told("engines", "gc", "--grace", "60m")
    assert (report["deleted"], report["dry_run"]) == ({"count": 1, "size": 1200}, False)
    assert told("engines", "gc", "--grace", "3600s")["deleted"]["count"] == 0
    for wrong in ("24", "-1h", "1w", ""):
        result = enginehouse("engines", "gc", "--grace", wrong)
        assert (result.exit_code, "is no time: write it like" in result.stderr) == (2, True)
    store.create(f"engines/{'0' * 64}.json", b"{")
    assert f"enginehouse engines rm {'0' * 64}" in error("engines", "gc")


# models


def test_models_set_history_rollback(store: Store) -> None:
    first, second = publish(store, 1), publish(store, 2)
    assert said("models", "set", "demo", first[:6]) == (
        f"demo stands for engine {first[:12]} now (number 1 of its history)\n"
    )
    assert told("models", "set", "demo", second)["sequence"] == 2
    said("models", "set", "copy", "demo")
    assert registry.resolve(store, "copy").engine_id == second
    assert told("models", "rollback", "demo")["engine_id"] == first
    said("models", "rm", "demo")
    assert told("models", "rollback", "demo", "--to", "2")["engine_id"] == second
    lines = said("models", "history", "demo").splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["number", "engine"],
        ["5", second[:12]],
        ["4", "-"],
        ["3", first[:12]],
        ["2", second[:12]],
        ["1", first[:12]],
    ]
    assert lines[1].endswith("now")
    store.delete(f"engines/{first}.json")
    assert said("models", "history", "demo").splitlines()[3].endswith("removed")
    assert [record["sequence"] for record in told("models", "history", "demo")] == [5, 4, 3, 2, 1]
    assert "no record 9" in error("models", "rollback", "demo", "--to", "9")
    assert "has stood for no other engine" in error("models", "rollback", "copy")
    for command in ("history", "rollback", "rm"):
        assert "no model 'nope'; there are: copy, demo" in error("models", command, "nope")
    assert "model name 'a/b'" in error("models", "set", "a/b", second)


def test_models_rename_and_rm(store: Store) -> None:
    engine = publish(store)
    registry.set_name(store, "old", engine)
    assert said("models", "rename", "old", "new").startswith(f"new stands for engine {engine[:12]} now")
    assert registry.names(store) == ["new"]
    registry.set_name(store, "other", engine)
    assert "model name 'other' stands for engine" in error("models", "rename", "new", "other")
    assert said("models", "rm", "new") == "new stands for nothing now (number 2 of its history)\n"
    assert registry.names(store) == ["other"]


def test_models_lists_as_ever_and_options_may_stand_before(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    engine = standin.publish(open_store(elsewhere), "demo")
    listed = told("models", "--store", elsewhere)
    assert [(model["name"], model["engine_id"]) for model in listed] == [("demo", engine)]
    record = json.loads(said("models", "--store", elsewhere, "--json", "set", "other", "demo"))
    assert (record["name"], record["engine_id"]) == ("other", engine)
    said("models", "rm", "demo", "--store", elsewhere)
    assert [model["name"] for model in told("models", "--store", elsewhere)] == ["other"]
    assert enginehouse("models", "nope").exit_code == 2


# keys


def test_keys(tmp_path: Path) -> None:
    key = tmp_path / "my.key"
    assert "keep it secret" in said("keys", "generate", key)
    assert "exists and is not overwritten" in error("keys", "generate", key)
    public = signing.load_private(key).public
    shown = said("keys", "show", key)
    assert shown == f"key id: {public.id}\n{public.pem()}"
    assert "PRIVATE" not in shown
    (tmp_path / "trusted.pem").write_text(shown)
    assert said("keys", "show", tmp_path / "trusted.pem") == shown
    assert told("keys", "show", key) == [{"key_id": public.id, "public_key": public.pem()}]
    (tmp_path / "text").write_text("x")
    for name in ("text", "no"):
        assert f"key file {tmp_path / name} is" in error("keys", "show", tmp_path / name)
    assert "No such file or directory" in error("keys", "generate", tmp_path / "no/my.key")


# build --sign-with


def test_build_signs_what_it_builds_and_builds_again_what_it_finds_unsigned(
    checkpoint: Path, tmp_path: Path, store: Store
) -> None:
    key = signing.generate(tmp_path / "my.key")
    build = ("build", checkpoint, "--name", "demo", "--json")
    engine = json.loads(enginehouse(*build).stdout)["engine_id"]
    assert signing.claims(store, engine) == []
    found = json.loads(enginehouse(*build, "--sign-with", tmp_path / "my.key").stdout)
    assert (found["engine_id"], found["reused"]) == (engine, False)
    assert signing.signed_by(store, engine, registry.stored(store, engine)[1], (key.public,)) == (key.public.id,)
    assert json.loads(enginehouse(*build, "--sign-with", tmp_path / "my.key").stdout)["reused"]
    assert "key file" in error(*build[:-1], "--sign-with", tmp_path / "no.key")
    result = enginehouse(*build, "--sign-with", tmp_path / "my.key", "--builder", "127.0.0.1:1")
    assert (result.exit_code, "--signing-key" in result.stderr) == (2, True)
