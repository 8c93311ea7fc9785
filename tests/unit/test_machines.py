"""How machines find each other, and what they say when they do not fit. integration/test_machine_groups.py lets them run."""

import argparse
import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, Unavailable
from executor_svc import machines as leading
from executor_svc.group_options import PORT, Place, add_group_options, find_place
from executor_svc.launch import Spares
from executor_svc.machines import Machines
from executor_svc.member import Member
from executor_svc.network import interface_towards, reachable, watch

LWS = {"LWS_GROUP_SIZE": "3", "LWS_LEADER_ADDRESS": "lead.svc"}
TORCH = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
INSIDE = {
    **TORCH,
    "GROUP_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def place(options: str = "", **environment: str) -> Place:
    parser = argparse.ArgumentParser()
    add_group_options(parser)
    return find_place(parser.parse_args(options.split()), environment)


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ("", {}, Place()),
        ("--machines 2 --machines-port 7000", {}, Place(2, 7000)),
        ("--join lead --machine 2", {}, Place(leader=("lead", PORT), index=2)),
        ("--join [fd00::1]:7000", {}, Place(leader=("fd00::1", 7000))),
        ("--join lead:7000", LWS, Place(leader=("lead", 7000))),
        ("", {**LWS, "LWS_WORKER_INDEX": "0"}, Place(3, PORT, index=0)),
        ("", {**LWS, "LWS_WORKER_INDEX": "2"}, Place(3, PORT, ("lead.svc", PORT), 2)),
        ("", {**LWS, "LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}, Place()),
        ("", {**TORCH, "NNODES": "2", "NODE_RANK": "0"}, Place(2, 29500, index=0)),
        ("", {**TORCH, "WORLD_SIZE": "4", "RANK": "3"}, Place(4, 29500, ("10.0.0.1", 29500), 3)),
        ("", {**INSIDE, "GROUP_RANK": "1", "RANK": "1"}, Place(2, PORT, ("10.0.0.1", PORT), 1)),
        ("", {**TORCH, "WORLD_SIZE": "1", "RANK": "0"}, Place()),
    ],
)
def test_a_machine_finds_its_place(options: str, environment: dict[str, str], expected: Place) -> None:
    assert place(options, **environment) == expected


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        ("--join lead --machines 2", {}, "--join and --machines: a machine leads or joins"),
        ("--machine 1", {}, "--machine: only a machine that joins has one"),
        ("--machines 0", {}, "--machines is 0, expected a number from 1"),
        ("--join lead:http", {}, "--join is 'lead:http', expected HOST or HOST:PORT"),
        ("", {**LWS, "LWS_WORKER_INDEX": "3"}, "LWS_WORKER_INDEX is 3, but LWS_GROUP_SIZE is 3: expected 0 to 2"),
        ("", LWS, "LWS_WORKER_INDEX is missing"),
        ("", {"LWS_GROUP_SIZE": "two"}, "LWS_GROUP_SIZE is 'two' in the environment, expected a number"),
        (
            "",
            {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"},
            "but LWS_LEADER_ADDRESS is missing: say which machine leads",
        ),
        ("", {**TORCH, "WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "start one executor a machine"),
    ],
)
def test_a_place_that_cannot_be_is_refused(options: str, environment: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        place(options, **environment)
    assert says in caught.value.message


@pytest.fixture
async def leader() -> AsyncIterator[Machines]:
    """Of three."""
    machines = Machines(3, patience=0.2)
    await machines.listen(0)
    yield machines
    await machines.close()


@pytest.fixture
async def member(leader: Machines, tmp_path: Path) -> AsyncIterator[Callable[..., Member]]:
    made: list[Member] = []
    (tmp_path / "program.py").write_text("import socket, sys\nsocket.socket(fileno=int(sys.argv[2])).recv(100)\n")

    def make(device: str = "cpu", place: int | None = None) -> Member:
        port = int(leader.where.rpartition(":")[2])
        made.append(Member(("127.0.0.1", port), Spares([], program=[str(tmp_path / "program.py")]), device, place))
        return made[-1]

    yield make
    for each in made:
        await each.close()


async def refusal(member: Member) -> EnginehouseError:
    with pytest.raises(EnginehouseError) as caught:
        await member.join(0)
    return caught.value


async def test_machines_that_differ_are_refused_on_both_sides(
    leader: Machines, member: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = await refusal(member("cuda"))
    assert isinstance(error, FailedPrecondition) and error.reason == "MACHINES_DIFFER"
    assert (
        "it has --device cuda, but the machine that leads has --device cpu: all machines of a group need"
        in error.message
    )
    monkeypatch.setattr(leading, "version", lambda name: {"enginehouse": "0.0.9"}.get(name, "2.0"))
    other = member()
    monkeypatch.undo()
    assert "it has enginehouse 0.0.9, but the machine that leads has enginehouse " in (await refusal(other)).message
    with pytest.raises(Unavailable) as caught:
        await leader.launch(1, leader.patience)
    assert caught.value.reason == "MACHINE_MISSING"
    assert "have not joined" in caught.value.message and ": 1, 2; " in caught.value.message
    assert "One was refused: it has enginehouse 0.0.9" in caught.value.message


async def test_a_place_is_given_once(leader: Machines, member: Callable[..., Member]) -> None:
    assert (await refusal(member(place=3))).message.endswith("give a --machine of 1 to 2")
    await member(place=2).join(0)
    error = await refusal(member(place=2))
    assert (error.code, error.reason) == (
        14,
        "MACHINE_TAKEN",
    ) and "machine 2 is there already: 127.0.0.1" in error.message
    first = member()
    await first.join(0)
    assert "all 3 machines of the group are there" in (await refusal(member())).message
    await first.close()
    await member(place=1).join(60)  # as soon as it is free


async def test_a_stranger_is_hung_up_on(leader: Machines, member: Callable[..., Member]) -> None:
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x03\x00\x00\x00\xff\xff\xff", b"\xff\xff\xff\xff", b""):
        reader, writer = await asyncio.open_connection(*leader.where.split(":"))
        writer.write(said)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()
    await member().join(0)


async def test_a_leader_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(
        Unavailable, match=f"within 1 s: the machine that leads, at 127.0.0.1:{port}, cannot be reached"
    ) as caught:
        await Member(("127.0.0.1", port), Spares([]), "cpu").join(1)
    assert caught.value.reason == "LEADER_MISSING" and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("said", "told"), [(b"", "it has hung up"), (b"\x03\x00\x00\x00\xff\xff\xff", "it speaks another language")]
)
async def test_a_leader_that_is_somebody_else(said: bytes, told: str) -> None:
    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        error = await refusal(Member(server.sockets[0].getsockname(), Spares([]), "cpu"))
        assert told in error.message and error.reason == "LEADER_MISSING"


async def test_processes_are_lent_and_end_with_the_machine(leader: Machines, member: Callable[..., Member]) -> None:
    lent = member()
    await lent.join(0)
    killed, closed, lost = [await leader.launch(1, 60) for _ in range(3)]
    killed.kill()
    closed.close()
    assert [await killed.ended(), await closed.ended()] == ["SIGKILL", "exit status 0"]
    await lent.close()
    assert await lost.ended() == "the loss of machine 1, 127.0.0.1"
    assert [message async for message in lost.messages()] == []
    lost.kill()  # into the void


async def test_a_process_that_cannot_be_started_is_told(
    leader: Machines, member: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = member()
    monkeypatch.setattr(lent._spares, "take", lambda: (_ for _ in ()).throw(OSError("too many files")))
    await lent.join(0)
    rank = await leader.launch(1, 60)
    assert await rank.ended() == "no process"
    assert rank.failure and rank.failure.message == "cannot start a worker process: too many files"


async def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"on 127.0.0.1:{port}: .*choose another --machines-port"):
            await Machines(2).listen(port)


def test_networks() -> None:
    assert interface_towards("127.0.0.1") == "lo" and interface_towards("no.such.host.invalid") is None
    assert [reachable(host) for host in ("0.0.0.0", "::", "10.0.0.1")] == ["127.0.0.1", "::1", "10.0.0.1"]  # noqa: S104
    with socket.socket() as connection:
        watch(connection)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
