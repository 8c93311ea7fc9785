"""What an executor's front costs on a GPU: requests on one stream of Executor.Run, beside the same ones in one process.

    python -m bench.gpu_grpc [--model bench/models/llama-3.1-8b] [--device cuda] [--requests 256] [--tokens 257] [--out FILE.json]

First scheduler and runner in this process, then a real executor (front and worker) over gRPC, with an engine of dummy weights;
prompts are random token ids, end-of-sequence ids do not count. Medians; the bound is 97% of the throughput, and the exit status 1
if it is less. On a CPU set OMP_WAIT_POLICY=PASSIVE, as executors do for their workers.
"""

import argparse
import asyncio
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import torch

from bench.serving import build_dummy, load, run, save
from executor_svc.core import Sampling, Sequence
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2 import Command, StepOutput, Submit
from protos.v1.executor_pb2_grpc import ExecutorStub

BOUND = 0.97


def prompts(count: int, length: int, number: int) -> list[list[int]]:
    """Of one round: others than those of the other rounds, so that no prefix is cached."""
    draw = random.Random(number)
    return [[draw.randrange(256, 2048) for _ in range(length)] for _ in range(count)]


def in_process(store: Path, engine: str, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each round."""
    loaded = load(store, engine)
    rounds = []
    for number in range(arguments.rounds + 1):
        made = prompts(arguments.requests, arguments.prompt, number)
        work = [Sequence(0, at, prompt, len(prompt), arguments.tokens, Sampling(0.0)) for at, prompt in enumerate(made)]
        rounds.append(run(loaded, work))
        if any(one.num_completion != arguments.tokens for one in work):
            raise SystemExit("a request has not got all its tokens")
    return rounds[1:]


def worker_of(front: int) -> int:
    """The executor's only child that is left when it serves."""
    return int(Path(f"/proc/{front}/task/{front}/children").read_text().split()[0])


def cpu_seconds(process: int) -> float:
    """That a process has used so far, with all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def one_stream(stub: Any, engine: str, made: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds until all have ended, and until the first token came, on a Run stream of their own."""
    sampling, stopping = SamplingParams(temperature=0), StoppingCriteria(max_tokens=tokens, ignore_eos=True)
    submits = [
        Submit(handle=handle, engine_id=engine, token_ids=ids, sampling=sampling, stopping=stopping)
        for handle, ids in enumerate(made)
    ]
    done = asyncio.Event()

    async def commands() -> AsyncIterator[Command]:
        for submit in submits:
            yield Command(submit=submit)
        await done.wait()

    began, first, count, left = time.perf_counter(), 0.0, 0, len(made)
    output: StepOutput
    async for output in stub.Run(commands()):
        if output.failed or output.HasField("engine_lost"):
            raise SystemExit(f"the executor says: {output.failed or output.engine_lost}")
        count, left = count + len(output.token_ids), left - len(output.finished)
        first = first or (time.perf_counter() - began if count else 0.0)
        if not left:
            break
    seconds = time.perf_counter() - began
    done.set()
    if count != len(made) * tokens:
        raise SystemExit(f"{count} tokens came instead of {len(made) * tokens}")
    return seconds, first


async def over_grpc(address: str, front: int, engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds, and the share of a core that front, worker and this client used in them."""
    processes = {"front": front, "worker": worker_of(front), "client": os.getpid()}
    rounds, firsts, used = [], [], dict.fromkeys(processes, 0.0)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = ExecutorStub(channel)
        for number in range(arguments.rounds + 1):
            made = prompts(arguments.requests, arguments.prompt, number)
            before = {name: cpu_seconds(process) for name, process in processes.items()}
            seconds, first = await one_stream(stub, engine, made, arguments.tokens)
            if number:
                rounds.append(seconds)
                firsts.append(first)
                for name, process in processes.items():
                    used[name] += cpu_seconds(process) - before[name]
    return {
        "rounds": rounds,
        "first_token_ms": round(1e3 * statistics.median(firsts), 1),
        "cpu": {name: round(seconds / sum(rounds), 3) for name, seconds in used.items()},
    }


def with_executor(store: Path, engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts a real executor and measures through its port."""
    command = [
        "-m",
        "executor_svc",
        "--port",
        "0",
        "--store",
        str(store),
        "--engine",
        engine,
        "--device",
        arguments.device,
    ]
    log = store / "executor.log"
    with log.open("w") as stderr:
        executor = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        line = executor.stdout.readline() if executor.stdout else ""
        if " listening on " not in line:
            raise SystemExit(f"the executor did not start: {log.read_text()}")
        return asyncio.run(over_grpc(line.split()[-1], executor.pid, engine, arguments))
    finally:
        executor.terminate()
        executor.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("bench/models/llama-3.1-8b"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        limits = {"max_batch_size": arguments.requests, "max_seq_len": arguments.prompt + arguments.tokens + 127}
        options = {"device": arguments.device, "max_num_tokens": 8192, **limits}
        engine = build_dummy(arguments.model, store, layers=arguments.layers, **options)
        direct = in_process(store, engine, arguments)
        print(f"in one process: {', '.join(f'{seconds:.3f}' for seconds in direct)} s", flush=True)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()  # the executor's worker needs the memory
        found = with_executor(store, engine, arguments)
    total = arguments.requests * arguments.tokens
    seconds = {"in_process": statistics.median(direct), "grpc": statistics.median(found.pop("rounds"))}
    found |= {f"{name}_tokens_per_s": round(total / value, 1) for name, value in seconds.items()}
    found |= {f"{name}_ms_per_step": round(1e3 * value / arguments.tokens, 3) for name, value in seconds.items()}
    found |= {
        "ratio": round(seconds["in_process"] / seconds["grpc"], 4),
        "bound": BOUND,
        "requests": arguments.requests,
    }
    for name, value in found.items():
        print(f"{name:28}{value}")
    save(arguments.out, found)
    if found["ratio"] < BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
