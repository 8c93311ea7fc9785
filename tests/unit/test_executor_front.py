"""The front's client buffers and the frames."""

import asyncio
import socket

import pytest

from engine.errors import ResourceExhausted
from executor_svc.clients import MAX_BUFFERED, Client
from executor_svc.frames import FrameSocket, frame, read_frames


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
