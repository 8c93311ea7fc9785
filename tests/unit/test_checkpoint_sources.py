"""Where checkpoints come from: the forms, uploads in the store, and the hub, which is a server of this test."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import msgspec
import pytest
from hub_server import Hub, Repository

from builder_svc.checkpoint.sources import (
    HubSource,
    LocalSource,
    UploadedSource,
    accept,
    fetch,
    is_repository,
    parse,
)
from engine import checkpoints, sweeps
from engine.blobs import blob_key, put_bytes
from engine.checkpoints import UploadedCheckpoint, is_read, is_setting
from engine.errors import DataLoss, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from engine.store import Store

ID = "ab" * 32


# The forms


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf://org/name", HubSource("org/name")),
        ("hf://gpt2", HubSource("gpt2")),
        ("hf://Org-1/Name_2.5-it@main", HubSource("Org-1/Name_2.5-it", "main")),
        ("hf://org/name@refs/pr/3", HubSource("org/name", "refs/pr/3")),
        ("hf://_org/name@a--b", HubSource("_org/name", "a--b")),
        ("hf://org/name/x-Q4_K_M.gguf", HubSource("org/name", None, "x-Q4_K_M.gguf")),
        ("hf://org/name/Q8/x-00001-of-00002.gguf@v1", HubSource("org/name", "v1", "Q8/x-00001-of-00002.gguf")),
        ("/models/x.gguf", LocalSource(Path("/models/x.gguf"))),
        (f"upload://{ID}", UploadedSource(ID)),
        ("/models/x", LocalSource(Path("/models/x"))),
    ],
)
def test_forms(text: str, source: Any) -> None:
    assert parse(text, None) == source
    assert str(source) == text


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://org/",
        "hf:///name",
        "hf://a/b/c",
        "hf://a/b/c.bin",
        "hf://a/b/../c.gguf",
        "hf://a/b//c.gguf",
        "hf://a/b@v1/c.gguf",
        "hf://org/name@",
        "hf://org/name@../../etc",
        "hf://org/name@/etc",
        "hf://../name",
        "hf://org/na me",
        "hf://org/na--me",
        "hf://org/name@a/../../b",
        "hf://org/name.git",
        "hf://" + "x" * 97,
        "upload://",
        "upload://../x",
        f"upload://{ID}0",
        "s3://bucket/x",
        "https://huggingface.co/org/name",
    ],
)
@pytest.mark.parametrize("root", [Path("/"), None])
def test_what_is_malformed(text: str, root: Path | None) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text, root)
    assert repr(text.removeprefix("upload://"))[1:-1] in caught.value.message


def test_a_root_bounds_directories_only(tmp_path: Path, store: Store) -> None:
    (tmp_path / "root/demo").mkdir(parents=True)
    root = (tmp_path / "root").resolve()
    assert accept("demo", root, store) == str(root / "demo")
    assert accept("hf://org/name@v1", root, store) == "hf://org/name@v1"
    with pytest.raises(PermissionDenied):
        accept(str(tmp_path), root, store)
    with pytest.raises(NotFound):
        accept("no", root, store)
    with pytest.raises(NotFound, match="upload it again"):
        accept(f"upload://{ID}", root, store)


def test_gguf_files_in_a_root(tmp_path: Path, store: Store) -> None:
    """A link into the root keeps its name; one that leads out of it is refused."""
    root = tmp_path.resolve() / "root"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs/0123").write_bytes(b"GGUF")
    (tmp_path / "outside.gguf").write_bytes(b"GGUF")
    (root / "in.gguf").symlink_to(root / "blobs/0123")
    (root / "out.gguf").symlink_to(tmp_path / "outside.gguf")
    assert accept("in.gguf", root, store) == accept("blobs/../in.gguf", root, store) == str(root / "in.gguf")
    for outside in ("out.gguf", "../outside.gguf"):
        with pytest.raises(PermissionDenied):
            accept(outside, root, store)
    for nothing in ("blobs/0123", "no.gguf"):
        with pytest.raises(NotFound, match="no such .gguf file"):
            accept(nothing, root, store)


def test_what_looks_like_a_repository() -> None:
    assert is_repository("org/name/x.gguf") and is_repository("org/name/x.gguf@v1")
    assert [is_repository(text) for text in ("org/name", "org/name@v1", "name", "org/name/", "a/b/c", "name@a/b")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_files_that_a_build_reads() -> None:
    names = ["config.json", "model-00001-of-2.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    assert all(is_read(name) for name in names)
    assert all(is_read(name) for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.gguf"))
    others = [
        "training_args.bin",
        "optimizer.bin",
        "README.md",
        "mmproj-a.gguf",
        "Q8/a.gguf",
        "original/x.safetensors",
        ".x.json",
        "consolidated.safetensors",
        "x.pt",
    ]
    assert not any(is_read(name) for name in others)


def test_the_service_brings_nothing_of_the_hub() -> None:
    code = "import builder_svc.__main__, sys; sys.exit(bool({'huggingface_hub', 'tqdm', 'httpx2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Uploads


def put(store: Store, files: dict[str, bytes]) -> str:
    """The text of an uploaded checkpoint that is in the store now."""
    return f"upload://{checkpoints.put(store, UploadedCheckpoint(tuple(put_bytes(store, *item) for item in files.items())))}"


def test_an_upload_becomes_a_directory(store: Store, tmp_path: Path) -> None:
    """The large file has two chunks; what is in memory at a time is less than one."""
    large = os.urandom(1 << 20) * 37 + b"tail"
    text = put(store, {"config.json": b"{}", "empty.json": b"", "model.safetensors": large})
    steps: list[tuple[str, int, int, str]] = []
    tracemalloc.start()
    try:
        path = fetch(text, store, tmp_path, lambda *step: steps.append(step))
        assert tracemalloc.get_traced_memory()[1] < 34 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert path.is_relative_to(tmp_path)
    assert {file.name for file in path.iterdir()} == {"config.json", "empty.json", "model.safetensors"}
    assert (path / "model.safetensors").read_bytes() == large
    assert (path / "empty.json").read_bytes() == b""
    total = len(large) + 2
    assert [step[1] for step in steps] == sorted(step[1] for step in steps)
    assert steps[-1] == ("download", total, total, "bytes")


def test_an_upload_that_is_damaged(store: Store, tmp_path: Path) -> None:
    text = put(store, {"model.safetensors": b"good weights"})
    (file,) = checkpoints.get(store, text.removeprefix("upload://")).files
    store.replace(blob_key(file.digest), b"evil weights")
    with pytest.raises(DataLoss, match="model.safetensors .* does not match its digest"):
        fetch(text, store, tmp_path, lambda *_: None)
    store.delete(blob_key(file.digest))
    with pytest.raises(NotFound):
        fetch(text, store, tmp_path, lambda *_: None)


def test_an_upload_whose_empty_file_is_gone(store: Store, tmp_path: Path) -> None:
    text = put(store, {"config.json": b"{}", "empty.json": b""})
    (empty,) = (file for file in checkpoints.get(store, text.removeprefix("upload://")).files if file.size == 0)
    store.delete(blob_key(empty.digest))
    with pytest.raises(NotFound):
        fetch(text, store, tmp_path, lambda *_: None)


def test_an_upload_that_is_collected_before_it_is_held(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = put(store, {"model.safetensors": b"good weights"})
    (file,) = checkpoints.get(store, text.removeprefix("upload://")).files

    def collect(_: Store) -> None:
        store.delete(f"checkpoints/{text.removeprefix('upload://')}.json")
        store.delete(blob_key(file.digest))

    monkeypatch.setattr(sweeps, "wait_until_over", collect)  # it had read the pins before there was ours
    with pytest.raises(NotFound, match="upload it again") as caught:
        fetch(text, store, tmp_path, lambda *_: None)
    assert caught.value.reason == "CHECKPOINT_NOT_FOUND"
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.parametrize("change", [{"name": "../escaped"}, {"name": ""}, {"chunks": ()}])
def test_a_record_that_lies(store: Store, tmp_path: Path, change: dict[str, Any]) -> None:
    ref = msgspec.structs.replace(put_bytes(store, "config.json", b"{}"), **change)
    text = f"upload://{checkpoints.put(store, UploadedCheckpoint((ref,)))}"
    (tmp_path / "work").mkdir()
    with pytest.raises(DataLoss, match="described wrongly"):
        fetch(text, store, tmp_path / "work", lambda *_: None)
    assert not (tmp_path / "escaped").exists()


# The hub


FETCH = """
import json, logging, sys
from builder_svc.checkpoint import hub, sources
from engine.errors import EnginehouseError
hub.DELAYS = (0.05, 0.05)
logging.basicConfig(level=logging.INFO)  # as in a build's process
steps = []
try:
    path = sources.fetch(sys.argv[1], None, None, lambda *step: steps.append(step), weights="bare" not in sys.argv)
    print(json.dumps({"path": str(path), "steps": steps}))
