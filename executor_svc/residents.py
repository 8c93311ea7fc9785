"""The engines that an executor has: what they leave of its memory, which goes first, what is said of one that does not fit."""

from collections.abc import Collection

from engine.errors import ResourceExhausted
from executor_svc.budget import size
from executor_svc.workers import WorkerProcess


def memory_left(limit: int | None, workers: Collection[WorkerProcess]) -> int | None:
    """Bytes that one more engine may take; None where there is no limit."""
    return None if limit is None else max(0, limit - sum(worker.status.memory_bytes for worker in workers))


def least_used(workers: Collection[WorkerProcess]) -> WorkerProcess | None:
    """Of those that serve and have no requests, the one that was used longest ago."""
    idle = [worker for worker in workers if worker.serving and not worker.busy]
    return min(idle, key=lambda worker: worker.last_used, default=None)


def beside(error: ResourceExhausted, workers: Collection[WorkerProcess], evict: bool) -> ResourceExhausted:
    """The error of an engine that does not fit, with what takes the memory and what could be done about it.

    Args:
        evict: engines without requests have been unloaded already.
    """
    others = [
        f"{worker.engine_id[:12]} ({size(worker.status.memory_bytes)}{', busy' if worker.busy else ''})"
        for worker in workers
        if worker.serving
    ]
    if others:
        fix = "wait until it is idle" if evict else "unload one (`enginehouse unload`), or load with --evict"
        hint = f" beside {', '.join(others)}: {fix}"
    else:
        hint = "; nothing else is loaded here: give it more memory, or build with a smaller --max-seq-len"
    return ResourceExhausted(error.message + hint, reason=error.reason, metadata=error.metadata)
