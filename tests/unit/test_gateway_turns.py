"""What happens when streams have more to say than the process can send."""

import asyncio

import pytest

from engine.errors import ResourceExhausted, Unavailable
from gateway.inbox import MAX_PENDING_TOKENS, Delta, Inbox
from gateway.turns import Turns
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, FinishInfo


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long this process has to wait for a processor, no turn is over before its write."""
    monkeypatch.setattr(Turns, "PATIENCE", 60.0)


@pytest.mark.usefixtures("patient")
async def test_few_write_at_a_time_in_order() -> None:
    turns, writing, order = Turns(), 0, []

    async def write(number: int) -> None:
        nonlocal writing
        async with turns.turn():
            writing += 1
            assert writing <= Turns.WIDTH
            order.append(number)
            await asyncio.sleep(0)
            writing -= 1

    await asyncio.gather(*(write(number) for number in range(50)))
    assert order == list(range(50))


async def test_a_write_that_does_not_end_stops_nobody_for_long() -> None:
    turns, forever = Turns(), asyncio.Event()

    async def stuck() -> None:
        async with turns.turn():
            await forever.wait()

    tasks = [asyncio.create_task(stuck()) for _ in range(3 * Turns.WIDTH)]
    async with asyncio.timeout(60), turns.turn():
        pass
    tasks[0].cancel()
    forever.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turns._free._value == Turns.WIDTH


@pytest.mark.usefixtures("patient")
async def test_a_first_write_stands_in_no_line() -> None:
    turns = Turns()
    held = [turns.turn() for _ in range(Turns.WIDTH)]
    for turn in held:
        await turn.__aenter__()
    waiting = asyncio.create_task(turns.turn().__aenter__())
    async with turns.turn(first=True):
        assert not waiting.done() and turns._free.locked()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    for turn in held:
        await turn.__aexit__()
    assert turns._free._value == Turns.WIDTH


@pytest.mark.usefixtures("patient")
async def test_one_that_leaves_the_line_takes_no_turn() -> None:
    turns = Turns()
    held = [turns.turn() for _ in range(Turns.WIDTH)]
    for turn in held:
        await turn.__aenter__()
    waiting = asyncio.create_task(turns.turn().__aenter__())
    await asyncio.sleep(0)
    waiting.cancel()
    for turn in held:
        await turn.__aexit__()
    await asyncio.gather(waiting, return_exceptions=True)
    assert turns._free._value == Turns.WIDTH


class Clock:
    """Stands for the module `time`: wall and CPU seconds as the test says."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def monotonic(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu

    async def sleep(self, seconds: float) -> None:
        self.wall += seconds


async def test_the_busier_the_process_the_longer_a_stream_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("gateway.turns.time", clock)
    monkeypatch.setattr("gateway.turns.asyncio.sleep", clock.sleep)
    turns = Turns()

    async def waited(share: float, write: float = 0.001) -> float:
        """How long it took from one write's begin to when the next may be, after a second with such a load."""
        for _ in range(20):
            clock.wall, clock.cpu = clock.wall + 0.05, clock.cpu + 0.05 * share
            await turns.pause(clock.wall - 1)
        began = clock.wall
        clock.wall, clock.cpu = clock.wall + write, clock.cpu + write * share
        await turns.pause(began)
        return clock.wall - began

    assert await waited(0.1) == pytest.approx(0.001)
    assert await waited(0.9) == pytest.approx(Turns.INTERVAL)
    assert await waited(0.9, write=0.1) == pytest.approx(0.1)  # a slow client's write has been wait enough
    half = await waited((Turns.IDLE + Turns.BUSY) / 2)
    assert half == pytest.approx(Turns.INTERVAL / 2, rel=0.01)
    assert await waited(0.0) == pytest.approx(0.001)


async def test_what_was_not_taken_in_time_becomes_one_delta() -> None:
    news, finish = asyncio.Event(), FinishInfo(reason=FINISH_REASON_LENGTH)
    inbox = Inbox("e", news)
    inbox.push([1])
    inbox.push([2, 3])
    assert news.is_set() and inbox.pending
    assert inbox.take() == Delta([1, 2, 3], None)
    inbox.push([4])
    inbox.finish(finish)
    assert inbox.take() == Delta([4], finish)


async def test_tokens_come_before_the_error() -> None:
    news = asyncio.Event()
    inbox = Inbox("e", news)
    inbox.push([1])
    inbox.fail(Unavailable("gone"))
    news.clear()
    assert inbox.take() == Delta([1], None)
    assert news.is_set() and inbox.pending
    with pytest.raises(Unavailable):
        inbox.take()


async def test_an_inbox_has_an_end() -> None:
    inbox = Inbox("e", asyncio.Event())
    inbox.push(range(MAX_PENDING_TOKENS))
    assert not inbox.closed
    inbox.push([1])
    assert inbox.closed
    with pytest.raises(ResourceExhausted):
        inbox.take()
