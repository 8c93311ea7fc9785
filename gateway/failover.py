"""Requests that outlive their executor: sent, and sent on elsewhere behind the tokens that have come.

An executor goes on behind `resume_token_ids` as the one before would have: the gateway has drawn the seed, and random numbers
are counted by position. The new tokens come into the same inbox, so that text, stop strings, log-probabilities and usage go on
as if nothing had happened.
"""

import asyncio
import random
import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field

from engine.errors import EnginehouseError, Unavailable
from gateway.inbox import Inbox
from gateway.link import Link
from gateway.prefixes import BLOCK_TOKENS, Chain
from gateway.router import Router
from protos.v1.executor_pb2 import Submit

MOST_TRIES = (
    4  # executors that may fail a request one after another before a new token comes: it may be what kills them
)
PATIENCE = 10.0  # seconds that a request which has lost its executor waits for one that has the engine
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between tries
_REFUSALS = ("QUEUE_FULL", "ENGINE_NOT_LOADED")  # of one executor, which say nothing about others


class Budget:
    """Retries that the gateway has left: a share of its requests, and a few a second, so that they never become the load.

    A stream that goes on elsewhere behind new tokens takes none: it cannot do so more often than tokens come.

    Args:
        clock: seconds.
    """

    SHARE, RATE, MOST = 0.25, 10.0, 500.0  # of a request, a second, at a time

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left, self._at = self.MOST, clock()

    def request(self) -> None:
        """A request has come."""
        self._left = min(self._left + self.SHARE, self.MOST)

    def take(self) -> bool:
        """Takes a retry; False if none is left."""
        now = self._clock()
        self._left, self._at = min(self._left + self.RATE * (now - self._at), self.MOST), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Failover:
    """What the gateway's requests share.

    Attributes:
        on_retry: is told of each request that is sent again, its model and why.
        on_resume: is told of each stream that goes on elsewhere, its model and the tokens that it has.
        on_choice: is told of the tokens that a request's executor is believed to have cached, with the model.

    Args:
        patience: seconds that a request waits for another executor.
    """

    def __init__(self, router: Router, patience: float = PATIENCE) -> None:
        self.router = router
        self.patience = patience
        self.budget = Budget()
        self.on_retry: Callable[[str, str], None] = lambda _model, _reason: None
        self.on_resume: Callable[[str, int], None] = lambda _model, _tokens: None
        self.on_choice: Callable[[str, int], None] = lambda _model, _tokens: None

    def request(self, model: str, limit: Callable[[Submit], None]) -> "Request":
        """A request's own executor.

        Args:
            limit: writes into a Submit how much time is left. Raises DeadlineExceeded.
        """
        self.budget.request()
        return Request(self, model, limit)


@dataclass(eq=False)
class _Leg:
    """One completion on its way.

    Attributes:
        chain: of its prompt, if there is more than one executor.
        link: where it is, or was.
        had: tokens that it had when it was sent there. tries: since the last new one.
        avoid: the executors of these.
        error: what it has failed with. since: when it first did, without a new token since.
    """

    submit: Submit
    inbox: Inbox
    chain: Chain | None
    link: Link | None = None
    had: int = 0
    tries: int = 0
    avoid: set[str] = field(default_factory=set)
    error: EnginehouseError | None = None
    since: float = 0.0
    timer: asyncio.TimerHandle | None = None


