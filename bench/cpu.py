"""The executor on this machine's CPU: tokens per second by batch size beside transformers, and what the scheduler costs.

python bench/cpu.py [CHECKPOINT] [--out FILE.json]; without a checkpoint, the demo model in float32.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from executor_svc.core import Sampled, Sampling, SchedulerConfig, Sequence
from executor_svc.scheduler import Scheduler
from tests.running import Engine, make_engine

ROOT = Path(__file__).parents[1]
PROMPT, LENGTH, REPEATS = 32, 64, 3


def requests(count: int) -> list[Sequence]:
    """Different prompts, so that no prefix is shared."""
    return [Sequence(0, row, [2 + row] + [7] * (PROMPT - 1), PROMPT, LENGTH, Sampling(0.0)) for row in range(count)]


def ours(engine: Engine, count: int) -> float:
    """Generated tokens per second, median."""
    rates = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        engine.run(requests(count))
        rates.append(count * LENGTH / (time.perf_counter() - began))
    return statistics.median(rates)


def theirs(model: transformers.PreTrainedModel, count: int) -> float:
    """As above, transformers' generate with a static batch."""
    ids = torch.tensor([request.token_ids for request in requests(count)])
    rates = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        settings = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        rates.append(count * LENGTH / (time.perf_counter() - began))
    return statistics.median(rates)


def scheduler_microseconds(running: int) -> float:
    """schedule() and commit() of one decode step, median, with nothing computed."""
    scheduler = Scheduler(SchedulerConfig(64 * running, 16, running, 8192, 1024))
    for row in range(running):
        scheduler.add(Sequence(0, row, [row] * PROMPT, PROMPT, 512))
    times = []
    for _ in range(200):
        began = time.perf_counter()
        batch = scheduler.schedule()
        if batch is None:
            raise SystemExit("nothing to schedule")
        scheduler.commit(batch, Sampled([5] * sum(item.samples for item in batch.items)))
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "examples" / "demo-model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "checkpoint": arguments.checkpoint.name,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as store:
        loaded = make_engine(arguments.checkpoint, Path(store), dtype="float32", max_seq_len=512)
        print("batch   ours tokens/s   transformers tokens/s   ratio")
        for count in (1, 8, 32):
            mine, other = ours(Engine(loaded), count), theirs(model, count)
            results[f"tokens_per_second_b{count}"], results[f"transformers_b{count}"] = round(mine, 1), round(other, 1)
            print(f"{count:5d}   {mine:13.1f}   {other:21.1f}   {mine / other:5.2f}", flush=True)
    for running in (32, 256):
        cost = scheduler_microseconds(running)
        results[f"scheduler_us_{running}"] = round(cost, 1)
        print(f"scheduler, {running} running: {cost:.0f} us a step")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
