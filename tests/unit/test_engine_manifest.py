"""Blobs, the manifest that lists them, and the fingerprint that says where an engine runs."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from store_harness import keys

from engine import blobs, fingerprint
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from engine.fingerprint import Fingerprint, Node
from engine.manifest import (
    CHUNK_SIZE,
    FileRef,
    Limits,
    Manifest,
    ModelFacts,
    Parallelism,
    Rank,
    canonical_json,
    engine_id,
)
from engine.opset import OPSET_VERSION
from engine.store import Store

SMALL_CHUNK = 1000


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks small enough to have many."""
    monkeypatch.setattr(blobs, "CHUNK_SIZE", SMALL_CHUNK)


def manifest(**changes: Any) -> Manifest:
    identity = {"checkpoint": {"model.safetensors": "00"}, "dtype": "float32", "eps": 1e-05, "é": [1, None, True]}
    return msgspec.structs.replace(
        Manifest(
            engine_id=engine_id(identity),
            identity=identity,
            source="demo",
            created="2026-01-01T00:00:00+00:00",
            model=ModelFacts("LlamaForCausalLM", 10, 1, 8, 2, 1, "float32", 64, (2,), 100),
            limits=Limits(4, 128, 64),
            mapping=Parallelism(),
            fingerprint=Fingerprint("torch", "cpu"),
            ranks=(Rank(blobs.describe("program.json", b"{}"), (blobs.describe("weights", b"w" * 7),)),),
            tokenizer=(blobs.describe("tokenizer.json", b"t"),),
        ),
        **changes,
    )


# Blobs


@pytest.mark.parametrize("size", [0, 1, SMALL_CHUNK - 1, SMALL_CHUNK, SMALL_CHUNK + 1, 3 * SMALL_CHUNK, 3500])
@pytest.mark.usefixtures("small_chunks")
def test_a_file_is_described_however_it_is_written(size: int):
    data = random.Random(size).randbytes(size)
    chunks = [data[start : start + SMALL_CHUNK] for start in range(0, size, SMALL_CHUNK)] or [b""]
    ref = FileRef("f", size, hashlib.sha256(data).hexdigest(), tuple(hashlib.sha256(c).hexdigest() for c in chunks))
    assert blobs.describe("f", data) == ref
    hasher = blobs.Hasher()
    for start in range(0, size, 333):
        hasher.update(memoryview(data)[start : start + 333])
    assert hasher.ref("f") == ref


@pytest.mark.parametrize("size", [0, 1, SMALL_CHUNK, 3500])
@pytest.mark.usefixtures("small_chunks")
def test_what_was_put_is_read(store: Store, tmp_path: Path, size: int):
    data = random.Random(size).randbytes(size)
    ref = blobs.put_bytes(store, "small", data)
    assert blobs.read(store, ref) == data
    (tmp_path / "file").write_bytes(data + b"more")
    ref = blobs.describe("large", data + b"more")
    blobs.put_file(store, ref, tmp_path / "file")
    assert blobs.read(store, ref) == data + b"more"


def test_equal_content_is_one_blob(store: Store):
    first, second = blobs.put_bytes(store, "a", b"same"), blobs.put_bytes(store, "b", b"same")
    assert first.digest == second.digest
    assert keys(store, "blobs/") == [f"blobs/sha256/{first.digest[:2]}/{first.digest}"]


