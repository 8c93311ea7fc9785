"""What an executor has sent for one completion and its client has not read yet."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.errors import EnginehouseError, ResourceExhausted
from protos.v1.common_pb2 import FinishInfo, Hypothesis, Logprobs

MAX_PENDING_TOKENS = 65_536


class Delta(NamedTuple):
    """News of one completion.

    Attributes:
        token_ids: new tokens.
        finish: with the last delta.
        logprobs: of these tokens, one for one, where the executor was asked for them.
        prompt_logprobs: of prompt tokens that come behind those told before.
        hypotheses: of a beam search, the best first, with the last delta.
    """

    token_ids: Sequence[int]
    finish: FinishInfo | None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    hypotheses: Sequence[Hypothesis] = ()


class Inbox:
    """Filled by the link, emptied by the request's handler. Steps that the handler was too slow for become one delta.

    It outlives an executor: another one that goes on with the request fills the same inbox, and its reader knows of nothing.

    Attributes:
        handle: of the completion at the executor.
        engine_id: of the request.
        queued_tokens: that were sent to the executor, which has not begun with them.
        started: an executor has begun with it: its prompt can be found in the prefix cache.
        cached_tokens: of the prompt, found in the prefix cache of the first executor.
        token_ids: all that have come.
        prompt_told: log-probabilities of the prompt that have come.
        pending: there is something to take.
        closed: nothing more will come.
        on_start: is told how many tokens an executor has found in its prefix cache.
        rescue: may take an error for itself, and then gives None, or gives the one to fail with.
    """

    def __init__(self, engine_id: str, news: asyncio.Event, handle: int = 0) -> None:
        """`news` is set whenever something comes; inboxes may share one."""
        self.handle = handle
        self.engine_id = engine_id
        self.queued_tokens = 0
        self.started = False
        self.cached_tokens = 0
        self.token_ids: list[int] = []
        self.prompt_told = 0
        self.pending = False
        self.closed = False
        self.on_start: Callable[[int], None] = lambda _: None
        self.rescue: Callable[[EnginehouseError], EnginehouseError | None] = lambda error: error
        self._taken = 0  # of the tokens
        self._logprobs: Logprobs | None = None
        self._prompt_logprobs: Logprobs | None = None
        self._hypotheses: Sequence[Hypothesis] = ()
        self._finish: FinishInfo | None = None
        self._error: EnginehouseError | None = None
        self._news = news

    @property
    def failed(self) -> bool:
        """Whether it is closed by an error, which `take` raises behind the last tokens."""
        return self._error is not None

    def start(self, cached_tokens: int) -> None:
        """The executor has begun."""
        self.on_start(cached_tokens)
        if not self.started:
            self.started, self.cached_tokens = True, cached_tokens
            self._news.set()

    def push(self, token_ids: Sequence[int]) -> None:
        """Takes a step's tokens. More than MAX_PENDING_TOKENS unread ones fail the request and close the inbox."""
        self.token_ids += token_ids
        if len(self.token_ids) - self._taken > MAX_PENDING_TOKENS:
            self._taken = len(self.token_ids)
            self._logprobs = None
            self.fail(
                ResourceExhausted(
                    f"the client left more than {MAX_PENDING_TOKENS} tokens unread: read faster, or ask for fewer",
                    reason="CLIENT_TOO_SLOW",
                )
            )
        if not self.pending:  # told already: this runs for every token
            self._tell()

    def push_logprobs(self, logprobs: Logprobs) -> None:
        """Takes those of a step's tokens."""
        self._logprobs = _joined(self._logprobs, logprobs)

    def push_prompt_logprobs(self, logprobs: Logprobs) -> None:
        """Takes those of the next tokens of the prompt."""
        self._prompt_logprobs = _joined(self._prompt_logprobs, logprobs)
        self.prompt_told += len(logprobs.logprobs)
        self._tell()

    def finish(self, finish: FinishInfo, hypotheses: Sequence[Hypothesis] = ()) -> None:
        """The request has ended well."""
        self._finish, self._hypotheses, self.closed = finish, hypotheses, True
        self._tell()

    def fail(self, error: EnginehouseError) -> None:
        """The request has failed, unless it can be rescued; tokens that came before are still delivered."""
        final = self.rescue(error)
        if final:
            self._error, self.closed = final, True
            self._tell()

    def take(self) -> Delta:
        """Everything that is there. Raises what the request failed with, after the tokens that came before."""
        self.pending = False
        token_ids, self._taken = self.token_ids[self._taken :], len(self.token_ids)
        logprobs, self._logprobs = self._logprobs, None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        if self._error:
            if not token_ids:
                raise self._error
            self._tell()
        return Delta(token_ids, self._finish, logprobs, prompt_logprobs, self._hypotheses)

    def _tell(self) -> None:
        self.pending = True
        self._news.set()


def _joined(before: Logprobs | None, more: Logprobs) -> Logprobs:
    """Columns of both, in a message of our own."""
    joined = before or Logprobs()
    joined.MergeFrom(more)
    return joined
