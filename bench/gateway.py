"""One gateway process: tokens a second to many streaming clients, their gaps, and what it adds to the first token.

python bench/gateway.py [--clients 128] [--rate 66000] [--seconds 10] [--out FILE.json]; status 1 if a bound does not hold.

The gateway is the real one, started by its own command, with the demo model's tokenizer. Before it stands an executor that
computes nothing: it serves Executor.Run and gives every request the next token of a text at each step, in columns. Clients are
streams of separate processes, a connection each. The second phase has half of the rate; beside it, single requests are sent
in turn through the gateway and to the executor itself.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]  # roles are started by this file's name

from engine import blobs, manifest, registry  # noqa: E402
from engine.directory import DirectoryStore  # noqa: E402
from engine.fingerprint import Fingerprint  # noqa: E402
from gateway.tokenizer import Tokenizer, TokenizerConfig  # noqa: E402
from protos.rpc import CHANNEL_OPTIONS  # noqa: E402
from protos.v1 import executor_pb2 as pb  # noqa: E402
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, FinishInfo, StoppingCriteria  # noqa: E402
from protos.v1.executor_pb2_grpc import (  # noqa: E402
    ExecutorServicer,
    ExecutorStub,
    add_ExecutorServicer_to_server,
)
from protos.v1.gateway_pb2 import GenerateRequest  # noqa: E402
from protos.v1.gateway_pb2_grpc import GatewayStub  # noqa: E402
from tests.integration.services import service  # noqa: E402

LEAST_RATE, MOST_GAP, MOST_ADDED = 60_000, 20.0, 2.0  # tokens/s, ms between a stream's responses, ms to the first token
MAX_SEQ_LEN, LENGTH = 8192, 4096  # of the engine; tokens a request
PROMPT = "It was a bright cold day in April, and the clocks were striking. " * 4
TEXT = "The house stood on a slight rise just on the edge of the village. It stood on its own and looked over a broad "
WARM_UP, PROBE_PAUSE = 3.0, 0.03  # seconds
CLIENT_PROCESSES = 2
CHECKPOINT = ROOT / "examples" / "demo-model"


def publish(store: DirectoryStore) -> str:
    """An engine with a real tokenizer, whose weights nobody will ask for; its id."""
    files = [
        blobs.put_bytes(store, name, (CHECKPOINT / name).read_bytes())
        for name in ("tokenizer.json", "tokenizer_config.json")
    ]
    identity = {"bench": "gateway"}
    facts: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())
    engine = manifest.Manifest(
        engine_id=manifest.engine_id(identity),
        identity=identity,
        source="bench",
        created=datetime.now(UTC).isoformat(),
        model=manifest.ModelFacts(
            architecture="llama",
            vocab_size=facts["vocab_size"],
            num_layers=1,
            hidden_size=8,
            num_heads=1,
            num_kv_heads=1,
            dtype="float32",
            kv_bytes_per_token=64,
            eos_token_ids=(1,),
            num_parameters=8,
        ),
        limits=manifest.Limits(max_batch_size=256, max_seq_len=MAX_SEQ_LEN, max_num_tokens=2048),
        mapping=manifest.Parallelism(),
        fingerprint=Fingerprint("torch", "cpu"),
        ranks=(manifest.Rank(blobs.put_bytes(store, "program.json", b"{}"), ()),),
        tokenizer=tuple(files),
    )
    registry.publish(store, engine)
    registry.set_name(store, "demo", engine.engine_id)
    return engine.engine_id


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


def connect(address: str) -> grpc.aio.Channel:
    """A connection that no other channel shares."""
    return grpc.aio.insecure_channel(address, options=[*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])


async def clients_role(address: str, count: int, begin: float, end: float) -> None:
    """Streams that ask again when they have ended; prints what came between two times of the monotonic clock."""
    tokens = messages = 0
    gaps: list[float] = []

    async def client() -> None:
        nonlocal tokens, messages
        async with connect(address) as channel:
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

    async with connect(gateway) as one, connect(executor) as other:
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


@contextmanager
def role(name: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """A process of this file that plays one part."""
    command = [sys.executable, __file__, "--role", name, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """That a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def line(process: "subprocess.Popen[str]") -> str:
    if process.stdout is None or not (said := process.stdout.readline().strip()):
        raise SystemExit(f"{process.args} said nothing")
    return said


