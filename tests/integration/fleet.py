"""A gateway before several executors, all of them processes; streams through it, and what faults have left behind."""

import asyncio
import contextlib
import math
import os
import random
import re
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from enginehouse.cluster import hold_ports
from protos.v1 import executor_pb2, executor_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from protos.v1.common_pb2 import FinishInfo, OutputOptions, SamplingParams, StoppingCriteria, TokenIds
from tests.integration.services import Service, service


@dataclass
class Said:
    """What one completion has said."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishInfo | None = None


@dataclass
class Stream:
    """What a call has given so far: by completion, and its last usage."""

    said: dict[int, Said] = field(default_factory=dict)
    completion_tokens: int = 0

    def take(self, part: gateway_pb2.GenerateResponse) -> None:
        said = self.said.setdefault(part.index, Said())
        assert said.finish is None, "a message after the finish"
        said.text += part.text
        said.token_ids += part.token_ids
        said.logprobs += part.logprobs.logprobs
        self.completion_tokens = part.usage.completion_tokens
        if part.HasField("finish"):
            said.finish = part.finish

    def check(self, alone: "Stream") -> None:
        """Raises unless it is what the request says undisturbed."""
        assert self.said.keys() == alone.said.keys()
        for index, said in self.said.items():
            expected = alone.said[index]
            assert said.token_ids == expected.token_ids and said.text == expected.text
            assert said.finish == expected.finish
            assert len(said.logprobs) == len(expected.logprobs)
            assert all(map(lambda a, b: math.isclose(a, b, abs_tol=1e-3), said.logprobs, expected.logprobs))
        assert self.completion_tokens == alone.completion_tokens


def request(number: int, max_tokens: int = 220) -> gateway_pb2.GenerateRequest:
    """Greedy and seeded ones, with log-probabilities, several completions and stop strings among them."""
    numbers = random.Random(number)
    made = gateway_pb2.GenerateRequest(
        model="tiny",
        token_ids=TokenIds(ids=[numbers.randrange(2, 300) for _ in range(20)]),
        sampling=SamplingParams(temperature=number % 2, seed=number),
        stopping=StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
    )
    if number % 5 == 0:
        made.n = 2
    if number % 3 == 0:
        made.output.CopyFrom(OutputOptions(logprobs=1))
    if number % 7 == 0:
        made.stop.append("qz")
    return made


async def follow(call: AsyncIterator[gateway_pb2.GenerateResponse], stream: Stream) -> Stream:
    async for part in call:
        stream.take(part)
    return stream


class Fleet:
    """Attributes: executors and gateway, as services; `stub` and `channel` of a client."""

    def __init__(self, store: str, folder: Path) -> None:
        self.executors: list[Service] = []
        self.gateway: Service
        self.stub: gateway_pb2_grpc.GatewayAsyncStub
        self._store, self._folder = store, folder
        self._stack = ExitStack()
        (held,) = map(self._stack.enter_context, hold_ports(1))
        self._gateways = str(held.getsockname()[1])  # the port of one gateway after the other

    def add_executor(self, *more: str, port: str = "0", drain: float = 20, within: Sequence[str] = ()) -> Service:
        """`more`: arguments of the executor; `within` as `service` takes it."""
        log = self._folder / f"executor-{len(self.executors)}.log"
        made = self._stack.enter_context(
            service(
                "executor_svc",
                log,
                *("--store", self._store, "--engine", "tiny", "--drain-seconds", f"{drain}", *more),
                port=port,
                within=within,
            )
        )
        self.executors.append(made)
        return made

    def add_gateway(self, addresses: Sequence[str], *arguments: str) -> None:
        """Where the one was that has ended, if there was one."""
        executors = [word for address in addresses for word in ("--executor", address)]
        more = ("--store", self._store, "--metrics-port", "0", *executors, *arguments)
        self.gateway = self._stack.enter_context(
            service("gateway", self._folder / "gateway.log", *more, port=self._gateways)
        )

    async def ready(self, count: int) -> None:
        """Returns when the gateway sees so many executors with the model."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    models = (await self.stub.ListModels(gateway_pb2.ListModelsRequest())).models
                    if models and models[0].ready_executors == count:
                        return
                await asyncio.sleep(0.05)

    async def alone(self, numbers: Sequence[int], max_tokens: int = 220) -> list[Stream]:
        """What these requests say when nothing disturbs them."""
        calls = [self.stub.Generate(request(number, max_tokens)) for number in numbers]
        return await asyncio.gather(*(follow(call, Stream()) for call in calls))

    def metric(self, name: str, of: Callable[[float, float], float] = lambda a, b: a + b) -> float:
        """A gateway's metric, over all its labels."""
        with urllib.request.urlopen(self.gateway.metrics, timeout=10) as page:
            text = page.read().decode()
        total = 0.0
        for value in re.findall(rf"^(?:enginehouse_)?{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE):
            total = of(total, float(value))
        return total

    async def settled(self, executors: Sequence[Service] | None = None) -> None:
        """Returns when nothing runs, at the gateway and at the executors, and every block is free."""
        async with asyncio.timeout(60):
            for executor in executors if executors is not None else self.executors:
                async with grpc.aio.insecure_channel(executor.address) as channel:
                    stub = executor_pb2_grpc.ExecutorStub(channel)
                    while True:
                        load = (await stub.GetStatus(executor_pb2.GetStatusRequest())).engines[0].load
                        if not load.running + load.waiting and load.free_kv_blocks == load.total_kv_blocks:
                            break
                        await asyncio.sleep(0.05)
            while self.metric("gateway_streams_open") or self.metric("gateway_executor_requests"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def close(self) -> None:
        self._stack.close()


@contextlib.asynccontextmanager
async def fleet(
    store: str,
    folder: Path,
    executors: int = 2,
    through: Callable[[str], str] = lambda address: address,
    *more: str,
    drain: float = 20,
) -> AsyncIterator[Fleet]:
    """`through`: an executor's address, as the gateway is told it; `more`: arguments of the gateway; `drain`: the seconds that
    an executor lets its requests end in."""
    made = Fleet(store, folder)
    try:
        addresses = [through(made.add_executor(drain=drain).address) for _ in range(executors)]
        made.add_gateway(addresses, *more)
        async with grpc.aio.insecure_channel(made.gateway.address) as channel:
            made.stub = gateway_pb2_grpc.GatewayStub(channel)
            await made.ready(executors)
            yield made
    finally:
        made.close()


class Elsewhere:
    """A network namespace with a cable to this one, for a process of another machine.

    Attributes:
        within: the command by which a program runs there.
        address: its own there.
    """

    address = "10.78.0.2"

    def __init__(self, stack: ExitStack) -> None:
        """Raises OSError or CalledProcessError where none may be made."""
        self._name = f"eh{os.getpid()}"
        self.within = ("ip", "netns", "exec", self._name)
        _ip("netns", "add", self._name)
        stack.callback(_ip, "netns", "del", self._name)  # and the cable with it
        _ip("link", "add", self._name, "type", "veth", "peer", "name", "cable", "netns", self._name)
        _ip("addr", "add", "10.78.0.1/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        _ip("-n", self._name, "addr", "add", f"{self.address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            _ip("-n", self._name, "link", "set", device, "up")

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        _ip("-n", self._name, "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self._name, "link", "set", "cable", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Valve:
    """A TCP proxy that can stop to forward, in both directions, while its connections stay: half-open ones."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """Its address."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield "127.0.0.1:" + str(server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in self._writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            await server.wait_closed()

    def shut(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        self._open.clear()

    def reopen(self) -> None:
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        onward, back = await asyncio.open_connection(self._host, self._port)
        self._writers.append(back)
        for source, sink in ((reader, back), (onward, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
            sink.close()


def open_files(pid: int) -> int:
    """File descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextlib.contextmanager
def leaves_no_files(pid: int, slack: int = 4) -> Iterator[None]:
    """The process comes to have as many files open as before; gRPC keeps a few at hand."""
    before = open_files(pid)
    yield
    deadline = time.monotonic() + 30
    while (after := open_files(pid)) > before + slack:
        assert time.monotonic() < deadline, f"{before} files before, {after} after"
        time.sleep(0.1)