except EnginehouseError as error:
    print(json.dumps({"code": error.code, "reason": error.reason, "message": error.message}))
"""


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    """org/tiny at main and v1, with files that no build reads; org/gated and org/private, which want a token."""
    directory = shutil.copytree(checkpoint, tmp_path / "tiny")
    for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors", "onnx/config.json"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"not for us")
    repositories = {
        "org/tiny": Repository(directory, {"main": "a" * 40, "v1": "b" * 40}),
        "org/gated": Repository(directory, token="hf_right"),
        "org/private": Repository(directory, token="hf_right", refusal=(401, "RepoNotFound")),
        "org/denied": Repository(directory, token="hf_right", refusal=(403, "")),
    }
    files = {
        "old": ["config.json", "pytorch_model-1.bin", "pytorch_model.bin.index.json", "optimizer.bin", "x.gguf"],
        "one": ["a.gguf", "config.json", "mmproj-a.gguf", "README.md"],
        "many": ["a-Q4_0.gguf", "a-Q8_0.gguf", "F16/a-00001-of-00002.gguf", "F16/a-00002-of-00002.gguf", "config.json"],
        "empty": ["config.json", "README.md"],
    }
    for name, paths in files.items():
        for path in paths:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(path.encode())
        repositories[f"org/{name}"] = Repository(tmp_path / name)
    with hub_server.serve(repositories) as served:
        yield served


def download(text: str, url: str, home: Path, *words: str, **more: str) -> dict[str, Any]:
    """What `fetch` comes to ("bare": without weights), in its own process, in which huggingface_hub reads the environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, text, *words],
        env={**environment, **hub_server.environment(url, home, **more)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


def test_a_repository_without_its_weights(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    found = download("hf://org/tiny", hub.url, tmp_path / "home", "bare")
    there = {file.name for file in Path(found["path"]).iterdir()}
    assert there == hub.downloaded() == {file.name for file in checkpoint.iterdir() if is_setting(file.name)}


def test_a_repository(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    found = download("hf://org/tiny", hub.url, tmp_path / "home")
    path = Path(found["path"])
    assert path.is_relative_to(tmp_path / "home")
    expected = {file.name for file in checkpoint.iterdir() if is_read(file.name)}
    assert hub.downloaded() == {file.name for file in path.iterdir()} == expected
    for name in expected:
        assert (path / name).read_bytes() == (checkpoint / name).read_bytes()
    total = sum((checkpoint / name).stat().st_size for name in expected)
    assert found["steps"][-1] == ["download", total, total, "bytes"]
    assert all(step[1] < step[2] for step in found["steps"][:-1])

    hub.requests.clear()
    again = download("hf://org/tiny", hub.url, tmp_path / "home")
    assert (again["path"], again["steps"], hub.downloaded()) == (found["path"], [["download", 1, 1, ""]], set())
    hub.requests.clear()
    offline = download("hf://org/tiny", hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert (offline["path"], hub.requests) == (found["path"], [])


def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    assert Path(download("hf://org/tiny@v1", hub.url, tmp_path / "home")["path"]).name == "b" * 40
    error = download("hf://org/tiny@v2", hub.url, tmp_path / "home")
    assert (error["code"], error["reason"]) == (5, "REVISION_NOT_FOUND")
    assert "org/tiny has no revision 'v2'" in error["message"]


@pytest.mark.parametrize(
    ("text", "code", "reason", "said"),
    [
        ("hf://org/none", 5, "REPOSITORY_NOT_FOUND", "no repository 'org/none'"),
        ("hf://org/private", 5, "REPOSITORY_NOT_FOUND", "or it is private: .* set HF_TOKEN"),
        ("hf://org/gated", 7, "REPOSITORY_GATED", "accept its license .* HF_TOKEN"),
        ("hf://org/denied", 7, "REPOSITORY_DENIED", "HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, tmp_path: Path, text: str, code: int, reason: str, said: str) -> None:
    error = download(text, hub.url, tmp_path / "home", HF_TOKEN="hf_wrong")
    assert (error["code"], error["reason"]) == (code, reason)
    assert re.search(said, error["message"])
    assert not hub.downloaded()


def test_formats_of_repositories(hub: Hub, tmp_path: Path) -> None:
    """Weights of one format are loaded, and one model of many."""
    for name, wanted in {
        "old": {"config.json", "pytorch_model-1.bin", "pytorch_model.bin.index.json"},
        "one": {"config.json", "a.gguf"},
    }.items():
        hub.requests.clear()
        path = Path(download(f"hf://org/{name}", hub.url, tmp_path / "home")["path"])
        assert hub.downloaded() == {file.name for file in path.iterdir()} == wanted
    error = download("hf://org/many@main", hub.url, tmp_path / "home")
    assert (error["code"], error["reason"]) == (3, "GGUF_AMBIGUOUS")
    for file in ("F16/a-00001-of-00002.gguf", "a-Q4_0.gguf", "a-Q8_0.gguf"):
        assert f"\n  hf://org/many/{file}" in error["message"]
    assert "F16/a-00002" not in error["message"]
    error = download("hf://org/empty", hub.url, tmp_path / "home")
    assert (error["code"], error["reason"]) == (3, "CHECKPOINT_INCOMPLETE")
    assert "org/empty: there is no *.safetensors or pytorch_model.bin" in error["message"]


def test_one_gguf_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    found = Path(download("hf://org/many/F16/a-00001-of-00002.gguf", hub.url, tmp_path / "home")["path"])
    assert found.name == "a-00001-of-00002.gguf" and found.read_bytes() == b"F16/a-00001-of-00002.gguf"
    assert hub.downloaded() == {"a-00001-of-00002.gguf", "a-00002-of-00002.gguf"}
    hub.requests.clear()
    text = "hf://org/many/a-Q8_0.gguf"
    assert download(text, hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")["reason"] == "HUB_OFFLINE"
    online = download(text, hub.url, tmp_path / "home")["path"]
    assert hub.downloaded() == {"a-Q8_0.gguf"}
    assert download(text, hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")["path"] == online
    error = download("hf://org/many/a-Q5_0.gguf", hub.url, tmp_path / "home")
    assert (error["code"], error["reason"]) == (5, "FILE_NOT_FOUND")
    assert "has no file 'a-Q5_0.gguf': its GGUF files are F16/a-00001-of-00002.gguf, a-Q4_0.gguf" in error["message"]


def test_a_token_opens(hub: Hub, tmp_path: Path) -> None:
    assert "path" in download("hf://org/gated", hub.url, tmp_path / "home", HF_TOKEN="hf_right")


def test_offline_and_not_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    error = download("hf://org/tiny", hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert (error["code"], error["reason"], hub.requests) == (9, "HUB_OFFLINE", [])
    assert "org/tiny" in error["message"] and "HF_HUB_OFFLINE" in error["message"]


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    error = download("hf://org/tiny", "http://127.0.0.1:9", tmp_path / "home")
    assert (error["code"], error["reason"]) == (14, "HUB_UNAVAILABLE")
    assert "http://127.0.0.1:9" in error["message"]


def test_a_hub_that_fails_for_a_while(hub: Hub, tmp_path: Path) -> None:
    hub.fail = 2
    assert "path" in download("hf://org/tiny", hub.url, tmp_path / "home")
    hub.fail, hub.requests = 1000, []
    error = download("hf://org/tiny@v1", hub.url, tmp_path / "other")
    assert (error["code"], len(hub.requests)) == (14, 3)


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    error = download("hf://org/tiny", hub.url, tmp_path / "home")
    assert (error["code"], error["reason"]) == (9, "HUB_CACHE_UNUSABLE")
    assert "HF_HOME" in error["message"]


def test_signed_addresses_are_not_printed(hub: Hub, tmp_path: Path) -> None:
    """What a build prints and what it fails with are kept, for everybody who may see the job."""
    hub.signature = "X-Amz-Signature=5ec4e7&Key-Pair-Id=K1"
    found = download("hf://org/tiny", hub.url, tmp_path / "home")
    assert any(hub.signature in request for request in hub.requests)
    assert f"{hub.url}/org/tiny/resolve/" in found["log"]  # the requests are logged
    assert "5ec4e7" not in found["log"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "no answer from https://cdn.example/repo/file?X-Amz-Signature=5ec4e7&Expires=1: timed out. Why?",
            "no answer from https://cdn.example/repo/file timed out. Why?",
        ),
        (
            "HTTPSConnectionPool(host='cdn.example', port=443): Max retries exceeded with url: /f?sig=5ec4e7 (Caused by X)",
            "HTTPSConnectionPool(host='cdn.example', port=443): Max retries exceeded with url: /f (Caused by X)",
        ),
        ("error for url 'https://cdn.example/f?sig=5ec4e7'", "error for url 'https://cdn.example/f'"),
    ],
)
def test_signatures_are_not_kept_of_what_libraries_say(said: str, kept: str) -> None:
    from builder_svc.checkpoint.hub import explain

    message = explain(RuntimeError(said), "org/tiny", "org/tiny@v1").message
    assert message.endswith(f"RuntimeError: {kept}")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("xet: IO Error: No space left on device")]
)
def test_a_disk_that_is_full(error: Exception) -> None:
    from builder_svc.checkpoint.hub import explain

    known = explain(error, "org/tiny", "org/tiny@v1")
    assert isinstance(known, ResourceExhausted)
    assert "org/tiny@v1" in known.message and "HF_HOME" in known.message
