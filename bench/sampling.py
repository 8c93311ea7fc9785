"""How long tokens take to be drawn on a GPU, beside argmax and the host's way (draw.py): ms a batch.

    python -m bench.sampling [--vocab 128256] [--dtype bfloat16] [--rows 1 8 64 256] [--chunk 2048 ...] [--out FILE.json]

Logits are normal, times a scale: at 1 a set of top-p 0.9 has most of the vocabulary, at 4 a few tokens. `GPU` is the time of the
kernels alone, of a graph that holds ten calls; `host` what a call takes Python to start; `draw.py` a whole call of the sampler on
the host, which waits for the tokens. Medians. The settings of each column are in SETTINGS.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.serving import save
from executor_svc import sampler
from executor_svc.core import Sampling, Scheduled, Sequence
from executor_svc.cuda_layout import draws
from executor_svc.kernels.sample import CHUNK, sample
from executor_svc.kernels.stage import choose
from executor_svc.kernels.tuning import timed

SETTINGS = {
    "greedy": Sampling(0.0),
    "temperature": Sampling(0.8),
    "top-k": Sampling(0.8, 50),
    "top-p": Sampling(0.8, 0, 0.9),
    "top-k, top-p": Sampling(0.8, 50, 0.95),
    "all": Sampling(0.8, 50, 0.95, min_p=0.05),
}
CALLS = 10


def gpu_ms(call: Callable[[], Any]) -> float:
    """The kernels of a call, without the host."""
    return timed(lambda _: call(), [None] * CALLS) / 1e3


def host_ms(call: Callable[[], Any], *, wait: bool) -> float:
    """What the host takes for a call: to start it, or until its tokens are there."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if wait:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def measure(logits: torch.Tensor, sampling: Sampling, chunk: int) -> dict[str, float]:
    rows = len(logits)
    sequences = [Sequence(0, 0, [0], 1, 9, replace(sampling, seed=row)) for row in range(rows)]
    items = [Scheduled(sequence, 7, 1, True) for sequence in sequences]
    tokens = logits.argmax(-1).int()
    if sampling.temperature == 0:
        places, last = (
            torch.arange(rows, dtype=torch.int32, device="cuda"),
            torch.zeros(rows, dtype=torch.int32, device="cuda"),
        )
        call: Callable[[], Any] = functools.partial(choose, logits, places, last)
        laid_out = 0.0
    else:
        at = np.zeros(rows, dtype=np.int32)
        settings = torch.from_numpy(draws(items, at)[:-rows]).cuda()
        best = tokens.clone()

        def call() -> None:
            tokens.copy_(best)  # as argmax would
            sample(logits, tokens, settings, limited=sampling.limited, chunk=chunk)

        began = time.perf_counter()
        for _ in range(CALLS):
            draws(items, at)
        laid_out = 1e3 * (time.perf_counter() - began) / CALLS
    return {
        "gpu_ms": round(gpu_ms(call), 4),
        "host_ms": round(host_ms(call, wait=False) + laid_out, 4),
        "draw_ms": round(host_ms(lambda: sampler.sample(logits.float(), sequences, [8] * rows), wait=True), 4),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--chunk", type=int, nargs="+", default=[CHUNK], help="powers of 2, 1024 to 4096")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for chunk in arguments.chunk:
        for scale in arguments.scales:
            print(f"\n{arguments.vocab} {arguments.dtype} logits, scale {scale:g}, chunks of {chunk}")
            print(f"{'rows':>5} {'':14}{'GPU':>9}{'host':>9}{'draw.py':>9}")
            for rows in arguments.rows:
                logits = torch.randn(rows, arguments.vocab, device="cuda").mul_(scale)
                logits = logits.to(getattr(torch, arguments.dtype))
                for name, sampling in SETTINGS.items():
                    one = measure(logits, sampling, chunk)
                    found.append({"chunk": chunk, "scale": scale, "rows": rows, "settings": name, **one})
                    print(
                        f"{rows:5} {name:14}{one['gpu_ms']:9.3f}{one['host_ms']:9.3f}{one['draw_ms']:9.3f}", flush=True
                    )
                save(arguments.out, {"vocab": arguments.vocab, "dtype": arguments.dtype, "measured": found})


if __name__ == "__main__":
    main()
