"""How fast a GPU serves: time to the first token, a decode step at several batch sizes, and mixed requests.

    python -m bench.gpu [--model bench/models/llama-3.1-8b[-fp8|-int4|-int8]] [--kv-cache-dtype fp8|int8] [--batch 256] [--tune]
        [--tokens 8192] [--out FILE.json] [--only WORKLOAD ...] [--requests 1024] [--profile ROWS ...]
    torchrun --nproc-per-node 2 -m bench.gpu --tp 2 ...

Requests go through scheduler and runner as in the worker's own loop; prompts are token ids, end-of-sequence ids do not count.
Dummy weights, on this device; where there is no GPU on the CPU, to try the program itself. Names of results begin with `fp8_`,
`int4_` or `int8_` where products are packed; `kv_` follows where the KV cache is of 8 bits; those of several GPUs with tp or pp
and how many; those of another batch size than 256, or other tokens a step than 8192, end with it. `mixed_s` is of 1024 requests,
or of as many as are asked for, which its name then has. `itl_ms_bN` is (time for 257 tokens - time for 1) / 256 with N prompts
of 128 tokens; medians.
"""

import argparse
import contextlib
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.products import name_of, read_speed
from bench.serving import build_dummy, facts, load, run, save
from engine.errors import Unavailable
from executor_svc.core import Batch, Sampling, Sequence
from executor_svc.frames import FrameSocket

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKLOADS = ("ttft_ms_128", "ttft_ms_4096", "itl_ms_b1", "itl_ms_b8", "itl_ms_b64", "itl_ms_b256", "mixed_s")
REQUESTS = 1024  # of mixed_s
# vLLM 0.26, the floor and what we mean to reach, on one H100; by the prefix of a result's name
TABLES = {
    "": ((11.5, 104.7, 6.60, 6.87, 7.77, 12.68, 35.4), (6, 90, 5.05, 5.2, 5.8, 10.3, 26), (8, 98, 5.5, 5.8, 7.1, 11.6, 30)),
    "fp8_": (
        (8.0, 68.1, 4.27, 4.39, 5.42, 9.91, 28.0), (3.5, 57, 2.7, 2.8, 3.6, 7.1, 19), (5.5, 64, 3.4, 3.6, 4.7, 8.8, 23),
    ),
    "int4_": ((), (None, None, 2.6), (None, None, 2.6)),  # and never slower than 16 bits up to 64 at once
    "int8_": ((), (None, None, 3.6), (None, None, 3.6)),
    "fp8_kv_": ((), (*[None] * 6, 14.5), (*[None] * 6, 19)),
}  # fmt: skip


class Bench:
    """An engine of dummy weights, loaded."""

    def __init__(
        self,
        store: Path,
        model: Path,
        kv_cache_dtype: str,
        batch: int,
        tokens: int,
        tuned: bool,
        *,
        tp: int = 1,
        pp: int = 1,
    ) -> None:
        sizes = {"max_batch_size": batch, "max_seq_len": 8192, "max_num_tokens": tokens, "tp_size": tp, "pp_size": pp}
        engine = build_dummy(model, store, device=DEVICE, kv_cache_dtype=kv_cache_dtype, **sizes)
        self.loaded = load(store, engine, tuned=tuned)
        self.group = self.loaded.group
        self.prefix = _prefix(self.loaded.manifest.quantization)
        self.prefix += {"auto": "", "fp8": "kv_", "int8": "kv_int8_"}[kv_cache_dtype]
        self.prefix += "".join(f"{name}{size}_" for name, size in (("tp", tp), ("pp", pp)) if size > 1)
        self.suffix = ("" if batch == 256 else f"_batch{batch}") + ("" if tokens == 8192 else f"_tokens{tokens}")
        print("tuned in {:.1f} s, runner with graphs in {:.1f} s".format(*self.loaded.seconds), flush=True)
        self.serial = 0

    def follow(self) -> None:
        """What a rank does that is not 0, until rank 0 has ended."""
        front, _held = socket.socketpair()
        with contextlib.suppress(Unavailable):
            self.group.follow(FrameSocket(front), self.loaded.runner)

    def requests(self, lengths: list[tuple[int, int]]) -> list[Sequence]:
        made = []
        for prompt, tokens in lengths:
            self.serial += 1
            most = min(120000, self.loaded.manifest.model.vocab_size)
            ids = torch.randint(0, most, (prompt,), generator=torch.Generator().manual_seed(self.serial)).tolist()
            made.append(Sequence(0, self.serial, ids, prompt, tokens, Sampling(0.0), salt=b"%d" % self.serial))
        return made

    def run(self, work: list[Sequence]) -> float:
        """Seconds until all have ended; `steps` has those of each step, by kind."""
        self.steps: dict[str, list[float]] = {}
        last = time.perf_counter()

        def ended(batch: Batch) -> None:
            nonlocal last
            now, tokens = time.perf_counter(), sum(item.count for item in batch.items)
            kind = "decode" if tokens == len(batch.items) else "mixed" if tokens < 1280 else "large"
            self.steps.setdefault(kind, []).append(now - last)
            last = now

        return run(self.loaded, work, ended)

    def median(self, lengths: list[tuple[int, int]], rounds: int) -> float:
        self.run(self.requests(lengths))
        return statistics.median(self.run(self.requests(lengths)) for _ in range(rounds))

    def measure(self, name: str, requests: int) -> float:
        if name == "mixed_s":
            draw = random.Random(1)
            lengths = [(draw.randint(32, 1024), draw.randint(32, 512)) for _ in range(requests)]
            self.run(self.requests(lengths[:64]))
            found = self.run(self.requests(lengths))
            for kind, times in self.steps.items():
                print(
                    f"  {len(times)} steps {kind}: {sum(times):.2f} s, median {1e3 * statistics.median(times):.1f} ms"
                )
            return found
        kind, _, size = name.rpartition("_")
        if kind == "ttft_ms":
            return 1e3 * self.median([(int(size), 1)], 7)
        count = int(size[1:])
        one, many = self.median([(128, 1)] * count, 3), self.median([(128, 257)] * count, 3)
        return 1e3 * (many - one) / 256

    def profile(self, rows: int) -> None:
        """Kernels of decode steps with so many rows, or of a prompt of -rows tokens, by time."""
        work = self.requests([(128, 40)] * rows if rows > 0 else [(-rows, 1)])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            self.run(work)
        what = f"{rows} requests of 40 tokens" if rows > 0 else f"a prompt of {-rows}"
        print(f"{what}\n{seen.key_averages().table(sort_by='cuda_time_total', row_limit=16)}")


