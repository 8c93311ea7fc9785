"""What a runner launches, without a GPU: python -m tests.kernel_traffic PROGRAM.json LIMITS ARCHIVE CACHE

Walks through all kernels as the tool does, with those of an archive at hand, then through steps of random requests. Prints how
many kernels were found in the archive, which were compiled, and which only the requests wanted.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from triton import knobs

from engine.manifest import Limits
from engine.program import Program
from executor_svc import compile as tool
from executor_svc.core import Logprobs, Sampled, Sampling, SchedulerConfig, Sequence
from executor_svc.cuda_runner import CudaRunner
from executor_svc.kernel_archive import adopt
from executor_svc.kernels.tactics import RULE
from executor_svc.scheduler import Scheduler

SAMPLING = (Sampling(0.0), Sampling(0.0), Sampling(0.7, seed=3), Sampling(0.9, top_k=5, top_p=0.8, seed=4))


def requests(count: int, longest: int, draw: random.Random) -> list[Sequence]:
    made = []
    for number in range(count):
        prompt = [draw.randrange(9) for _ in range(min(longest, draw.choice((1, 2, 3, 5, 16, 33, 64, 100, 300))))]
        one = Sequence(0, number, prompt, len(prompt), draw.choice((1, 3, 10)), draw.choice(SAMPLING))
        one.prompt_logprobs = 0 if len(prompt) > 1 and draw.random() < 0.3 else None
        made.append(one)
    return made


@torch.inference_mode()
def serve(runner: CudaRunner, limits: Limits, rounds: int) -> None:
    """Steps as the scheduler makes them; whatever was sampled is token 7."""
    draw = random.Random(1)
    sizes = {name: getattr(limits, name) for name in ("max_batch_size", "max_num_tokens", "max_seq_len")}
    scheduler = Scheduler(SchedulerConfig(1000, 16, **sizes, max_in_flight=2, future_tokens=True))
    for _ in range(rounds):
        for one in requests(draw.choice((1, 2, 5, 17, 40)), limits.max_seq_len - 10, draw):
            scheduler.add(one)
        while batch := scheduler.schedule():
            layout, *_ = runner._launch(batch)
            told = {
                number: Logprobs([0.0] * len(item.prompt_rows), 0, [], [])
                for number, item in enumerate(batch.items)
                if item.prompt_rows
            }
            scheduler.commit(batch, Sampled([7] * len(layout.samples), prompt_logprobs=told))
            scheduler.take_prompt_logprobs()


def main() -> None:
    program, limits = Program.from_json(Path(sys.argv[1]).read_bytes()), msgspec.json.decode(sys.argv[2], type=Limits)
    adopt(Path(sys.argv[3]).read_bytes())
    found: list[str] = []
    compiled: list[str] = []
    runners: list[CudaRunner] = []

    def seen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        (found if cache_hit else compiled).append(metadata["name"])

    class Kept(CudaRunner):
        """So that its kernels can be asked for again."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            runners.append(self)

    knobs.compilation.listener = seen
    tool.CudaRunner = Kept  # type: ignore[misc]
    tool.compile_kernels(program, limits, 90, Path(sys.argv[4]), RULE)
    walked = [len(found), compiled.copy()]
    found.clear()
    compiled.clear()
    serve(runners[0], limits, 40)
    print(json.dumps([*walked, found + compiled]))


if __name__ == "__main__":
    main()
