"""The record of one build: its state and its events."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

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

MAX_EVENTS = 1000  # of one job
PROGRESS_INTERVAL = 0.1  # seconds between two events of a phase, at least
PROGRESS_STEPS = 150  # events of a phase, at most, spread over its total

_OPEN = (BUILD_STATE_QUEUED, BUILD_STATE_RUNNING)

log = logging.getLogger(__name__)


class Job:
    """One build's record: the job as it is now, and its events. Only these methods change it.

        QUEUED --start--> RUNNING --succeed--> SUCCEEDED
           |                 |
           '--------+--------'---fail--------> FAILED
                    '------------cancel------> CANCELLED

    Each transition sets the state and appends an event with the whole job; the event of a final state is the last one.
    `progress` and `built` need RUNNING and leave it. Any other order raises Internal and changes nothing. Events are
    numbered from 0 without gaps and never change once appended: all watchers see the same list.
    """

    def __init__(
        self, build_id: str, spec: BuildSpec, model: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._build = Build(build_id=build_id, spec=spec, model=model, state=BUILD_STATE_QUEUED, created=_now())
        self._clock = clock
        self._events: list[BuildEvent] = []
        self._news = asyncio.Event()  # set, and replaced, when an event is appended
        self._shown: BuildProgress | None = None  # the newest progress among the events
        self._shown_at = 0.0
        self._held: BuildProgress | None = None  # a newer one, of the same phase
        self._append_state()

    @property
    def build(self) -> Build:
        """A copy of the job as it is now."""
        copy = Build()
        copy.CopyFrom(self._build)
        return copy

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self._build.state not in _OPEN

    def start(self) -> None:
        """QUEUED -> RUNNING."""
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

    def built(self, engine_id: str, reused: bool) -> None:
        """The engine is in the store; the job goes on with its name."""
        self._expect("have an engine", BUILD_STATE_RUNNING)
        self._build.engine_id = engine_id
        self._build.reused = reused
        self._append_held()
        self._append_state()

    def succeed(self) -> None:
        """RUNNING -> SUCCEEDED."""
        self._move(BUILD_STATE_SUCCEEDED, BUILD_STATE_RUNNING)

    def fail(self, failure: Failure) -> None:
        """QUEUED or RUNNING -> FAILED."""
        self._move(BUILD_STATE_FAILED, *_OPEN, failure=failure)

    def cancel(self) -> None:
        """QUEUED or RUNNING -> CANCELLED."""
        self._move(BUILD_STATE_CANCELLED, *_OPEN)

    async def events(self) -> AsyncIterator[BuildEvent]:
        """All events from the first, and new ones as they come, until the final state."""
        sequence = 0
        while True:
            news = self._news
            while sequence < len(self._events):
                yield self._events[sequence]
                sequence += 1
            if self.ended:
                return
            await news.wait()

    async def end(self) -> Build:
        """The job when it has ended."""
        while not self.ended:
            await self._news.wait()
        return self.build

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

    def _append_held(self) -> None:
        if self._held:
            self._append_progress(self._held)

    def _append_progress(self, new: BuildProgress) -> None:
        self._held = None
        self._shown = new
        self._shown_at = self._clock()
        if len(self._events) < MAX_EVENTS - 2:  # an engine and a final state may follow
            self._append(BuildEvent(progress=new))

    def _append_state(self) -> None:
        self._append(BuildEvent(state=self._build))

    def _append(self, event: BuildEvent) -> None:
        event.sequence = len(self._events)
        event.time.CopyFrom(_now())
        self._events.append(event)
        news, self._news = self._news, asyncio.Event()
        news.set()


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now
