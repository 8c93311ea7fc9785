"""Loading: the fingerprint before anything, and damaged bytes never used."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import blobs, signing
from engine.blobs import blob_key
from engine.directory import DirectoryStore
from engine.errors import DataLoss, FailedPrecondition, NotFound
from engine.fingerprint import Node
from engine.trust import Trust
from executor_svc.loader import load_engine
from executor_svc.runner import TorchRunner

NODE = Node("cpu", {"torch": "2.13"})


class CountingStore(DirectoryStore):
    """Counts the reads of blobs."""

    blob_reads = 0

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.blob_reads += 1
        super().read_into(key, offset, buffer)


def test_an_engine_for_another_device_is_refused_before_a_byte_is_read(checkpoint: Path, tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    manifest = build(
        checkpoint, BuildConfig(device="cuda", compute_capability="9.0", dtype="float32"), store=store
    ).manifest
    with pytest.raises(FailedPrecondition) as caught:
        load_engine(store, manifest.engine_id, NODE)
    assert caught.value.reason == "ENGINE_FINGERPRINT_MISMATCH"
    assert "needs device 'cuda', this executor runs on 'cpu'" in caught.value.message
    assert f"enginehouse build {checkpoint} --device cpu" in caught.value.message
    assert store.blob_reads == 0


def test_an_engine_that_nobody_trusted_has_signed_is_refused_before_a_byte_is_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    store, private = CountingStore(tmp_path / "store"), signing.generate(tmp_path / "key")
    engine, trust = build(checkpoint, store=store).manifest.engine_id, Trust((private.public,))
    with pytest.raises(FailedPrecondition) as caught:
        load_engine(store, engine, NODE, trust=trust)
    assert caught.value.reason == "ENGINE_UNSIGNED"
    assert store.blob_reads == 0
    signing.sign(store, engine, private)
    assert load_engine(store, engine, NODE, trust=trust).manifest.engine_id == engine


def test_native_code_is_refused_by_default_before_a_byte_is_read(checkpoint: Path, tmp_path: Path) -> None:
    store = CountingStore(tmp_path / "store")
    built = build(checkpoint, store=store).manifest
    native = msgspec.structs.replace(built.ranks[0], native=(blobs.put_bytes(store, "kernel.so", b"code"),))
    store.replace(f"engines/{built.engine_id}.json", msgspec.structs.replace(built, ranks=(native,)).to_json())
    with pytest.raises(FailedPrecondition, match="kernel.so") as caught:
        load_engine(store, built.engine_id, NODE)
    assert caught.value.reason == "NATIVE_UNTRUSTED"
    assert store.blob_reads == 0
    assert load_engine(store, built.engine_id, NODE, trust=Trust(native=True)).weights


def test_an_executor_passes_its_trust_on_to_its_workers(checkpoint: Path, tmp_path: Path) -> None:
    store, private = DirectoryStore(tmp_path / "store"), signing.generate(tmp_path / "key")
    (tmp_path / "trusted.pem").write_text(private.public.pem())
    engine = build(checkpoint, store=store).manifest.engine_id
    command = [sys.executable, "-m", "executor_svc", "--store", store.url, "--engine", engine, "--port", "0"]
    command += ["--trusted-keys", str(tmp_path / "trusted.pem")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert refused.returncode == 1
    assert f"executor: engine {engine[:12]} is not signed by a trusted key" in refused.stderr
    signing.sign(store, engine, private)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout
        assert "127.0.0.1:" in serving.stdout.readline()
        serving.terminate()
    assert serving.returncode == 0


def test_a_bad_key_file_is_told_at_the_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "executor_svc", "--store", tmp_path, "--trusted-keys", tmp_path / "no.pem"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stderr) == (
        1,
        f"executor: key file {tmp_path / 'no.pem'} is not readable (No such file or directory)\n",
    )


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_weights_are_never_used(
    checkpoint: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "CHUNK_SIZE", 10_000)  # many chunks
    monkeypatch.setattr("engine.manifest.CHUNK_SIZE", 10_000)
    store = DirectoryStore(tmp_path)
    manifest = build(checkpoint, store=store).manifest
    path = tmp_path / blob_key(manifest.ranks[0].weights[0].digest)
    data = bytearray(path.read_bytes())
    assert len(manifest.ranks[0].weights[0].chunks) > 10
    load_engine(store, manifest.engine_id, NODE)
    if damage == "flip":
        data[-5000] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(NotFound if damage == "delete" else DataLoss, match=manifest.ranks[0].weights[0].digest[:12]):
        load_engine(store, manifest.engine_id, NODE)


def test_progress_ends_with_every_byte(checkpoint: Path, tmp_path: Path) -> None:
    store, seen = DirectoryStore(tmp_path), []
    manifest = build(checkpoint, store=store).manifest
    load_engine(store, manifest.engine_id, NODE, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.weight_bytes(),) * 2


def test_too_little_kv_memory_is_refused_with_what_would_do(checkpoint: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    loaded = load_engine(store, build(checkpoint, store=store).manifest.engine_id, NODE)
    needed = 256 * loaded.manifest.model.kv_bytes_per_token
    with pytest.raises(FailedPrecondition, match=f"--kv-memory {needed} or more"):
        TorchRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=needed - 1)
    assert (
        TorchRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=needed).capabilities.num_blocks
        == 16
    )
