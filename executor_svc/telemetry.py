"""The executor's metrics: what its workers have counted, added up over their deaths, and what the front knows of them."""

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from protos import logs
from protos.histogram import FIRST_TOKEN, INTER_TOKEN, LOAD, QUEUE, REQUEST
from protos.metrics import Labels, Metrics
from protos.v1.executor_pb2 import EngineLoad, EngineState, Submit
from protos.v1.worker_pb2 import EngineMetrics

if TYPE_CHECKING:
    from executor_svc.workers import WorkerProcess

_FINISHES = ("eos", "stop", "length", "cancelled")
_STATES = {
    EngineState.ENGINE_STATE_LOADING: "loading",
    EngineState.ENGINE_STATE_READY: "ready",
    EngineState.ENGINE_STATE_UNLOADING: "unloading",
}
_PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


class Telemetry:
    """Counts by engine, of which the label has the first 12 digits of the id.

    Args:
        workers: those there are, for what is read at a scrape.
        draining: whether the executor is being stopped.
    """

    def __init__(
        self,
        metrics: Metrics,
        workers: Callable[[], Collection["WorkerProcess"]],
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._workers = workers
        counter, histograms = metrics.counter, metrics.histograms
        self._first_token = histograms(
            "executor_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN,
            "engine",
        )
        self._inter_token = histograms(
            "executor_inter_token_latency_seconds",
            "Between two tokens of a request, or two steps of a beam search.",
            INTER_TOKEN,
            "engine",
        )
        self._queue = histograms(
            "executor_queue_time_seconds", "From a request's arrival to its first batch.", QUEUE, "engine"
        )
        self._duration = histograms(
            "executor_request_duration_seconds", "From a request's arrival to its end.", REQUEST, "engine"
        )
        self._prompt = counter("executor_prompt_tokens_total", "Prompt tokens of requests that were begun.", "engine")
        self._queried = counter(
            "executor_prefix_cache_queried_tokens_total", "Prompt tokens looked up in the prefix cache.", "engine"
        )
        self._cached = counter(
            "executor_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache.", "engine"
        )
        self._completion = counter(
            "executor_completion_tokens_total", "Tokens generated, those of every beam among them.", "engine"
        )
        self._preemptions = counter(
            "executor_preemptions_total", "Sequences whose KV blocks were taken for others.", "engine"
        )
        self._finished = counter(
            "executor_requests_finished_total", "Requests that came to an end.", "engine", "reason"
        )
        self._failed = counter(
            "executor_requests_failed_total", "Requests that ended with an error.", "engine", "reason"
        )
        self._loads = histograms(
            "executor_engine_load_seconds", "From a worker's start to its engine's readiness.", LOAD, "engine"
        )
        self._load_failures = counter(
            "executor_engine_load_failures_total", "Loads of an engine that failed.", "engine"
        )
        self._deaths = counter("executor_worker_deaths_total", "Workers that ended by themselves.", "engine")

        def gauge(name: str, meaning: str, read: Callable[[EngineLoad], float]) -> None:
            metrics.gauge(name, meaning, lambda: self._of_loads(read), "engine")

        gauge("executor_requests_running", "Requests in the batch.", lambda load: load.running)
        gauge("executor_requests_waiting", "Requests not yet admitted, or preempted.", lambda load: load.waiting)
        gauge("executor_queued_tokens", "Known tokens that are not computed yet.", lambda load: load.queued_tokens)
        gauge("executor_kv_blocks", "KV blocks that the engine has.", lambda load: load.total_kv_blocks)
        gauge(
            "executor_kv_blocks_used",
            "KV blocks that sequences hold.",
            lambda load: load.total_kv_blocks - load.free_kv_blocks,
        )
        gauge("executor_kv_usage_ratio", "Share of the KV blocks that sequences hold.", _usage)
        metrics.gauge(
            "executor_engine_state", "1 for the state that the engine is in.", self._states, "engine", "state"
        )
        self.evictions = counter(
            "executor_engine_evictions_total", "Engines that were unloaded to make room for another."
        )
        metrics.gauge(
            "executor_engine_memory_bytes",
            "Weights and KV cache of the engine, of each device.",
            lambda: {(worker.engine_id[:12],): float(worker.status.memory_bytes) for worker in self._serving()},
            "engine",
        )
        metrics.gauge(
            "executor_draining",
            "1 while it is being stopped and lets requests end.",
            lambda: {(): float(draining())},
        )
        metrics.gauge(
            "executor_worker_resident_memory_bytes",
            "Resident memory of the engine's worker",
            self._memory,
            "engine",
        )

    def watch(self, worker: "WorkerProcess") -> None:
        """Follows a worker that is being started."""
        began, engine = time.monotonic(), worker.engine_id[:12]
        self._begin(engine)

        def ready() -> None:
            error = worker.ready.exception()
            if error is None:
                self._loads.of(engine).observe(time.monotonic() - began)
            elif not worker.stopping:
                self._load_failures.add(engine)

        def ended() -> None:
            load, reason = worker.status.load, worker.ended.result().reason
            self._failed.add(engine, reason, by=load.running + load.waiting)  # nobody is left to count them
            if not worker.stopping:
                self._deaths.add(engine)

        worker.ready.add_done_callback(lambda _: ready())
        worker.ended.add_done_callback(lambda _: ended())

    def add(self, engine_id: str, news: EngineMetrics) -> None:
        """What a worker has counted since it last told."""
        engine = engine_id[:12]
        for histogram, more in (
            (self._first_token.of(engine), news.time_to_first_token),
            (self._inter_token.of(engine), news.inter_token_latency),
            (self._queue.of(engine), news.queue_time),
            (self._duration.of(engine), news.request_duration),
        ):
            histogram.merge(more.counts, more.sum)
        self._prompt.add(engine, by=news.prompt_tokens)
        self._queried.add(engine, by=news.queried_tokens)
        self._cached.add(engine, by=news.cached_tokens)
        self._completion.add(engine, by=news.completion_tokens)
        self._preemptions.add(engine, by=news.preemptions)
        for reason, count in news.finished.items():
            self._finished.add(engine, reason, by=count)
        for reason, count in news.failed.items():
            self._failed.add(engine, reason, by=count)

    def refused(self, engine_id: str, reason: str) -> None:
        """A request for an engine that does not serve. An id that no worker has is anybody's word and becomes no label."""
        known = any(worker.engine_id == engine_id for worker in self._workers())
        self._failed.add(engine_id[:12] if known else "unknown", reason)

    def _begin(self, engine: str) -> None:
        """Zeros are there before the first request, so that rates have something to begin with."""
        for counter in (self._prompt, self._queried, self._cached, self._completion, self._preemptions):
            counter.add(engine, by=0)
        for counter in (self._load_failures, self._deaths):
            counter.add(engine, by=0)
        for reason in _FINISHES:
            self._finished.add(engine, reason, by=0)
        for histograms in (self._first_token, self._inter_token, self._queue, self._duration, self._loads):
            histograms.of(engine)

    def _of_loads(self, read: Callable[[EngineLoad], float]) -> dict[Labels, float]:
        return {(worker.engine_id[:12],): read(worker.status.load) for worker in self._serving()}

    def _serving(self) -> list["WorkerProcess"]:
        return [worker for worker in self._workers() if worker.status.state == EngineState.ENGINE_STATE_READY]

    def _states(self) -> dict[Labels, float]:
        return {
            (worker.engine_id[:12], name): float(worker.status.state == state)
            for worker in self._workers()
            for state, name in _STATES.items()
        }

    def _memory(self) -> dict[Labels, float]:
        found: dict[Labels, float] = {}
        for worker in self._workers():
            try:
                pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in worker.pids)
            except (OSError, IndexError):  # it has just ended, or there is no /proc
                continue
            found[worker.engine_id[:12],] = float(pages * _PAGE)
        return found


def name_request(submit: Submit) -> None:
    """Gives a request of a call of its own the call's id, or the call the request's. Raises InvalidArgument for what is none."""
    if submit.request_id:
        logs.rename(logs.check_request_id(submit.request_id))
    else:
        submit.request_id = logs.request_id()


def _usage(load: EngineLoad) -> float:
    return 1 - load.free_kv_blocks / load.total_kv_blocks if load.total_kv_blocks else 0.0
