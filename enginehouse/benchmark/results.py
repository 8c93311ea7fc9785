"""What was measured: a record a request, and what they say together. Times are seconds of one monotonic clock."""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SATURATED = 0.9  # of a core that the client has used, from which on it may be what was measured


@dataclass
class Record:
    """One request as the client saw it.

    Attributes:
        due: when it should have begun; that is when it did, unless requests come at a rate and the client was late.
        first: when its first tokens came.
        ended: when its last message, its error or its end by us came; None while it runs.
        tokens: that have come.
        gaps: for each token after the first message's, the time since the message before, divided by the tokens that came
            together.
        failure: (reason, message) of its error.
        cut_off: it was ended by us.
    """

    due: float
    late: float = 0.0
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    failure: tuple[str, str] | None = None
    cut_off: bool = False

    def arrived(self, now: float, count: int) -> None:
        """A message with `count` new tokens."""
        if not count:
            return
        if self.last is None:
            self.first = now
        else:
            self.gaps.extend([(now - self.last) / count] * count)
        self.last = now
        self.tokens += count

    @property
    def completed(self) -> bool:
        """Whether it came to its own end."""
        return self.ended is not None and self.failure is None and not self.cut_off


@dataclass(frozen=True)
class Distribution:
    """Seconds; None where there was nothing to measure."""

    mean: float | None
    median: float | None
    p90: float | None
    p99: float | None

    @staticmethod
    def of(values: Iterable[float]) -> "Distribution":
        """Percentiles with linear interpolation between the two nearest values."""
        known = sorted(values)
        if not known:
            return Distribution(None, None, None, None)
        return Distribution(math.fsum(known) / len(known), *(percentile(known, share) for share in (0.5, 0.9, 0.99)))


def percentile(ascending: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, of at least one."""
    at = (len(ascending) - 1) * share
    below = int(at)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (at - below)


@dataclass(frozen=True)
class Point:
    """A load and what came of it.

    Attributes:
        concurrency, rate: one of them, the load.
        seconds: from the first request's beginning to the end of the last one.
        output_tokens: that came in this time, of requests that failed later or were cut off, too.
        cached_tokens: of prompt_tokens, found in the prefix cache, by the executor's count.
        failures: reason -> (how many, the first one's message).
        client_cpu: cores that this process has used on average.
        late: seconds by which a request at a rate began too late, at most.
        interrupted: not all requests have come to their end.
    """

    concurrency: int | None
    rate: float | None
    requests: int
    completed: int
    failed: int
    cut_off: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: Distribution
    inter_token_latency: Distribution
    end_to_end: Distribution
    failures: dict[str, tuple[int, str]]
    client_cpu: float
    late: float
    interrupted: bool

    @property
    def label(self) -> str:
        """The load in words."""
        return f"concurrency {self.concurrency}" if self.concurrency else f"rate {self.rate:g}/s"

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def requests_per_second(self) -> float:
        """Requests that were completed, a second."""
        return self.completed / self.seconds if self.seconds > 0 else 0.0

    @property
    def saturated(self) -> bool:
        """Whether the client itself had so much to do that its own pace may be what was measured."""
        return self.client_cpu > SATURATED

    def to_json(self) -> dict[str, object]:
        """For programs; times in seconds."""
        return {
            "concurrency": self.concurrency,
            "rate": self.rate,
            "requests": self.requests,
            "completed": self.completed,
            "failed": self.failed,
            "cut_off": self.cut_off,
            "failures": [
                {"reason": reason, "count": count, "message": message}
                for reason, (count, message) in self.failures.items()
            ],
            "seconds": self.seconds,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_per_second": self.tokens_per_second,
            "requests_per_second": self.requests_per_second,
            "ttft": vars(self.ttft),
            "inter_token_latency": vars(self.inter_token_latency),
            "end_to_end": vars(self.end_to_end),
            "client": {"cpu": self.client_cpu, "saturated": self.saturated, "late": self.late},
            "interrupted": self.interrupted,
        }


def summarize(
    records: Sequence[Record],
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    wanted: int,
    cpu_seconds: float,
) -> Point:
    """What the records of one load say.

    Args:
        wanted: how many requests there were to be.
        cpu_seconds: that this process has used meanwhile.
    """
    ended = [record.ended for record in records if record.ended is not None]
    seconds = max(ended) - min(record.due for record in records) if ended else 0.0
    completed = [record for record in records if record.completed]
    failures: dict[str, tuple[int, str]] = {}
    for record in records:
        if record.failure:
            reason, message = record.failure
            count, first = failures.get(reason, (0, message))
            failures[reason] = (count + 1, first)
    return Point(
        concurrency=concurrency,
        rate=rate,
        requests=len(records),
        completed=len(completed),
        failed=sum(record.failure is not None for record in records),
        cut_off=sum(record.cut_off for record in records),
        seconds=seconds,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        cached_tokens=sum(record.cached_tokens for record in records),
        output_tokens=sum(record.tokens for record in records),
        ttft=Distribution.of(record.first - record.due for record in records if record.first is not None),
        inter_token_latency=Distribution.of(gap for record in records for gap in record.gaps),
        end_to_end=Distribution.of(r.ended - r.due for r in completed if r.ended is not None),
        failures=failures,
        client_cpu=cpu_seconds / seconds if seconds > 0 else 0.0,
        late=max((record.late for record in records), default=0.0),
        interrupted=len(records) < wanted or any(record.cut_off for record in records),
    )
