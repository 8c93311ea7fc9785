"""One rank of an engine, on a GPU of its own: sum_harness.py STORE ENGINE

The environment says which rank. Rank 0 prints the tokens of its sequences, and the kernels that have run, as JSON.
"""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import torch

from bench.serving import load, run
from engine.errors import Unavailable
from executor_svc.core import Sampling, Sequence
from executor_svc.frames import FrameSocket
from tests.gpu.test_torch_runner import prompts


def main(store: str, engine_id: str) -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    loaded = load(Path(store), engine_id)
    if loaded.group.rank:
        front, _held = socket.socketpair()
        with contextlib.suppress(Unavailable):  # the end of rank 0
            loaded.group.follow(FrameSocket(front), loaded.runner)
        return
    work = [Sequence(0, row, list(prompt), len(prompt), 48, Sampling(0.0)) for row, prompt in enumerate(prompts())]
    run(loaded, work[:1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run(loaded, work[1:])
        torch.cuda.synchronize()
    found = {
        "tokens": [one.token_ids for one in work],
        "graphs": len(loaded.runner.graphs),
        "kernels": {event.key: event.count for event in seen.key_averages()},
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