def _prefix(quantization: dict[str, Any] | None) -> str:
    """Of names of results: what the products are packed in."""
    forms = {str(form).partition(",")[0] for form in (quantization or {}).get("packed", {}).values()}
    return "".join(f"{form.replace('float8_e4m3fn', 'fp8')}_" for form in sorted(forms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("bench/models/llama-3.1-8b"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8", "int8"], default="auto")
    parser.add_argument("--batch", type=int, default=256, help="requests that run at once")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step, at most")
    parser.add_argument("--tune", action="store_true", help="measure tactics first, as a builder does")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of mixed_s")
    parser.add_argument(
        "--profile", type=int, nargs="*", default=[], help="batch sizes; a negative one is a prompt's length"
    )
    parser.add_argument("--tp", type=int, default=1, help="GPUs that each layer is divided among")
    parser.add_argument("--pp", type=int, default=1, help="groups of GPUs that the layers are divided among")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        measure(Path(store), arguments)


def measure(store: Path, arguments: argparse.Namespace) -> None:
    """Builds, loads, measures and prints; what is measured is written at once, in case the next one is cut off."""
    speed = 0.0
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        speed = read_speed() / 1e3
    parallel = {"tp": arguments.tp, "pp": arguments.pp}
    sizes = arguments.batch, arguments.tokens
    bench = Bench(store, arguments.model, arguments.kv_cache_dtype, *sizes, arguments.tune, **parallel)
    if bench.group.rank:
        bench.follow()
        os._exit(0)  # as a worker does
    size = round(bench.loaded.weight_bytes / 1e9, 3)
    print(
        f"{facts()['device']}, reading at {speed:.0f} GB/s, {size:.2f} GB, "
        f"{bench.loaded.runner.capabilities.num_blocks} blocks; the other columns are of an H100"
    )
    found: dict[str, Any] = {"model": arguments.model.name, "read_gb_s": round(speed), "weights_gb": size}
    if bench.loaded.tactics:
        found["tactics"] = [
            f"{' '.join(map(str, shape))}: {name_of(how)}" for shape, how in bench.loaded.tactics.items()
        ]
    columns = [dict(zip(WORKLOADS, column, strict=False)) for column in TABLES.get(bench.prefix, ())]
    print(f"{'':20}{'ours':>9}{'vLLM':>9}{'floor':>9}{'aim':>9}")
    for workload in arguments.only:
        whole = arguments.requests == REQUESTS or workload != "mixed_s"
        name = bench.prefix + (workload if whole else f"mixed{arguments.requests}_s") + bench.suffix
        found[name] = round(bench.measure(workload, arguments.requests), 3)
        others = [column.get(workload) if whole else None for column in columns]
        told = "".join(f"{'-' if other is None else format(other, '.2f'):>9}" for other in others)
        print(f"{name:20}{found[name]:9.2f}{told}", flush=True)
        save(arguments.out, found)
    for rows in arguments.profile:
        bench.profile(rows)
    sys.stdout.flush()
    if bench.group.size > 1:
        os._exit(0)


if __name__ == "__main__":
    main()
