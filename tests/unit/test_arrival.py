"""Weights that arrive in parallel: through a few buffers, in any order, and nothing of what is damaged."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from engine import blobs
from engine.blobs import blob_key, put_bytes
from engine.directory import DirectoryStore
from engine.errors import DataLoss, NotFound
from engine.manifest import FileRef
from executor_svc.arrival import Arrival

CHUNK = 4096


class SlowStore(DirectoryStore):
    """Chunks come in an order of chance; notes how many buffers they have been read into, and when each file was begun."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.buffers: set[int] = set()
        self.offsets: list[int] = []
        self.let = threading.Event()
        self.let.set()

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.offsets.append(offset)
        self.buffers.add(torch.frombuffer(buffer, dtype=torch.uint8).data_ptr())
        if offset:
            self.let.wait(60)
        time.sleep(random.random() * 0.005)
        super().read_into(key, offset, buffer)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    monkeypatch.setattr("engine.manifest.CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(blobs, "CHUNK_SIZE", CHUNK)
    return SlowStore(tmp_path)


def tensors(number: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(number)
    return {
        f"{number}.matrix": torch.randn(300, 128, dtype=torch.bfloat16),
        f"{number}.norm": torch.randn(77),
        f"{number}.packed": torch.randint(0, 255, (40, 8), dtype=torch.uint8),
    }


def put(store: SlowStore, number: int) -> FileRef:
    return put_bytes(store, f"weights-{number}.safetensors", save(tensors(number)))


def test_every_byte_finds_its_place(store: SlowStore) -> None:
    files = [put(store, number) for number in range(3)]
    counts: list[int] = []
    with Arrival(store, files, "cpu", counts.append) as arrival:
        found = arrival.tensors()
    for number in range(3):
        for name, expected in tensors(number).items():
            assert torch.equal(found.pop(name), expected)
    assert not found
    assert sum(counts) == sum(file.size for file in files)
    assert len(counts) == sum(len(file.chunks) for file in files) > 50
    assert len(store.buffers) <= blobs.PARALLEL_READS + 2


def test_tensors_are_known_before_they_have_their_values(store: SlowStore) -> None:
    files = [put(store, 0), put(store, 1)]
    store.let.clear()
    with Arrival(store, files, "cpu") as arrival:
        found = arrival.tensors()
        places = {name: tensor.data_ptr() for name, tensor in found.items()}
        assert set(places) == {*tensors(0), *tensors(1)}
        assert not torch.equal(found["0.matrix"], tensors(0)["0.matrix"])
        store.let.set()
    assert torch.equal(found["0.matrix"], tensors(0)["0.matrix"])
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == places


@pytest.mark.parametrize("at", [2, -2])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_told_and_never_reaches_the_device(store: SlowStore, damage: str, at: int) -> None:
    file = put(store, 0)
    path = Path(store.root) / blob_key(file.digest)
    data = bytearray(path.read_bytes())
    index = at % len(file.chunks)
    if damage == "flip":
        data[index * CHUNK + 5] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: index * CHUNK + 5])
    else:
        path.unlink()
    arrival = Arrival(store, [file], "cpu")
    with pytest.raises(NotFound if damage == "delete" else DataLoss, match=file.digest[:12]), arrival:
        arrival.tensors()
    if damage == "flip":
        chunk = slice(index * CHUNK, (index + 1) * CHUNK)
        assert arrival._places[0][chunk].numpy().tobytes() != data[chunk]


def test_a_front_that_has_gone_ends_the_reading(store: SlowStore) -> None:
    """As any other error of who is told; what was not read yet is not read any more."""
    files = [put(store, number) for number in range(6)]
    told = 0

    def gone(_: int) -> None:
        nonlocal told
        told += 1
        if told == 3:
            store.let.clear()  # nobody reads on until the one who waits has had time to hear of it
            threading.Timer(0.5, store.let.set).start()
            raise ConnectionError("the front is gone")

    with pytest.raises(ConnectionError), Arrival(store, files, "cpu", gone):
        pass
    assert len(store.offsets) < sum(len(file.chunks) for file in files)


def test_an_error_of_who_waits_stops_the_reading(store: SlowStore) -> None:
    file = put(store, 0)
    store.let.clear()
    with pytest.raises(KeyError), Arrival(store, [file], "cpu") as arrival:
        arrival.tensors()
        threading.Timer(0.5, store.let.set).start()  # when it waits for who reads
        raise KeyError
    assert len(store.offsets) < len(file.chunks)


def test_what_is_no_file_of_weights_is_told(store: SlowStore) -> None:
    file = put_bytes(store, "weights.safetensors", b"\xff" * 5000)
    with pytest.raises(DataLoss, match="no safetensors header"), Arrival(store, [file], "cpu") as arrival:
        arrival.tensors()