def measure(directory: Path, clients: int, rate: float, seconds: float) -> dict[str, float]:
    """One phase, with probes beside the clients."""
    store = str(directory / "store")
    engine_id = publish(DirectoryStore(Path(store)))
    with ExitStack() as stack:
        executor = line(stack.enter_context(role("executor", engine_id, rate / clients)))
        gateway = stack.enter_context(
            service("gateway", directory / "gateway.log", "--store", store, "--executor", executor)
        )
        time.sleep(1)  # until it is connected
        begin = time.monotonic() + WARM_UP
        end = begin + seconds
        counts = [len(range(number, clients, CLIENT_PROCESSES)) for number in range(CLIENT_PROCESSES)]
        streams = [stack.enter_context(role("clients", gateway.address, count, begin, end)) for count in counts]
        probe = stack.enter_context(role("probe", gateway.address, executor, engine_id, begin, end))
        time.sleep(begin - time.monotonic())
        before = cpu_seconds(gateway.process.pid)
        time.sleep(end - time.monotonic())
        used = cpu_seconds(gateway.process.pid) - before
        told = [json.loads(line(process)) for process in streams]
        first = json.loads(line(probe))
    tokens, messages = (sum(part[name] for part in told) for name in ("tokens", "messages"))
    gaps = sorted(gap for part in told for gap in part["gaps"])
    return {
        "tokens_per_second": round(tokens / seconds),
        "messages_per_second": round(messages / seconds),
        "gateway_cpu_share": round(used / seconds, 3),
        "gateway_cpu_seconds_per_1000_tokens": round(1000 * used / tokens, 5),
        "gateway_cpu_us_per_message": round(1e6 * used / messages, 1),
        "gap_ms_median": gaps[len(gaps) // 2],
        "gap_ms_p99": gaps[len(gaps) * 99 // 100],
        "first_token_ms_through_gateway": round(statistics.median(first["through"]), 3),
        "first_token_ms_direct": round(statistics.median(first["direct"]), 3),
        "first_token_ms_added": round(statistics.median(first["through"]) - statistics.median(first["direct"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--rate", type=float, default=66_000, help="tokens a second that the executor makes")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("values", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        asyncio.run(ROLES[arguments.role](*arguments.values))
        return
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "clients": arguments.clients,
        "offered_tokens_per_second": arguments.rate,
    }
    for name, rate in (("full", arguments.rate), ("half", arguments.rate / 2)):
        with tempfile.TemporaryDirectory() as directory:
            results[name] = measure(Path(directory), arguments.clients, rate, arguments.seconds)
        print(f"{name} load")
        for key, value in results[name].items():
            print(f"  {key:38s} {value:10g}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    full, half = results["full"], results["half"]
    failed = [
        said
        for holds, said in (
            (full["tokens_per_second"] >= LEAST_RATE, f"fewer than {LEAST_RATE} tokens/s"),
            (full["gap_ms_median"] <= MOST_GAP, f"a median of more than {MOST_GAP:g} ms between responses of a stream"),
            (half["first_token_ms_added"] <= MOST_ADDED, f"more than {MOST_ADDED:g} ms added to the first token"),
        )
        if not holds
    ]
    if failed:
        raise SystemExit("; ".join(failed))


ROLES: dict[str, Callable[..., Any]] = {
    "executor": lambda engine_id, rate: executor_role(engine_id, float(rate)),
    "clients": lambda address, count, begin, end: clients_role(address, int(count), float(begin), float(end)),
    "probe": lambda gateway, executor, engine_id, begin, end: probe_role(
        gateway, executor, engine_id, float(begin), float(end)
    ),
}

if __name__ == "__main__":
    main()
