"""One build's job as a state machine: its state and its events."""

import logging
import time
from collections.abc import Callable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import Internal
from protos.v1.builder_pb2 import (
    BUILD_STATE_CANCELLED,
    BUILD_STATE_FAILED,
    BUILD_STATE_QUEUED,
    BUILD_STATE_RUNNING,
    BUILD_STATE_SUCCEEDED,
    Build,
    BuildEvent,
    BuildProgress,
    BuildSpec,
    BuildState,
)
from protos.v1.common_pb2 import Failure

MAX_PROGRESS = 1000  # events of one job
PROGRESS_INTERVAL = 0.1  # seconds between two events of a phase, at least
PROGRESS_STALL = 1.0  # seconds after which a phase that stands still shows where
PROGRESS_STEPS = 150  # events of a phase, at most, spread over its total
MAX_LOG_CHARS = 256 * 1024  # of one job

_OPEN = (BUILD_STATE_QUEUED, BUILD_STATE_RUNNING)

log = logging.getLogger(__name__)


def has_ended(build: Build) -> bool:
    """Whether the state is final."""
    return build.state not in _OPEN


class Job:
    """A build's job, as its builder moves it on. Only these methods change it.

        QUEUED --start--> RUNNING --succeed--> SUCCEEDED
           |  ^------release--'|
           '--------+----------'---fail--------> FAILED
                    '--------------cancel------> CANCELLED

    Each transition sets the state and appends an event with the whole job; the event of a final state is the last one.
    `progress`, `log` and `built` need RUNNING and leave it. Any other order raises Internal and changes nothing. Events are
    numbered from 0 without gaps and never change.

    Args:
        events: all events so far, of which the last state counts.
    """

    def __init__(self, events: Sequence[BuildEvent], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._build = Build()
        self._build.CopyFrom(next(event.state for event in reversed(events) if event.HasField("state")))
        self._next = len(events)
        self._progress_left = MAX_PROGRESS - sum(event.HasField("progress") for event in events)
        self._chars_left = MAX_LOG_CHARS - sum(len(event.log) for event in events)
        self._clock = clock
        self._new: list[BuildEvent] = []
        self._shown: BuildProgress | None = None  # the newest progress among the events
        self._shown_at = 0.0
        self._held: BuildProgress | None = None  # a newer one, of the same phase
        self._lines: list[str] = []  # of the log, not yet in an event

    @staticmethod
    def submitted(build_id: str, spec: BuildSpec, model: str) -> list[BuildEvent]:
        """The events of a job that has just been submitted: QUEUED."""
        build = Build(build_id=build_id, spec=spec, model=model, state=BUILD_STATE_QUEUED, created=_now())
        return [BuildEvent(time=_now(), state=build)]

    @property
    def build(self) -> Build:
        """A copy of the job as it is now."""
        copy = Build()
        copy.CopyFrom(self._build)
        return copy

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return has_ended(self._build)

    @property
    def has_news(self) -> bool:
        """Whether there is anything pending."""
        return bool(self._new or self._lines) or self._held_is_old()

    def pending(self) -> list[BuildEvent]:
        """The events that nobody has said to be kept."""
        if self._held_is_old():
            self._append_held()
        self._append_log()
        return list(self._new)

    def kept(self, count: int) -> None:
        """The first `count` pending events are in the store."""
        del self._new[:count]

    def start(self) -> None:
        """QUEUED -> RUNNING."""
        self._expect("become RUNNING", BUILD_STATE_QUEUED)
        self._build.attempt += 1
        self._move(BUILD_STATE_RUNNING, BUILD_STATE_QUEUED)

    def progress(self, phase: str, done: int, total: int, unit: str) -> None:
        """Records how far a phase is, as an event where it is worth one; the last of each phase always is."""
        self._expect("make progress", BUILD_STATE_RUNNING)
        new = BuildProgress(phase=phase, done=done, total=total, unit=unit)
        if self._shown is None or phase != self._shown.phase:
            self._append_held()
            self._append_progress(new)
        elif self._is_due(self._shown, new):
            self._append_progress(new)
        else:
            self._held = new

    def log(self, line: str) -> None:
        """Records a line that the build has printed."""
        self._expect("log", BUILD_STATE_RUNNING)
        if self._chars_left <= 0:
            return
        self._chars_left -= len(line) + 1
        self._lines.append(line if self._chars_left > 0 else "... the log ends here: it is too long")

    def built(self, engine_id: str, reused: bool) -> None:
        """The engine is in the store; the job goes on with its name."""
        self._expect("have an engine", BUILD_STATE_RUNNING)
        self._build.engine_id = engine_id
        self._build.reused = reused
        self._append_held()
        self._append_state()

    def release(self) -> None:
        """RUNNING -> QUEUED: another builder is to begin anew."""
        self._build.ClearField("engine_id")
        self._build.ClearField("reused")
        self._move(BUILD_STATE_QUEUED, BUILD_STATE_RUNNING)
        self._shown = None

    def succeed(self) -> None:
        """RUNNING -> SUCCEEDED."""
        self._move(BUILD_STATE_SUCCEEDED, BUILD_STATE_RUNNING)

    def fail(self, failure: Failure) -> None:
        """QUEUED or RUNNING -> FAILED."""
        self._move(BUILD_STATE_FAILED, *_OPEN, failure=failure)

    def cancel(self) -> None:
        """QUEUED or RUNNING -> CANCELLED."""
        self._move(BUILD_STATE_CANCELLED, *_OPEN)

    def _expect(self, action: str, *states: BuildState.ValueType) -> None:
        if self._build.state not in states:
            state = BuildState.Name(self._build.state).removeprefix("BUILD_STATE_")
            raise Internal(f"build {self._build.build_id} is {state}: it cannot {action}", reason="BUILD_STATE_INVALID")

    def _move(self, state: BuildState.ValueType, *before: BuildState.ValueType, failure: Failure | None = None) -> None:
        name = BuildState.Name(state).removeprefix("BUILD_STATE_")
        self._expect(f"become {name}", *before)
        self._append_held()
        self._build.state = state
        if failure:
            self._build.failure.CopyFrom(failure)
        if self.ended:
            self._build.ended.CopyFrom(_now())
        self._append_state()
        log.info("build %s %s%s", self._build.build_id, name, f": {failure.message}" if failure else "")

    def _is_due(self, shown: BuildProgress, new: BuildProgress) -> bool:
        steps = abs(new.done - shown.done) * PROGRESS_STEPS >= new.total
        return steps and self._clock() - self._shown_at >= PROGRESS_INTERVAL

    def _held_is_old(self) -> bool:
        """Whether the newest progress should be told although it is a small step: no other has come for a while."""
        return self._held is not None and self._clock() - self._shown_at >= PROGRESS_STALL

    def _append_held(self) -> None:
        if self._held:
            self._append_progress(self._held)

    def _append_progress(self, new: BuildProgress) -> None:
        self._held = None
        self._shown = new
        self._shown_at = self._clock()
        if self._progress_left > 0:
            self._progress_left -= 1
            self._append(BuildEvent(progress=new))

    def _append_log(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            self._append(BuildEvent(log="\n".join(lines)))

    def _append_state(self) -> None:
        self._append_log()
        self._append(BuildEvent(state=self._build))

    def _append(self, event: BuildEvent) -> None:
        event.sequence = self._next
        event.time.CopyFrom(_now())
        self._next += 1
        self._new.append(event)


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now
