"""An executor whose engines cost nothing: the real front, Run stream, worker and scheduler around a runner that computes nothing.

python bench/null_executor.py [--max-batch-size N] [--port P] serves engine NULL_ENGINE; what it sends as tokens is made of
position and step alone. It starts its worker with --fd, as the executor does. PYTHONPATH is the repository.
"""

import argparse
import socket
import sys
import time
from collections import deque

from engine.fingerprint import Fingerprint
from engine.manifest import FileRef, Limits, Manifest, ModelFacts, Parallelism, Rank
from executor_svc.core import Batch, Sampled

NULL_ENGINE = "0" * 64
VOCAB, MAX_SEQ_LEN, BLOCK_SIZE = 32_000, 4096, 16


class NullRunner:
    """Every batch is computed at once, or `seconds` after it was started."""

    def __init__(self, max_batch_size: int, max_in_flight: int, seconds: float) -> None:
        from executor_svc.runner import Capabilities  # imports torch, which the front does without

        blocks = max_batch_size * MAX_SEQ_LEN // BLOCK_SIZE
        self.capabilities = Capabilities(
            blocks, BLOCK_SIZE, max_in_flight=max_in_flight, future_tokens=max_in_flight > 1, overlaps=True
        )
        self._seconds = seconds
        self._started: deque[tuple[Batch, float]] = deque()

    def start(self, batch: Batch) -> None:
        self._started.append((batch, time.monotonic() + self._seconds))

    def finish(self) -> Sampled:
        batch, ready = self._started.popleft()
        if self._seconds:
            time.sleep(max(0.0, ready - time.monotonic()))
        return Sampled([(item.start + batch.step) % (VOCAB - 1) + 1 for item in batch.items if item.samples])


def null_manifest(max_batch_size: int) -> Manifest:
    """Of an engine that has limits and nothing else."""
    program = FileRef("program.json", 0, "0" * 64, ())
    return Manifest(
        engine_id=NULL_ENGINE,
        identity={},
        source="bench",
        created="",
        model=ModelFacts("null", VOCAB, 0, 0, 0, 0, "float32", 0, (0,), 0),
        limits=Limits(max_batch_size, MAX_SEQ_LEN, 8192),
        mapping=Parallelism(),
        fingerprint=Fingerprint("torch", "", 1, "cpu"),
        ranks=(Rank(program, ()),),
        tokenizer=(),
    )


def work(arguments: argparse.Namespace) -> None:
    """The worker's process."""
    from executor_svc.frames import FrameSocket
    from executor_svc.loop import Worker
    from protos.v1.executor_pb2 import LoadEngineProgress
    from protos.v1.worker_pb2 import FromWorker

    front = FrameSocket(socket.socket(fileno=arguments.fd))
    while not front.receive(None):
        pass
    runner = NullRunner(arguments.max_batch_size, arguments.max_in_flight, arguments.step_ms / 1000)
    worker = Worker(front, null_manifest(arguments.max_batch_size), runner)
    front.send(FromWorker(progress=LoadEngineProgress(engine=worker.status())).SerializeToString())
    if arguments.profile:
        import cProfile

        profile = cProfile.Profile()
        profile.enable()
    try:
        worker.run()
    except ConnectionError:
        if arguments.profile:
            profile.dump_stats(arguments.profile)


async def serve(arguments: argparse.Namespace, options: list[str]) -> None:
    """The front's process."""
    from executor_svc.launch import Spares
    from executor_svc.server import ExecutorServicer
    from protos import rpc

    servicer = ExecutorServicer(".", "cpu", Spares(options, program=[__file__]))
    worker = await servicer.load(NULL_ENGINE)
    await worker.ready
    await rpc.serve("executor", servicer.register, "127.0.0.1", arguments.port, on_stop=servicer.close)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--max-in-flight", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=0.0, help="what a batch takes to compute")
    parser.add_argument("--profile", help="a file for the worker's cProfile")
    arguments = parser.parse_args()
    if arguments.fd is not None:
        work(arguments)
        return 0
    from protos import rpc

    options = ["--max-batch-size", str(arguments.max_batch_size), "--max-in-flight", str(arguments.max_in_flight)]
    options += ["--step-ms", str(arguments.step_ms)] + (["--profile", arguments.profile] if arguments.profile else [])
    return rpc.main("executor", serve(arguments, options))


if __name__ == "__main__":
    sys.exit(main())
