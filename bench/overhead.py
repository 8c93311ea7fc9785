"""What the executor costs a step apart from computing: scheduler, worker's loop, front and Run stream, with a null runner.

PYTHONPATH=. python bench/overhead.py [--seconds S] [--clients N] [--out FILE.json]; exit status 1 above the bounds.
Clients keep the batch full: each request has 64 prompt tokens and gets 1024, another follows it at once, and some wait.
"cpu" is the CPU time of worker and front a step, "wall" the time a step, in which the clients work, too.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

import grpc

from bench.null_executor import NULL_ENGINE
from executor_svc.core import Batch, Sampled, Sampling, SchedulerConfig, Sequence
from executor_svc.scheduler import Scheduler
from protos.v1 import executor_pb2 as pb
from protos.v1 import executor_pb2_grpc
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria

ROOT = Path(__file__).parents[1]
BOUNDS = {32: 1.0, 256: 4.0}  # running -> ms a step
PROMPT, COMPLETION = 64, 1024
TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def children(pid: int) -> list[int]:
    """Its child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def scheduler_alone(running: int, steps: int = 400) -> float:
    """CPU ms of schedule and commit a step, in this process."""
    scheduler = Scheduler(SchedulerConfig(running * 256, 16, running, 8192, 4096))
    number = 0

    def refill() -> None:
        nonlocal number
        while len(scheduler.running) + scheduler.num_waiting < running:
            length = COMPLETION if number >= running else 1 + number * COMPLETION // running
            scheduler.add(Sequence(0, number, [7] * PROMPT, PROMPT, length, Sampling(0.0), salt=b"%d" % number))
            number += 1

    def step() -> None:
        batch: Batch | None = scheduler.schedule()
        if batch is None:
            raise SystemExit("nothing to schedule: the batch should be full")
        scheduler.commit(batch, Sampled([1] * sum(item.samples for item in batch.items)))
        refill()

    refill()
    for _ in range(50):
        step()
    began = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - began) / steps * 1000


def submit(handle: int, running: int) -> pb.Command:
    """The first ones are shorter by turns, so that the ends are spread over the steps."""
    length = COMPLETION if handle > running else 1 + handle * COMPLETION // running
    request = pb.Submit(
        handle=handle,
        engine_id=NULL_ENGINE,
        token_ids=[1 + (handle * 31 + at) % 1000 for at in range(PROMPT)],
        sampling=SamplingParams(temperature=0, seed=1),
        stopping=StoppingCriteria(max_tokens=length, ignore_eos=True),
    )
    return pb.Command(submit=request)


async def through_run(running: int, seconds: float, clients: int, options: list[str]) -> dict[str, float]:
    """ms a step and tokens a second, through a real front, worker and Run stream."""
    command = [sys.executable, str(ROOT / "bench" / "null_executor.py"), "--max-batch-size", str(running), *options]
    process = await asyncio.to_thread(
        subprocess.Popen, command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        address = (await asyncio.to_thread(cast(IO[str], process.stdout).readline)).split()[-1]
        (worker,) = children(process.pid)
        tokens, step = 0, 0

        async def client(share: int) -> None:
            nonlocal tokens, step
            async with grpc.aio.insecure_channel(address) as channel:
                stream = executor_pb2_grpc.ExecutorStub(channel).Run()
                last = share
                due: asyncio.Queue[int] = asyncio.Queue()
                for handle in range(1, share + 1):
                    due.put_nowait(handle)

                async def write() -> None:
                    while True:
                        await stream.write(submit(await due.get(), share))

                writing = asyncio.create_task(write())
                while (output := await stream.read()) is not grpc.aio.EOF:
                    if output.failed:
                        raise SystemExit(output.failed[0].failure.message)
                    step = max(step, output.step)
                    tokens += len(output.token_ids)
                    for _ in output.finished:
                        last += 1
                        due.put_nowait(last)
                writing.cancel()

        share = (
            2 * running + 64
        ) // clients  # some wait: an empty batch costs nothing, and steps come faster than answers
        tasks = [asyncio.create_task(client(share)) for _ in range(clients)]
        await asyncio.wait(tasks, timeout=2.0, return_when=asyncio.FIRST_EXCEPTION)
        before = (cpu_seconds(worker), cpu_seconds(process.pid), time.monotonic(), step, tokens)
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        after = (cpu_seconds(worker), cpu_seconds(process.pid), time.monotonic(), step, tokens)
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
    worker_s, front_s, wall, steps, made = (later - earlier for earlier, later in zip(before, after, strict=True))
    return {
        "worker_cpu_ms": 1000 * worker_s / steps,
        "front_cpu_ms": 1000 * front_s / steps,
        "cpu_ms": 1000 * (worker_s + front_s) / steps,
        "wall_ms": 1000 * wall / steps,
        "tokens_per_s": made / wall,
        "tokens_per_step": made / steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of the null executor, last")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for running, bound in BOUNDS.items():
        found = asyncio.run(through_run(running, arguments.seconds, arguments.clients, arguments.options))
        found = {"scheduler_cpu_ms": scheduler_alone(running), **found, "bound_ms": bound}
        results[str(running)] = {name: round(value, 3) for name, value in found.items()}
        print(f"{running:4} running:", ", ".join(f"{name} {value:g}" for name, value in results[str(running)].items()))
    full = all(found["tokens_per_step"] >= 0.95 * int(running) for running, found in results.items())
    if not full:
        print("the clients did not keep the batch full: this says nothing")
    held = full and all(max(found["cpu_ms"], found["wall_ms"]) <= found["bound_ms"] for found in results.values())
    print("within the bounds" if held else "ABOVE THE BOUNDS")
    if arguments.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip(),
            "cores": os.cpu_count(),
            "clients": arguments.clients,
            "running": results,
            "held": held,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
