"""A machine that lends its processes to the executor that leads a group (`machines.py`): it takes no requests itself."""

import asyncio
import contextlib
import logging
import time

from google.protobuf.message import DecodeError

from engine.errors import Unavailable
from executor_svc.frames import frame, read_frames
from executor_svc.launch import Spares
from executor_svc.machines import LARGEST, hello
from executor_svc.network import watch
from executor_svc.rank_process import LocalRank
from protos.rpc import from_failure, to_failure
from protos.v1.worker_pb2 import Ended, FromMachine, ToMachine, ToWorker

_ANSWER = 5.0  # seconds for the leader's answer
_AGAIN = 0.5  # seconds between two attempts to join
_TELL = 30.0  # seconds between two lines of the log that it has not succeeded

log = logging.getLogger(__name__)


class Member:
    """This machine among those that run engines together, where another one leads.

    Args:
        leader: its host and the port where it waits for others.
        spares: where the processes come from.
        device: that this machine gives.
        place: of this machine; None takes any that is free.
    """

    def __init__(self, leader: tuple[str, int], spares: Spares, device: str, place: int | None = None) -> None:
        self._leader, self._spares = leader, spares
        self._hello = hello(device, place)
        self._ranks: dict[int, LocalRank] = {}  # by the leader's number
        self._tasks: set[asyncio.Task[None]] = set()
        self._working: asyncio.Task[None] | None = None

    async def join(self, patience: float) -> None:
        """Joins, and from then on does what the leader says, whoever that is after it was started again.

        Raises:
            Unavailable: the leader is not there within so many seconds, or has no place free.
            FailedPrecondition, InvalidArgument: it does not take this machine.
        """
        until = time.monotonic() + patience
        while True:
            try:
                link = await self._connect()
                break
            except Unavailable as error:
                if time.monotonic() > until:
                    raise Unavailable(f"within {patience:.0f} s: {error.message}", reason=error.reason) from None
            await asyncio.sleep(_AGAIN)
        self._working = asyncio.create_task(self._work(link))

    async def close(self) -> None:
        """Ends all processes and leaves."""
        if self._working:
            self._working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._working
        self._spares.close()

    async def _connect(self) -> "_Link":
        """The leader's ear. Raises as `join`."""
        where = f"the machine that leads, at {self._leader[0]}:{self._leader[1]},"
        try:
            async with asyncio.timeout(_ANSWER):
                link = _Link(*await asyncio.open_connection(*self._leader))
                answer = await link.ask(FromMachine(hello=self._hello))
        except (OSError, TimeoutError) as error:
            what = "does not answer" if isinstance(error, TimeoutError) else f"cannot be reached: {error}"
            raise Unavailable(
                f"{where} {what}; is its executor started with --machines, and does --join name it?",
                reason="LEADER_MISSING",
            ) from None
        if answer.HasField("refused"):
            link.writer.close()
            error = from_failure(answer.refused)
            raise type(error)(f"{where} does not take this one: {error.message}", reason=error.reason)
        log.info("machine %d of the group that %s leads", answer.welcome.machine, self._leader[0])
        return link

    async def _work(self, link: "_Link") -> None:
        """Does what the leader says; joins again when it is gone."""
        while True:
            try:
                await self._obey(link)
            except DecodeError:
                log.warning("the machine that leads speaks another language")
            finally:
                link.writer.close()
                count = await self._end_all()
            log.warning("the machine that leads is gone: %s:%d", *self._leader)
            with contextlib.suppress(OSError):  # then it is told when they are wanted
                self._spares.prepare(max(1, count))
            told = time.monotonic()
            while True:
                try:
                    link = await self._connect()
                    break
                except Exception as error:  # the leader may become another one
                    if time.monotonic() > told + _TELL:
                        log.warning("cannot join: %s", error)
                        told = time.monotonic()
                await asyncio.sleep(_AGAIN)

    async def _obey(self, link: "_Link") -> None:
        async for data in link.messages:
            message = ToMachine.FromString(data)
            kind, rank = message.WhichOneof("message"), self._ranks.get(message.process)
            if kind == "launch":
                await self._launch(message.process, link)
            elif rank is None:
                continue  # it has ended by itself
            elif kind == "to_worker":
                rank.send(self._addressed(ToWorker.FromString(message.to_worker), link))
            elif kind == "close":
                rank.close()
            elif kind == "kill":
                rank.kill()

    def _addressed(self, message: ToWorker, link: "_Link") -> ToWorker:
        """A message to a rank, with the address by which this machine reaches the leader's."""
        if message.HasField("join"):
            message.join.address = link.address
        return message

    async def _launch(self, number: int, link: "_Link") -> None:
        try:
            rank = self._ranks[number] = await LocalRank.launch(self._spares)
        except OSError as error:
            failure = Unavailable(f"cannot start a worker process: {error}", reason="WORKER_NOT_STARTED")
            link.send(FromMachine(process=number, ended=Ended(how="no process", failure=to_failure(failure))))
            return
        task = asyncio.create_task(self._listen(number, rank, link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, number: int, rank: LocalRank, link: "_Link") -> None:
        """Passes on what a rank tells, to its end."""
        async for data in rank.messages():
            link.send(FromMachine(process=number, from_worker=data))
        how = await rank.ended()
        rank.close()
        del self._ranks[number]
        link.send(FromMachine(process=number, ended=Ended(how=how)))

    async def _end_all(self) -> int:
        """Ends the leader's processes; how many there were."""
        count = len(self._ranks)
        for rank in self._ranks.values():
            rank.kill()
        if self._tasks:
            await asyncio.wait(self._tasks)
        return count


class _Link:
    """The connection to the leader."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        watch(connection)
        self.writer, self.messages = writer, read_frames(reader, LARGEST)
        self.address: str = connection.getpeername()[0]

    async def ask(self, message: FromMachine) -> ToMachine:
        """Sends the first message, and gives the answer. Raises ConnectionError: the leader has hung up, or is somebody else."""
        try:
            self.send(message)
            return ToMachine.FromString(await anext(self.messages))
        except BaseException as error:
            self.writer.close()
            if isinstance(error, StopAsyncIteration | DecodeError):
                raise ConnectionError("it speaks another language" if error.args else "it has hung up") from None
            raise

    def send(self, message: FromMachine) -> None:
        if not self.writer.is_closing():
            self.writer.write(frame(message.SerializeToString()))
