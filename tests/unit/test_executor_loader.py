"""Loading: the fingerprint before anything, and damaged bytes never used."""

from pathlib import Path

import pytest

from builder_svc.options import BuildOptions
from builder_svc.pipeline import build
from engine import blobs
from engine.blobs import blob_key
from engine.directory import DirectoryStore
from engine.errors import DataLoss, FailedPrecondition, NotFound
from engine.fingerprint import Node
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
    manifest = build(checkpoint, store, BuildOptions(device="cuda", compute_capability="9.0", dtype="float32")).manifest
    with pytest.raises(FailedPrecondition) as caught:
        load_engine(store, manifest.engine_id, NODE)
    assert caught.value.reason == "ENGINE_FINGERPRINT_MISMATCH"
    assert "needs device 'cuda', this executor runs on 'cpu'" in caught.value.message
    assert f"enginehouse build {checkpoint} --device cpu" in caught.value.message
    assert store.blob_reads == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_weights_are_never_used(
    checkpoint: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "CHUNK_SIZE", 10_000)  # many chunks
    monkeypatch.setattr("engine.manifest.CHUNK_SIZE", 10_000)
    store = DirectoryStore(tmp_path)
    manifest = build(checkpoint, store).manifest
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
    manifest = build(checkpoint, store).manifest
    load_engine(store, manifest.engine_id, NODE, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.weight_bytes(),) * 2


def test_too_little_kv_memory_is_refused_with_what_would_do(checkpoint: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    loaded = load_engine(store, build(checkpoint, store).manifest.engine_id, NODE)
    needed = 256 * loaded.manifest.model.kv_bytes_per_token
    with pytest.raises(FailedPrecondition, match=f"--kv-memory {needed} or more"):
        TorchRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=needed - 1)
    assert (
        TorchRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=needed).capabilities.num_blocks
        == 16
    )
