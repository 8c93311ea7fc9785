"""Several machines that run engines together, as the one that leads sees them: others come (`member.py`), lending processes."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version

from google.protobuf.message import DecodeError

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, Unavailable
from executor_svc.frames import frame, read_frames
from executor_svc.network import reachable, watch
from protos.rpc import from_failure, to_failure
from protos.v1.worker_pb2 import Close, FromMachine, Hello, Kill, Launch, ToMachine, ToWorker, Welcome

LARGEST = 64 << 20  # bytes of a message between machines
_GREETING = 5.0  # seconds in which one that connects must say who it is

log = logging.getLogger(__name__)


def hello(device: str, machine: int | None = None) -> Hello:
    """What this machine says of itself."""
    return Hello(version=version("enginehouse"), torch=version("torch"), device=device, machine=machine)


class RemoteRank:
    """A rank's process on another machine; a `RankProcess`."""

    pid = None

    def __init__(self, machine: "_Machine", number: int) -> None:
        self.failure: EnginehouseError | None = None
        self.where = str(machine)
        self._machine, self._number = machine, number
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._how: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def send(self, message: ToWorker) -> None:
        self._tell(ToMachine(to_worker=message.SerializeToString()))

    def close(self) -> None:
        self._tell(ToMachine(close=Close()))

    def kill(self) -> None:
        self._tell(ToMachine(kill=Kill()))

    async def messages(self) -> AsyncIterator[bytes]:
        while (data := await self._messages.get()) is not None:
            yield data

    async def ended(self) -> str:
        return await asyncio.shield(self._how)

    def take(self, message: FromMachine) -> None:
        """What its machine tells of it."""
        if message.HasField("from_worker"):
            self._messages.put_nowait(message.from_worker)
        elif message.HasField("ended"):
            if message.ended.HasField("failure"):
                self.failure = from_failure(message.ended.failure)
            self.end(message.ended.how)

    def end(self, how: str) -> None:
        """It has ended, or is lost."""
        if not self._how.done():
            self._how.set_result(how)
            self._messages.put_nowait(None)

    def _tell(self, message: ToMachine) -> None:
        if not self._how.done():
            message.process = self._number
            self._machine.send(message)


class _Machine:
    """One that has joined."""

    def __init__(self, place: int, address: str, writer: asyncio.StreamWriter) -> None:
        self.place, self.address = place, address
        self._writer = writer
        self._numbers = itertools.count(1)
        self._ranks: dict[int, RemoteRank] = {}

    def send(self, message: ToMachine) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(message.SerializeToString()))

    def launch(self) -> RemoteRank:
        number = next(self._numbers)
        rank = self._ranks[number] = RemoteRank(self, number)
        self.send(ToMachine(process=number, launch=Launch()))
        return rank

    def take(self, message: FromMachine) -> None:
        if rank := self._ranks.get(message.process):
            rank.take(message)
            if message.HasField("ended"):
                del self._ranks[message.process]

    def __str__(self) -> str:
        return f"machine {self.place}, {self.address}"

    def hang_up(self) -> None:
        self._writer.close()

    def lost(self) -> None:
        for rank in self._ranks.values():
            rank.end(f"the loss of {self}")


