"""The completions that are under way at one executor, by handle: a step's columns are sorted into their inboxes."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from engine.errors import EnginehouseError
from gateway.inbox import Inbox
from protos.rpc import from_failure
from protos.v1.executor_pb2 import StepOutput, Submit


class Inboxes:
    """Opens an inbox for each request, and closes it when the executor has told all.

    Attributes:
        live: how many there are, by engine.
        queued_tokens: that were sent with them and that the executor has not begun with, by engine.
    """

    def __init__(
        self,
        cancel: Callable[[Inbox], None],
        on_end: Callable[[str, EnginehouseError | None], None] = lambda _engine_id, _error: None,
    ) -> None:
        """Makes it empty.

        Args:
            cancel: is called for an inbox that has closed by itself: its client has left too much unread.
            on_end: is told how a request has ended that the executor has told the end of, by its engine.
        """
        self.queued_tokens: Counter[str] = Counter()
        self._on_end = on_end
        self.live: Counter[str] = Counter()
        self._cancel = cancel
        self._handles = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}

    def __len__(self) -> int:
        return len(self._inboxes)

    def open(self, submit: Submit, inbox: Inbox) -> None:
        """Takes a request's inbox, whose new handle is written into both."""
        handle = inbox.handle = submit.handle = next(self._handles) & 0xFFFF_FFFF
        self._inboxes[handle] = inbox
        self.live[inbox.engine_id] += 1
        inbox.queued_tokens = len(submit.token_ids) + len(submit.resume_token_ids)
        self.queued_tokens[inbox.engine_id] += inbox.queued_tokens

    def forget(self, handle: int) -> Inbox | None:
        """The inbox, of which nobody hears any more; None if it has ended already."""
        inbox = self._inboxes.pop(handle, None)
        if inbox:
            self.live[inbox.engine_id] -= 1
            self._begun(inbox)
        return inbox

    def fail(self, error: EnginehouseError, engine_id: str | None = None) -> None:
        """Fails all, or those of one engine."""
        for handle, inbox in list(self._inboxes.items()):
            if engine_id in (None, inbox.engine_id) and self.forget(handle):
                inbox.fail(error)

    def deliver(self, step: StepOutput) -> None:
        """Sorts a step's columns."""
        inboxes = self._inboxes
        for started in step.started:
            if inbox := inboxes.get(started.handle):
                self._begun(inbox)
                inbox.start(started.cached_tokens)
        for row in step.prompt_logprobs:
            if inbox := inboxes.get(row.handle):
                inbox.push_prompt_logprobs(row.logprobs)
        for row in step.logprobs:
            if inbox := inboxes.get(row.handle):
                inbox.push_logprobs(row.logprobs)
        for handle, token_ids in _rows(step):
            if inbox := inboxes.get(handle):
                inbox.push(token_ids)
                if inbox.closed:
                    self._cancel(inbox)
        beams = {beam.handle: beam.hypotheses for beam in step.beams}
        for finished in step.finished:
            if inbox := self.forget(finished.handle):
                self._on_end(inbox.engine_id, None)
                inbox.finish(finished.finish, beams.get(finished.handle, ()))
        for failed in step.failed:
            if inbox := self.forget(failed.handle):
                error = from_failure(failed.failure)
                self._on_end(inbox.engine_id, error)
                inbox.fail(error)
        if step.HasField("engine_lost"):
            self.fail(from_failure(step.engine_lost.failure), step.engine_lost.engine_id)

    def _begun(self, inbox: Inbox) -> None:
        self.queued_tokens[inbox.engine_id] -= inbox.queued_tokens
        inbox.queued_tokens = 0


def _rows(step: StepOutput) -> Iterator[tuple[int, Sequence[int]]]:
    """(handle, its new tokens)."""
    if not step.counts:
        return zip(step.handles, zip(step.token_ids), strict=False)
    token_ids = list(step.token_ids)
    ends = itertools.accumulate(step.counts)
    return (
        (handle, token_ids[end - count : end])
        for handle, count, end in zip(step.handles, step.counts, ends, strict=False)
    )
