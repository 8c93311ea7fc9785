"""The front's client buffers and the frames."""

import asyncio
import socket
from pathlib import Path

import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import blobs
from engine.directory import DirectoryStore
from engine.errors import ResourceExhausted
from executor_svc.clients import MAX_BUFFERED, Client
from executor_svc.frames import FrameSocket, frame, read_frames
from executor_svc.launch import Spares
from executor_svc.server import ExecutorServicer
from tests.conftest import save_checkpoint


async def test_outputs_come_in_order_and_end_when_all_engines_have_drained() -> None:
    client = Client(print)
    for number in range(3):
        client.put(bytes([number]))
    client.drain({"a", "b"})
    reader = asyncio.create_task(collect(client))
    await asyncio.sleep(0)
    client.drained("a")
    client.put(b"last")
    client.drained("b")
    assert await reader == [b"\x00", b"\x01", b"\x02", b"last"]


async def test_a_client_that_used_no_engine_ends_at_once() -> None:
    client = Client(print)
    client.drain(set())
    assert await collect(client) == []


async def test_a_stream_that_is_held_ends_when_it_is_let_go() -> None:
    client = Client(print)
    client.drain({"a"}, hold=True)
    assert not client.idle
    client.drained("a")
    client.put(b"last")
    assert client.idle
    reader = asyncio.create_task(collect(client))
    await asyncio.sleep(0.01)
    assert not reader.done()
    client.drain(set())
    assert await reader == [b"last"]


async def test_a_client_that_does_not_read_is_ended() -> None:
    failed: list[Client] = []
    client = Client(failed.append)
    output = b"x" * (MAX_BUFFERED // 4)
    for _ in range(4):
        client.put(output)
    assert failed == []
    client.put(b"x")
    assert failed == [client], "its requests end at once, not when it reads again"
    client.put(b"x")
    with pytest.raises(ResourceExhausted, match="more than 16 MiB of step outputs unread"):
        await collect(client)
    assert failed == [client]


async def test_what_was_read_counts_no_more() -> None:
    client = Client(print)
    output = b"x" * (MAX_BUFFERED // 2)
    outputs = client.outputs()
    for _ in range(5):
        client.put(output)
        assert await anext(outputs) == output


async def collect(client: Client) -> list[bytes]:
    return [output async for output in client.outputs()]


async def test_frames_arrive_whole_however_they_are_cut() -> None:
    ours, theirs = socket.socketpair()
    worker = FrameSocket(theirs)
    messages = [b"", b"one", b"x" * 100_000]
    data = b"".join(frame(message) for message in messages)
    got: list[bytes] = []
    ours.setblocking(True)
    for start in range(0, len(data), 3001):
        ours.sendall(data[start : start + 3001])
        got += worker.receive(0)
    assert got == messages
    assert worker.receive(0) == []
    reader, writer = await asyncio.open_connection(sock=ours)
    worker.send(b"answer")
    answers = read_frames(reader)
    assert await anext(answers) == b"answer"
    theirs.close()
    assert await anext(answers, None) is None
    writer.close()
    await writer.wait_closed()


def test_the_end_of_the_front_is_seen() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with pytest.raises(ConnectionError), theirs:
        FrameSocket(theirs).receive(1)


class Reading(DirectoryStore):
    """Tells what is read ahead of it; keeps so many parts."""

    def __init__(self, root: Path, most: int) -> None:
        super().__init__(root)
        self.parts: list[tuple[str, int]] = []
        self.most = most

    def read_ahead(self, key: str, offset: int, size: int) -> bool:
        self.parts.append((key, offset))
        return super().read_ahead(key, offset, size) and len(self.parts) < self.most


@pytest.mark.parametrize("most", [1, 100])
async def test_weights_are_read_ahead_while_the_worker_imports(tmp_path: Path, most: int) -> None:
    """In order, as long as the store keeps them and no worker has begun to read."""
    checkpoint = save_checkpoint(tmp_path / "model", vocab_size=20_000)
    manifest = build(checkpoint, BuildConfig(device="cpu", max_seq_len=64), store=DirectoryStore(tmp_path)).manifest
    store = Reading(tmp_path, most)
    deaf = "import socket, sys\nfront = socket.socket(fileno=int(sys.argv[2]))\nwhile front.recv(4096): pass"
    never = Spares([], program=("-c", deaf))
    servicer = ExecutorServicer(str(tmp_path), "cpu", never)
    servicer._store = store
    worker = await servicer.load(manifest.engine_id)
    await asyncio.wait_for(asyncio.gather(*servicer._tasks), 20)
    weights = [(blobs.blob_key(file.digest), file.size) for rank in manifest.ranks for file in rank.weights]
    parts = [(key, offset) for key, size in weights for offset in range(0, size, 1 << 20)]
    assert len(parts) > 1 and store.parts == parts[:most] and not worker.arriving
    worker.progress.bytes_done = 1
    store.parts.clear()
    await servicer._prepare_load(worker)
    assert store.parts == []
    await servicer.close()
