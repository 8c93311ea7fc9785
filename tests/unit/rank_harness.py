"""One rank of an engine with the runner for CUDA, where Triton interprets its kernels: rank_harness.py STORE ENGINE TEMPERATURE

The environment says which rank. Rank 0 prints the tokens of its sequences as JSON.
"""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

from engine.directory import DirectoryStore
from engine.errors import Unavailable
from engine.fingerprint import Node
from executor_svc.core import Sampling, Sequence
from executor_svc.cuda_runner import CudaRunner
from executor_svc.frames import FrameSocket
from executor_svc.loader import begin_load
from executor_svc.loop import scheduler_config
from executor_svc.meeting import meet
from executor_svc.scheduler import Scheduler
from tests.running import run_ahead

BLOCKS = 7  # of which one sequence may need 3: they do not all have room at once


def sequences() -> list[Sequence]:
    """Greedy, random and limited ones, in other batches than those whose logits are edited or told of."""
    samplings = [
        Sampling(0.0), Sampling(0.8, seed=1), Sampling(0.9, seed=2, top_k=20), Sampling(0.0, repetition_penalty=1.3),
    ]  # fmt: skip
    made = []
    for number, sampling in enumerate(samplings):
        prompt = [(7 * number + 3 * at) % 60 + 2 for at in range(5 + 9 * number)]
        made.append(Sequence(0, number, prompt, len(prompt), 3 + number, sampling))
    made[1].prompt_logprobs = 1
    return made


def main(store: str, engine_id: str) -> None:
    loaded = begin_load(
        DirectoryStore(Path(store)), engine_id, Node("cpu", {"torch": "2.13"}), which=lambda _: int(os.environ["RANK"])
    )
    with loaded.arriving:
        manifest = loaded.manifest
    group = meet(manifest, "cpu")
    block = 16 * sum(cache.bytes_per_token for cache in loaded.program.caches)
    runner = CudaRunner(
        loaded.program, loaded.weights, manifest.limits, kv_memory=(BLOCKS + 1) * block, device="cpu", group=group
    )
    assert runner.capabilities.num_blocks == BLOCKS
    if group.rank:
        front, _other = socket.socketpair()
        with contextlib.suppress(Unavailable):  # the end of rank 0
            group.follow(FrameSocket(front), runner)
        return
    work = sequences()
    scheduler = Scheduler(scheduler_config(runner, manifest))
    run_ahead(runner, scheduler, work)
    print(json.dumps([one.token_ids for one in work]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
