"""Generation on this machine's CPU beside transformers, and beside llama.cpp where it is installed.

python bench/cpu.py CHECKPOINT [--gguf FILE]... [--repeats N] [--out FILE.json]

CHECKPOINT is a directory in Hugging Face layout; results with bounds are for one of half a billion parameters in bfloat16, and
the exit status is 1 where they do not hold. Everybody generates 64 tokens greedily behind different prompts of 32, so that no
prefix is shared; prefill is the time to the first token behind 512. All run by turns in one process, medians are compared.
`pip install llama-cpp-python` for --gguf, which needs a compiler.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from executor_svc.core import Sampling, Sequence
from executor_svc.kernels import native
from tests.running import Engine, make_engine

ROOT = Path(__file__).parents[1]
PROMPT, LENGTH, LONG = 32, 64, 512
HELD = [  # what must hold: a name, the larger, how many times, the smaller ones
    ("alone", "ours alone", 1.25, ("transformers alone, bfloat16", "transformers alone, float32")),
    ("8 beside one after another", "ours 8", 3.0, ("transformers alone, bfloat16", "transformers alone, float32")),
    ("8 beside a static batch", "ours 8", 1.3, ("transformers 8, float32", "transformers 8, bfloat16")),
    ("32 beside 8", "ours 32", 2.0, ("ours 8",)),
    ("prefill", "ours prefill", 1.1, ("transformers prefill, bfloat16", "transformers prefill, float32")),
]


def prompts(count: int, length: int, variant: int) -> list[list[int]]:
    """Different from the first token on, and from those of other variants."""
    return [[1000 + 64 * variant + row, *(2000 + 7 * at for at in range(length - 1))] for row in range(count)]


class Ours:
    """Scheduler and runner in this process, as a worker has them."""

    def __init__(self, checkpoint: Path, store: Path) -> None:
        self._engine = Engine(make_engine(checkpoint, store, dtype="bfloat16", max_seq_len=1024), kv_blocks=512)

    def generate(self, ids: list[list[int]], tokens: int) -> None:
        self._engine.run(
            [Sequence(0, row, list(prompt), len(prompt), tokens, Sampling(0.0)) for row, prompt in enumerate(ids)]
        )


class Transformers:
    """`generate` with a static batch."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    def generate(self, ids: list[list[int]], tokens: int) -> None:
        batch = torch.tensor(ids)
        settings: dict[str, Any] = {
            "max_new_tokens": tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        self._model.generate(batch, attention_mask=torch.ones_like(batch), repetition_penalty=1.0, **settings)


class LlamaCpp:
    """One request; its prompt cache is emptied before."""

    def __init__(self, file: Path) -> None:
        import llama_cpp

        self._model = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=os.cpu_count(), verbose=False, n_batch=LONG)

    def generate(self, ids: list[list[int]], tokens: int) -> None:
        for prompt in ids:
            self._model.reset()
            stream = self._model.generate(prompt, temp=0.0)
            for _ in range(tokens):
                next(stream)


def rate(generate: Callable[[list[list[int]], int], None], count: int, variant: int) -> float:
    """Generated tokens per second."""
    ids = prompts(count, PROMPT, variant)
    began = time.perf_counter()
    generate(ids, LENGTH)
    return count * LENGTH / (time.perf_counter() - began)


def prefill(generate: Callable[[list[list[int]], int], None], variant: int) -> float:
    """Prompt tokens per second, to the first token."""
    ids = prompts(1, LONG, variant)
    began = time.perf_counter()
    generate(ids, 1)
    return LONG / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "examples" / "demo-model")
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs: dict[str, Callable[[int], float]] = {}

    def add(name: str, contestant: Any, counts: tuple[int, ...]) -> None:
        for count in counts:
            label = f"{name[0]} {'alone' if count == 1 else count}{name[1]}"
            runs[label] = lambda variant, count=count: rate(contestant.generate, count, variant)
        runs[f"{name[0]} prefill{name[1]}"] = lambda variant: prefill(contestant.generate, variant)

    with tempfile.TemporaryDirectory() as store:
        add(("ours", ""), Ours(arguments.checkpoint, Path(store)), (1, 8, 32))
        for dtype in (torch.bfloat16, torch.float32):
            add(("transformers", f", {str(dtype)[6:]}"), Transformers(arguments.checkpoint, dtype), (1, 8))
        for file in arguments.gguf:
            add(("llama.cpp", f", {file.stem}"), LlamaCpp(file), (1,))
        gc.collect()
        measured: dict[str, list[float]] = {name: [] for name in runs}
        for variant in range(arguments.repeats + 1):
            for name, run in runs.items():
                speed = run(variant)
                if variant:  # the first time is to get warm
                    measured[name].append(speed)
    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    print(f"{'tokens/s':44s}  median      least      most")
    for name, speeds in measured.items():
        print(f"{name:44s} {medians[name]:8.1f}   {min(speeds):8.1f}  {max(speeds):8.1f}")
    ratios = {name: medians[ours] / max(medians[other] for other in others) for name, ours, _, others in HELD}
    bounds = {name: bound for name, _, bound, _ in HELD}
    for name, ratio in ratios.items():
        print(
            f"{name}: {ratio:.2f} times, at least {bounds[name]} wanted: {'holds' if ratio >= bounds[name] else 'DOES NOT HOLD'}"
        )
    if arguments.out:
        commit = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
        results = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
            "device": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "native_operators": native.available,
            "checkpoint": arguments.checkpoint.name,
            "tokens_per_second": {name: round(speed, 1) for name, speed in medians.items()},
            "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        }
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.checkpoint.name != "demo-model" and any(ratio < bounds[name] for name, ratio in ratios.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