class Machines:
    """The machines among which ranks are divided, neighbours on one machine; this one is the first.

    Attributes:
        count: of them, this one included.
        where: they join it, HOST:PORT.
        host: the interface where ranks of this machine listen for others.
        patience: seconds to wait for machines that have not come.

    Args:
        device: that all of them must have.
    """

    def __init__(self, count: int = 1, host: str = "127.0.0.1", device: str = "cpu", patience: float = 0) -> None:
        self.count, self.host, self.patience = count, host, patience
        self._mine = hello(device) if count > 1 else Hello()
        self._there: dict[int, _Machine] = {}
        self._own_address = reachable(host)
        self._come = asyncio.Condition()
        self._refused = ""  # why the last one that came was not taken
        self.where = ""
        self._server: asyncio.Server | None = None
        self._meetings: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Of this machine, by which all ranks reach it."""
        return self._own_address

    async def listen(self, port: int) -> None:
        """Waits for the others from now on. Raises Unavailable: the port cannot be bound."""
        try:
            self._server = await asyncio.start_server(self._meet, self.host, port)
        except OSError as error:
            raise Unavailable(
                f"cannot listen for other machines on {self.host}:{port}: {error}; choose another --machines-port",
                reason="PORT_TAKEN",
            ) from None
        self.where = f"{self.host}:{self._server.sockets[0].getsockname()[1]}"
        log.info("the first of %d machines; the others join it on %s", self.count, self.where)

    async def close(self) -> None:
        """Lets the others go, and takes no more."""
        if self._server:
            self._server.close()
            for machine in self._there.values():
                machine.hang_up()
            await asyncio.wait([*self._meetings, asyncio.create_task(self._server.wait_closed())])

    async def launch(self, place: int, patience: float) -> RemoteRank:
        """A process on one of the other machines.

        Raises:
            Unavailable: it has not come within so many seconds.
        """
        try:
            async with asyncio.timeout(patience), self._come:
                await self._come.wait_for(lambda: place in self._there)
        except TimeoutError:
            missing = sorted(set(range(1, self.count)) - set(self._there))
            refused = f" One was refused: {self._refused}" if self._refused else ""
            raise Unavailable(
                f"of {self.count} machines, these have not joined {self.where} within {patience:.0f} s: "
                f"{', '.join(map(str, missing))}; look into their logs, or start executors there with --join.{refused}",
                reason="MACHINE_MISSING",
            ) from None
        return self._there[place].launch()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        machine = None
        connection = writer.get_extra_info("socket")
        if task := asyncio.current_task():
            self._meetings.add(task)
            task.add_done_callback(self._meetings.discard)
        try:
            watch(connection)
            messages = read_frames(reader, LARGEST)
            async with asyncio.timeout(_GREETING):
                first = FromMachine.FromString(await anext(messages))
            try:
                machine = self._admit(first.hello, writer)
            except EnginehouseError as error:
                self._refused = error.message
                log.warning("a machine that wants to join from %s: %s", connection.getpeername()[0], error.message)
                writer.write(frame(ToMachine(refused=to_failure(error)).SerializeToString()))
                return
            self._there[machine.place], self._refused = machine, ""
            self._own_address = connection.getsockname()[0]
            machine.send(ToMachine(welcome=Welcome(machine=machine.place)))
            log.info("%s, has come", machine)
            async with self._come:
                self._come.notify_all()
            async for data in messages:
                machine.take(FromMachine.FromString(data))
        except (DecodeError, StopAsyncIteration, TimeoutError, OSError):
            pass  # a stranger, or gone already
        finally:
            if machine:
                log.warning("%s, is gone", machine)
                self._there.pop(machine.place, None)
                machine.lost()
            writer.close()

    def _admit(self, told: Hello, writer: asyncio.StreamWriter) -> _Machine:
        """The machine in its place. Raises FailedPrecondition, InvalidArgument, and Unavailable where it may come again."""
        for name, theirs, mine in (
            ("enginehouse", told.version, self._mine.version),
            ("torch", told.torch, self._mine.torch),
            ("--device", told.device, self._mine.device),
        ):
            if theirs != mine:
                raise FailedPrecondition(
                    f"it has {name} {theirs}, but the machine that leads has {name} {mine}: all machines of a group need "
                    "the same",
                    reason="MACHINES_DIFFER",
                )
        free = [place for place in range(1, self.count) if place not in self._there]
        place = told.machine if told.HasField("machine") else free[0] if free else self.count
        if not told.HasField("machine") and not free:
            raise Unavailable(f"all {self.count} machines of the group are there", reason="MACHINE_TAKEN")
        if not 0 < place < self.count:
            raise InvalidArgument(
                f"it wants to be machine {place}, but the group has {self.count}, from 0, which leads: give a --machine of 1 "
                f"to {self.count - 1}",
                reason="MACHINE_UNKNOWN",
            )
        address = writer.get_extra_info("peername")[0]
        if place not in free:
            raise Unavailable(f"machine {place} is there already: {self._there[place].address}", reason="MACHINE_TAKEN")
        return _Machine(place, address, writer)
