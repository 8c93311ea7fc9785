"""The parts that bench/gateway.py has played around a gateway, a process each: an executor, clients, a probe, idle connections.

Clients speak TLS with the gateway if $ENGINEHOUSE_TLS_CA is set.

python -m bench.gateway_roles executor|clients|probe|idle VALUES...
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from enginehouse.credentials import Given, find
from gateway.tokenizer import Tokenizer, TokenizerConfig
from protos.dial import NONE, Credentials
from protos.rpc import CHANNEL_OPTIONS
from protos.v1 import executor_pb2 as pb
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, FinishInfo, StoppingCriteria
from protos.v1.executor_pb2_grpc import ExecutorServicer, ExecutorStub, add_ExecutorServicer_to_server
from protos.v1.gateway_pb2 import GenerateRequest
from protos.v1.gateway_pb2_grpc import GatewayStub

CHECKPOINT = Path(__file__).parents[1] / "examples" / "demo-model"
LENGTH = 4096  # tokens a request
PROBE_PAUSE = 0.03  # seconds
PROMPT = "It was a bright cold day in April, and the clocks were striking. " * 4
TEXT = "The house stood on a slight rise just on the edge of the village. It stood on its own and looked over a broad "


class Steps(ExecutorServicer):
    """Gives each request a token at each step; the first one at the next step, as where a prompt takes no time."""

    def __init__(self, engine_id: str, steps_per_second: float, token_ids: list[int]) -> None:
        self._engine_id, self._period, self._token_ids = engine_id, 1 / steps_per_second, token_ids
        self._streams: dict[asyncio.Queue[pb.StepOutput], dict[int, int]] = {}  # with tokens left, by handle
        self._step = 0

    async def run(self) -> None:
        due = time.monotonic()
        while True:
            due += self._period
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._step += 1
            for outputs, left in self._streams.items():
                if left:
                    outputs.put_nowait(self._output(left))

    def _output(self, left: dict[int, int]) -> pb.StepOutput:
        text, step = self._token_ids, self._step
        output = pb.StepOutput(
            step=step, handles=left, token_ids=[text[(handle + step) % len(text)] for handle in left]
        )
        for handle, count in left.items():
            if count == LENGTH or count == 1:
                output.started.add(handle=handle, prompt_tokens=1)
            left[handle] = count - 1
        for handle in [handle for handle, count in left.items() if count == 0]:
            del left[handle]
            output.finished.add(handle=handle, finish=FinishInfo(reason=FINISH_REASON_LENGTH))
        output.load.engine_id = self._engine_id
        return output

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: Any) -> pb.ExecutorStatus:
        engine = pb.EngineStatus(engine_id=self._engine_id, state=pb.ENGINE_STATE_READY)
        return pb.ExecutorStatus(engines=[engine], device="none")

    async def Run(self, commands: AsyncIterator[pb.Command], _context: Any) -> AsyncIterator[pb.StepOutput]:
        outputs: asyncio.Queue[pb.StepOutput] = asyncio.Queue()
        left = self._streams[outputs] = {}
        reader = asyncio.create_task(self._read(commands, left))
        try:
            while True:
                yield await outputs.get()
        finally:
            del self._streams[outputs]
            reader.cancel()

    async def _read(self, commands: AsyncIterator[pb.Command], left: dict[int, int]) -> None:
        async for command in commands:
            if command.HasField("submit"):
                left[command.submit.handle] = command.submit.stopping.max_tokens
            for handle in command.cancel.handles:
                left.pop(handle, None)

    async def Generate(self, submit: pb.Submit, _context: Any) -> AsyncIterator[pb.GenerateOutput]:
        outputs: asyncio.Queue[pb.StepOutput] = asyncio.Queue()
        self._streams[outputs] = {0: submit.stopping.max_tokens}
        try:
            ended = False
            while not ended:
                output = await outputs.get()
                ended = bool(output.finished)
                yield pb.GenerateOutput(token_ids=output.token_ids)
        finally:
            del self._streams[outputs]


async def executor_role(engine_id: str, steps_per_second: float) -> None:
    """The executor, until it is terminated."""
    tokenizer = Tokenizer((CHECKPOINT / "tokenizer.json").read_bytes(), TokenizerConfig())
    steps = Steps(engine_id, steps_per_second, tokenizer.encode(TEXT, add_special_tokens=False))
    server = grpc.aio.server()
    add_ExecutorServicer_to_server(steps, server)
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await steps.run()


def connect(address: str, credentials: Credentials) -> grpc.aio.Channel:
    """A connection that no other channel shares."""
    return credentials.channel(address, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])


async def clients_role(address: str, count: int, begin: float, end: float) -> None:
    """Streams that ask again when they have ended; prints what came between two times of the monotonic clock."""
    tokens = messages = 0
    gaps: list[float] = []
    credentials = find(Given())

    async def client() -> None:
        nonlocal tokens, messages
        async with connect(address, credentials) as channel:
            stub: Any = GatewayStub(channel)
            while time.monotonic() < end:
                last = None
                request = GenerateRequest(model="demo", text=PROMPT, stopping=StoppingCriteria(max_tokens=LENGTH))
                async for response in stub.Generate(request):
                    now = time.monotonic()
                    if begin <= now < end:
                        tokens += len(response.token_ids)
                        messages += 1
                        if last:
                            gaps.append(round((now - last) * 1000, 3))
                    last = now
                    if now >= end:
                        break

    await asyncio.gather(*(client() for _ in range(count)))
    print(json.dumps({"tokens": tokens, "messages": messages, "gaps": gaps}))


async def probe_role(gateway: str, executor: str, engine_id: str, begin: float, end: float) -> None:
    """First-token times in ms, in turn through the gateway and from the executor."""
    tokenizer = Tokenizer((CHECKPOINT / "tokenizer.json").read_bytes(), TokenizerConfig())
    token_ids = tokenizer.encode(PROMPT, add_special_tokens=True)
    stopping = StoppingCriteria(max_tokens=2)
    through, direct = [], []

    async def first(begin_call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call = begin_call()
        try:
            async for output in call:
                if output.token_ids:
                    return (time.perf_counter() - began) * 1000
        finally:
            call.cancel()
        raise SystemExit("a request ended without a token")

    async with connect(gateway, find(Given())) as one, connect(executor, NONE) as other:
        stub: Any = GatewayStub(one)
        own: Any = ExecutorStub(other)
        request = GenerateRequest(model="demo", text=PROMPT, stopping=stopping)
        submit = pb.Submit(engine_id=engine_id, token_ids=token_ids, stopping=stopping)
        while time.monotonic() < end:
            for times, begin_call in (
                (through, lambda: stub.Generate(request)),
                (direct, lambda: own.Generate(submit)),
            ):
                took = await first(begin_call)
                if time.monotonic() >= begin:
                    times.append(took)
                await asyncio.sleep(PROBE_PAUSE)
    print(json.dumps({"through": through, "direct": direct}))


async def idle_role(address: str, count: int) -> None:
    """Connections that stand and do nothing, until it is terminated; prints how many there are."""
    credentials = find(Given())
    channels = [connect(address, credentials) for _ in range(count)]
    places = asyncio.Semaphore(32)

    async def stand(channel: grpc.aio.Channel) -> None:
        async with places:
            await asyncio.wait_for(channel.channel_ready(), 60)

    await asyncio.gather(*map(stand, channels))
    print(len(channels), flush=True)
    await asyncio.Event().wait()


ROLES: dict[str, Callable[..., Any]] = {
    "executor": lambda engine_id, rate: executor_role(engine_id, float(rate)),
    "clients": lambda address, count, begin, end: clients_role(address, int(count), float(begin), float(end)),
    "idle": lambda address, count: idle_role(address, int(count)),
    "probe": lambda gateway, executor, engine_id, begin, end: probe_role(
        gateway, executor, engine_id, float(begin), float(end)
    ),
}

if __name__ == "__main__":
    asyncio.run(ROLES[sys.argv[1]](*sys.argv[2:]))