class Request:
    """All executors, as one that does not fail; a `gateway.generation.Executor` for the completions of one request."""

    def __init__(self, failover: Failover, model: str, limit: Callable[[Submit], None]) -> None:
        self._failover, self._model, self._limit = failover, model, limit
        self._legs: dict[Inbox, _Leg] = {}
        self._chain: Chain | None = None
        self._context = copy_context()  # the call's: its id leads through logs

    def send(self, submit: Submit, news: asyncio.Event) -> Inbox:
        """Sends a completion's request to the best executor. Raises Unavailable if there is none."""
        if not self._legs:
            self._chain = self._failover.router.chain(submit)
        inbox = Inbox(submit.engine_id, news)
        leg = _Leg(submit, inbox, self._chain)
        inbox.rescue = lambda error: self._rescue(leg, error)
        try:
            self._dispatch(leg)
        except Unavailable as error:
            if not self._legs:
                raise
            inbox.fail(error)  # the others are under way: it may follow them
        self._legs[inbox] = leg
        return inbox

    def cancel(self, inbox: Inbox) -> None:
        """Cancels a completion that has not ended; does nothing for one that has."""
        leg = self._legs.pop(inbox, None)
        if leg is None:
            return
        if leg.timer:
            leg.timer.cancel()
        if leg.link:
            leg.link.cancel(inbox)
            self._remember(leg, leg.link)

    def _dispatch(self, leg: _Leg) -> None:
        """Sends it, behind the tokens that have come. Raises Unavailable, or DeadlineExceeded where it is sent again."""
        router, submit, told = self._failover.router, leg.submit, leg.inbox.token_ids
        if leg.error:
            self._limit(submit)
        if told:
            submit.resume_token_ids[:] = told
            submit.output.ClearField("prompt_logprobs")  # they came before the first token
        tokens = len(submit.token_ids) + len(told)
        link = router.choose(self._model, submit.engine_id, leg.chain, tokens, leg.avoid)
        link.send(submit, leg.inbox)
        leg.link, leg.had = link, len(told)
        before: list[int] = []
        if leg.chain:
            holder = link.holder(submit.engine_id)
            before = router.prefixes.add(leg.chain, holder)
            leg.inbox.on_start = lambda cached: router.prefixes.found(holder, before, cached)
        self._failover.on_choice(self._model, len(before) * BLOCK_TOKENS)

    def _remember(self, leg: _Leg, link: Link) -> None:
        """The executor has the completion's keys, too: the next turn of a conversation begins with them."""
        if leg.chain and leg.inbox.token_ids and link.connected:
            chain = leg.chain.copy()
            chain.extend(leg.inbox.token_ids)
            self._failover.router.prefixes.add(chain, link.holder(leg.submit.engine_id))

    def _rescue(self, leg: _Leg, error: EnginehouseError) -> EnginehouseError | None:
        """Takes over what an executor has failed, and gives None, or gives the error that it ends with."""
        if error.code != Unavailable.code and error.reason not in _REFUSALS:
            return error
        told, now = len(leg.inbox.token_ids), time.monotonic()
        if told > leg.had:
            leg.tries, leg.avoid = 0, set()
        if not leg.tries:
            leg.since = now
        leg.tries += 1
        if leg.link:
            leg.avoid.add(leg.link.address)
        pause = 0.0 if leg.tries == 1 else _FIRST_PAUSE * 2**leg.tries
        if error.reason in _REFUSALS:
            if not told and self._failover.router.ready(leg.submit.engine_id) <= len(leg.avoid):
                return error
            if told:  # nobody has failed it since: a place will come free
                if now - leg.since >= self._failover.patience:
                    return _but(error, "no executor has had room for it since it lost its own")
                leg.tries, pause = 1, _LONGEST_PAUSE
        if why := self._why_not(leg):
            return _but(error, why)
        leg.link, leg.error = None, error
        self._failover.on_retry(self._model, error.reason)
        self._later(leg, pause)
        return None

    def _why_not(self, leg: _Leg) -> str | None:
        """Why a request must not be sent again; None if it may."""
        told = len(leg.inbox.token_ids)
        if leg.submit.output.HasField("prompt_logprobs") and leg.inbox.prompt_told and not told:
            return "it cannot go on elsewhere, because part of the prompt's log-probabilities has been told"
        if leg.tries >= MOST_TRIES:
            return f"{MOST_TRIES} executors in a row have failed it, and no other one is tried"
        if (leg.tries > 1 or not told) and not self._failover.budget.take():
            return "so many requests have failed lately that it is not sent again by itself"
        return None

    def _later(self, leg: _Leg, pause: float) -> None:
        pause = min(pause, _LONGEST_PAUSE) * random.uniform(0.5, 1.5)
        leg.timer = asyncio.get_running_loop().call_later(pause, self._again, leg, context=self._context)

    def _again(self, leg: _Leg) -> None:
        leg.timer = None
        told = len(leg.inbox.token_ids)
        try:
            self._dispatch(leg)
        except Unavailable as nobody:
            if time.monotonic() - leg.since < self._failover.patience:
                self._later(leg, _LONGEST_PAUSE / 4)
            else:
                self._give_up(leg, _but(leg.error or nobody, f"nobody could go on with it: {nobody.message}"))
        except EnginehouseError as error:
            self._give_up(leg, error)
        else:
            if told:
                self._failover.on_resume(self._model, told)

    def _give_up(self, leg: _Leg, error: EnginehouseError) -> None:
        leg.inbox.rescue = lambda error: error
        leg.inbox.fail(error)


def _but(error: EnginehouseError, why: str) -> EnginehouseError:
    """The same error, with why it was not mended."""
    return type(error)(
        f"{error.message}; {why}",
        reason=error.reason,
        metadata=error.metadata,
        code=error.code,
        retry_after=error.retry_after,
    )
