"""What a worker counts of its requests, told to the front in increments; and its lines in the log. Imports no torch.

A step of many sequences costs some passes over a list: all that were in the last step share one latency, which is counted once.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List

from engine.errors import EnginehouseError
from executor_svc.core import Batch, Emitted, Reason, Sequence, Track
from protos import logs, tracing
from protos.histogram import FIRST_TOKEN, INTER_TOKEN, QUEUE, REQUEST, Histogram
from protos.v1.executor_pb2 import Submit
from protos.v1.worker_pb2 import EngineMetrics, Observations

INTERVAL = 1.0  # seconds between two reports, at least, while the worker is busy

log = logging.getLogger(__name__)


class Tally:
    """Is told what happens to sequences, and gives what has happened since it was last asked.

    Args:
        engine_id: for the log.
        prefix_cache: whether prompts are looked up in it.
        clock: in seconds; the same that `arrived` is taken from.
    """

    def __init__(self, engine_id: str, prefix_cache: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine_id[:12]
        self._prefix_cache = prefix_cache
        self._clock = clock
        self._told_at = -INTERVAL
        self._preemptions = 0  # told so far
        self._reset()

    def _reset(self) -> None:
        self._news = False
        self._queue, self._first_token = Histogram(QUEUE), Histogram(FIRST_TOKEN)
        self._inter_token, self._duration = Histogram(INTER_TOKEN), Histogram(REQUEST)
        self._prompt = self._cached = self._completion = 0
        self._finished: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def arrived(self, sequence: Sequence, submit: Submit, at: float) -> None:
        """A request has become a sequence; the front took it at this time, or never said when (0)."""
        track = sequence.track = Track(submit.request_id, at or self._clock())
        track.span = tracing.begin("request", submit.trace_context, track.arrived)

    def scheduled(self, batch: Batch) -> None:
        """A batch begins."""
        for item in batch.items:
            track = item.sequence.track
            if track is not None and not track.begun:
                track.begun = self._clock()
                self._queue.observe(track.begun - track.arrived)
                self._prompt += item.sequence.prompt_len
                self._cached += item.sequence.num_cached or 0
                self._news = True

    def emitted(self, news: List[Emitted]) -> None:
        """A batch has given tokens."""
        if not news:
            return
        now = self._clock()
        self._news = True
        self._completion += len(news)
        tracks = [emitted.sequence.track for emitted in news]
        gaps = Counter([track.last_token for track in tracks if track is not None])
        if gaps.pop(0.0, 0):
            for track in tracks:
                if track is not None and not track.first_token:
                    track.first_token = now
                    self._first_token.observe(now - track.arrived)
        for last, count in gaps.items():
            self._inter_token.observe(now - last, count)
        for track in tracks:
            if track is not None:
                track.last_token = now

    def ended(self, sequence: Sequence) -> None:
        """A request has its finish, a cancel or a deadline among them."""
        track, finish = sequence.track, sequence.finish
        if track is None or finish is None:
            return
        now = self._clock()
        self._news = True
        self._duration.observe(now - track.arrived)
        if finish.reason is Reason.DEADLINE:
            self._failed["DEADLINE_EXCEEDED"] += 1
        elif finish.reason is Reason.ERROR:
            self._failed[sequence.guide.error.reason] += 1
        else:
            self._finished[finish.reason.value] += 1
        if track.span:
            self._tell(track, sequence, finish.reason)
        if log.isEnabledFor(logging.INFO):
            log.info(
                "request %s",
                finish.reason.value,
                extra=logs.fields(
                    request_id=track.request_id,
                    engine=self._engine,
                    prompt_tokens=sequence.prompt_len,
                    cached_tokens=sequence.num_cached,
                    completion_tokens=sequence.num_completion,
                    queue_ms=logs.milliseconds(track.begun - track.arrived) if track.begun else None,
                    first_token_ms=logs.milliseconds(track.first_token - track.arrived) if track.first_token else None,
                    total_ms=logs.milliseconds(now - track.arrived),
                    finish=finish.reason.value,
                ),
            )

    def _tell(self, track: Track, sequence: Sequence, reason: Reason) -> None:
        """The spans of a request that has ended."""
        now = self._clock()
        track.span.child("queue", track.arrived, track.begun or now)
        track.span.child(
            "prefill",
            track.begun,
            track.first_token or now,
            enginehouse__prompt_tokens=sequence.prompt_len,
            enginehouse__cached_tokens=sequence.num_cached,
        )
        track.span.child(
            "decode", track.first_token, track.last_token, enginehouse__completion_tokens=sequence.num_completion
        )
        track.span.event("first token", track.first_token)
        track.span.event("last token", track.last_token)
        late = reason is Reason.DEADLINE
        track.span.end(
            "DEADLINE_EXCEEDED" if late else "",
            enginehouse__engine=self._engine,
            enginehouse__request_id=track.request_id,
            gen_ai__response__finish_reasons=[reason.value],
            gen_ai__usage__input_tokens=sequence.prompt_len,
            gen_ai__usage__output_tokens=sequence.num_completion,
        )

    def refused(self, request_id: str, error: Exception, trace: Mapping[str, str] | None = None) -> None:
        """A request has not become a sequence. Its error's words stay out of the log: they may quote the request.

        Args:
            trace: its trace context.
        """
        reason = error.reason if isinstance(error, EnginehouseError) else "INTERNAL"
        self._news = True
        self._failed[reason] += 1
        if span := tracing.begin("request", trace or {}):
            span.end(reason, enginehouse__engine=self._engine, enginehouse__request_id=request_id)
        log.info("request refused", extra=logs.fields(request_id=request_id, engine=self._engine, reason=reason))

    def take(self, preemptions: int, idle: bool) -> EngineMetrics | None:
        """What has happened since the last call that gave something; None if it is nothing, or if it is too soon to tell.

        Args:
            preemptions: all that there have been.
            idle: nothing is to be done: who waits for the numbers gets them now.
        """
        now = self._clock()
        if not self._news or (now - self._told_at < INTERVAL and not idle):
            return None
        told = EngineMetrics(
            queue_time=_observations(self._queue),
            time_to_first_token=_observations(self._first_token),
            inter_token_latency=_observations(self._inter_token),
            request_duration=_observations(self._duration),
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            queried_tokens=self._prompt if self._prefix_cache else 0,
            completion_tokens=self._completion,
            preemptions=preemptions - self._preemptions,
            finished=self._finished,
            failed=self._failed,
        )
        self._told_at, self._preemptions = now, preemptions
        self._reset()
        return told


def _observations(histogram: Histogram) -> Observations:
    return Observations(counts=histogram.counts, sum=histogram.sum) if any(histogram.counts) else Observations()