@pytest.mark.usefixtures("small_chunks")
def test_files_are_read_to_their_place_with_progress(store: Store):
    data = random.Random(3).randbytes(5500)
    whole = bytearray(7000)
    refs = [blobs.put_bytes(store, "a", data), blobs.put_bytes(store, "b", data[:1500])]
    arrived: list[int] = []
    places = [memoryview(whole)[:5500], memoryview(whole)[5500:]]
    blobs.read_into(store, list(zip(refs, places, strict=True)), arrived.append)
    assert whole == data + data[:1500]
    assert sum(arrived) == 7000
    assert len(arrived) == 8


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("at", [0, 1700, 3499])
def test_a_damaged_chunk_is_data_loss(store: Store, at: int):
    data = bytearray(random.Random(4).randbytes(3500))
    ref = blobs.put_bytes(store, "weights", bytes(data))
    data[at] ^= 1
    store.replace(blobs.blob_key(ref.digest), bytes(data))
    with pytest.raises(DataLoss, match=f"weights.*chunk {at // SMALL_CHUNK} ") as caught:
        blobs.read(store, ref)
    assert caught.value.reason == "CHUNK_DIGEST_MISMATCH"
    assert caught.value.metadata == {"digest": ref.digest, "chunk": str(at // SMALL_CHUNK)}
    fix = re.search(r"Delete (\S+) in (\S+) and build the engine again", caught.value.message)
    assert fix
    assert fix[2] == store.url
    data[at] ^= 1
    blobs.put_bytes(store, "weights", bytes(data))  # building alone leaves what is there in its size
    with pytest.raises(DataLoss):
        blobs.read(store, ref)
    store.delete(fix[1])
    blobs.put_bytes(store, "weights", bytes(data))
    assert blobs.read(store, ref) == data


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("left", [0, 999, 1000, 3499])
def test_a_truncated_blob_is_data_loss(store: Store, left: int):
    data = random.Random(5).randbytes(3500)
    ref = blobs.put_bytes(store, "weights", data)
    store.replace(blobs.blob_key(ref.digest), data[:left])
    with pytest.raises(DataLoss):
        blobs.read(store, ref)


def test_a_missing_blob_is_not_found(store: Store):
    with pytest.raises(NotFound):
        blobs.read(store, blobs.describe("weights", b"never put"))


# The manifest


def test_a_manifest_comes_back_from_json():
    assert Manifest.from_json(manifest().to_json()) == manifest()


def test_the_same_manifest_gives_the_same_readable_json():
    assert manifest().to_json() == manifest().to_json()
    assert manifest().to_json().count(b"\n") > 10


def test_files_and_weight_bytes():
    assert [file.name for file in manifest().files()] == ["program.json", "weights", "tokenizer.json"]
    assert manifest().weight_bytes() == 7


def edited(path: str, value: Any) -> bytes:
    """The sample manifest's JSON with one thing changed; "a/b" is the key b of a."""
    data = json.loads(manifest().to_json())
    *parents, last = path.split("/")
    place = data
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (b"\xff\xfe", "manifest: "),
        (b"[]", "array"),
        (manifest().to_json()[:-10], "truncated"),
        (edited("unknown", 1), "unknown field"),
        (edited("model/vocab_size", "ten"), r"\$\.model\.vocab_size"),
        (edited("engine_id", "0" * 64), "its identity gives"),
        (edited("identity/dtype", "float16"), "its identity gives"),
        (edited("tokenizer/0/chunks", []), "tokenizer.json of 1 bytes has 0 chunk digests"),
        (edited("ranks/0/program/size", CHUNK_SIZE + 1), "program.json of 33554433 bytes has 1 chunk digests"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, message: str):
    with pytest.raises(InvalidArgument, match=message) as caught:
        Manifest.from_json(data)
    assert caught.value.reason == "MANIFEST_INVALID"


def test_another_format_is_told_by_its_number_whatever_its_fields_are():
    data = msgspec.json.encode({"format_version": 2, "whatever": 1})
    with pytest.raises(FailedPrecondition, match="has format 2, this release reads 1: build the engine again"):
        Manifest.from_json(data)


def test_canonical_json_has_one_form():
    assert (
        canonical_json({"b": 1, "a": {"d": [1.5, "é"], "c": None}}) == '{"a":{"c":null,"d":[1.5,"é"]},"b":1}'.encode()
    )
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_engine_id_depends_on_content_only():
    assert engine_id({"a": 1, "b": 2.0}) == engine_id({"b": 2.0, "a": 1})
    assert engine_id({"a": 1}) != engine_id({"a": 2})
    assert engine_id({}) == hashlib.sha256(b"{}").hexdigest()


# The fingerprint

GPU_NODE = Node("cuda", {"torch": "2.9", "tensorrt": "11.0"}, compute_capability="9.0", driver="580.65.06")


@pytest.mark.parametrize(
    "needs",
    [
        Fingerprint("torch", "cuda"),
        Fingerprint("torch", "cuda", compute_capability="9.0", driver_floor="580.65"),
        Fingerprint("tensorrt", "cuda", backend_version="11.0", driver_floor="575.1"),
    ],
)
def test_an_engine_that_fits(needs: Fingerprint):
    assert fingerprint.mismatches(needs, GPU_NODE) == []
    fingerprint.check("0" * 64, "demo", needs, GPU_NODE)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Fingerprint("other", "cuda"), "backend 'other', this node has tensorrt, torch"),
        (Fingerprint("tensorrt", "cuda", backend_version="10.9"), "tensorrt 10.9, this node has 11.0"),
        (Fingerprint("torch", "cpu"), "device 'cpu', this executor runs on 'cuda'"),
        (
            Fingerprint("torch", "cuda", opset_version=OPSET_VERSION + 1),
            f"operator set {OPSET_VERSION + 1}, this executor has {OPSET_VERSION}",
        ),
        (Fingerprint("torch", "cuda", compute_capability="8.9"), "compute capability 8.9, this GPU has 9.0"),
        (Fingerprint("torch", "cuda", driver_floor="580.100"), "driver 580.100 or newer, this node has 580.65.06"),
    ],
)
def test_an_engine_that_does_not_fit_says_why(needs: Fingerprint, message: str):
    assert len(fingerprint.mismatches(needs, GPU_NODE)) == 1
    with pytest.raises(FailedPrecondition, match=message) as caught:
        fingerprint.check("ab" * 32, "demo", needs, GPU_NODE)
    assert "enginehouse build demo --device cuda" in caught.value.message
    assert caught.value.metadata == {"engine_id": "ab" * 32}


def test_a_node_without_a_gpu_names_all_that_is_missing():
    needs = Fingerprint("torch", "cuda", compute_capability="9.0", driver_floor="580")
    assert len(fingerprint.mismatches(needs, Node("cpu", {"torch": "2.9"}))) == 3
