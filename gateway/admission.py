"""Which requests begin, and when: limits of tenants and of the gateway, and a line for those that have to wait.

The line is bounded. Of those that may begin, the highest priority comes first; among equals the tenant that has the fewest
requests under way, then the one that has waited longest for its turn; within a tenant the oldest. A full line gives up the
newest request of the lowest priority, of the tenant that has the most waiting (longest queue drop, Suter et al. 1998), so that
nobody can keep others out by filling it. Work is done when requests come and end, never for a token.
"""

import asyncio
import itertools
import math
import time
from bisect import bisect, insort
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import EnginehouseError, InvalidArgument, ResourceExhausted
from gateway.waiting import Line, Mean, Ticket
from protos.histogram import REQUEST
from protos.keys import Tenant
from protos.metrics import Metrics
from protos.v1.common_pb2 import Usage

_SHORTEST_RETRY, _LONGEST_RETRY, _UNKNOWN_RETRY = 0.1, 60.0, 1.0  # seconds that a refused client is told to wait
_TICK = 0.001  # seconds by which a timer may come early
_REASONS = ("QUEUE_FULL", "DEADLINE_TOO_SHORT", "RATE_LIMITED")
NOBODY = "-"  # the label of calls without a tenant


@dataclass(frozen=True)
class Limits:
    """Of a gateway, for all tenants together.

    Attributes:
        max_streams: Generate calls under way.
        max_waiting: that may wait beside them.
        max_prompt_bytes: of a prompt's text, or of a conversation's.
    """

    max_streams: int = 4096
    max_waiting: int = 1024
    max_prompt_bytes: int = 4 * 1024 * 1024


DEFAULT_LIMITS = Limits()


class Grant:
    """Leave for one request to be under way, until it has `ended`."""

    def __init__(self, admission: "Admission", ticket: Ticket, began: float) -> None:
        self._admission, self._ticket, self._began = admission, ticket, began
        self._prompt = 0
        self._usage: Usage | None = None

    def charge_prompt(self, tokens: int) -> None:
        """Counts the prompt. Raises InvalidArgument for more tokens than the tenant may give."""
        tenant = self._ticket.line.tenant
        if tenant.max_prompt_tokens is not None and tokens > tenant.max_prompt_tokens:
            raise InvalidArgument(
                f"the prompt has {tokens} tokens, and tenant {tenant.name!r} may give {tenant.max_prompt_tokens}: shorten it",
                reason="PROMPT_TOO_LONG",
                metadata={"prompt_tokens": str(tokens), "max_prompt_tokens": str(tenant.max_prompt_tokens)},
            )
        self._prompt = tokens
        self._admission.charge(self._ticket, tokens)

    def follow(self, usage: Usage) -> None:
        """Completion tokens are counted from there, at the end."""
        self._usage = usage

    def ended(self, _context: object = None) -> None:
        """Gives it back, when the request has ended in whatever way."""
        completion = self._usage.completion_tokens if self._usage else 0
        self._admission.leave(self._ticket, self._prompt, completion, self._began)


class Admission:
    """Lets requests in. For one thread, an event loop's.

    Args:
        clock: seconds that never go back.
        later: calls back after some seconds; what it gives has `cancel`. By default the running event loop's.
    """

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
    ) -> None:
        self._limits, self._clock = limits, clock
        self._later = later or (lambda seconds, call: asyncio.get_running_loop().call_later(seconds, call))
        self._lines: dict[str, Line] = {}
        self._running = self._num_waiting = 0
        self._waiting: dict[str, Line] = {}  # those in which somebody waits
        self._numbers, self._turns = itertools.count(), itertools.count(1)
        self._durations = Mean()
        self._timer: asyncio.TimerHandle | None = None
        self._waited = metrics.histograms(
            "gateway_admission_wait_seconds", "That requests waited before they began; 0 for most.", REQUEST
        )
        self._refused = metrics.counter(
            "gateway_admission_refused_total", "Requests that were refused by a limit.", "tenant", "reason"
        )
        for reason in _REASONS:
            self._refused.add(NOBODY, reason, by=0)
        self._ended = metrics.counter(
            "gateway_tenant_requests_total", "Requests that had begun and have ended.", "tenant"
        )
        self._tokens = metrics.counter(
            "gateway_tenant_tokens_total", "Tokens of prompts and completions.", "tenant", "kind"
        )
        metrics.gauge(
            "gateway_tenant_streams",
            "Requests under way.",
            lambda: {(_label(line.tenant),): line.running for line in list(self._lines.values())},
            "tenant",
        )
        metrics.gauge(
            "gateway_tenant_waiting",
            "Requests that wait until they may begin.",
            lambda: {(_label(line.tenant),): len(line.waiting) for line in list(self._lines.values())},
            "tenant",
        )

    async def enter(self, tenant: Tenant, priority: int, remaining: float | None) -> Grant:
        """Returns when the request may begin.

        Args:
            priority: as the request says it.
            remaining: seconds until its deadline, if it has one.

        Raises:
            PermissionDenied: the tenant's requests may not have this priority.
            ResourceExhausted: the line is full, or the request would wait there past its deadline; with when to try again.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        began = self._clock()

        def call(error: EnginehouseError | None) -> None:
            if not future.done():  # else the call was cancelled just now, and withdraws
                future.set_exception(error) if error else future.set_result(None)

        ticket = self.ask(tenant, priority, remaining, call)
        try:
            await future
        except asyncio.CancelledError:
            self.withdraw(ticket)
            raise
        now = self._clock()
        self._waited.of().observe(now - began)
        return Grant(self, ticket, now)

    def ask(
        self, tenant: Tenant, priority: int, remaining: float | None, call: Callable[[EnginehouseError | None], None]
    ) -> Ticket:
        """The same for who does not wait: `call` is called with None when the request may begin, perhaps at once, or with
        the error that has taken its place in the line from it. Raises the same."""
        now = self._clock()
        line = self._lines.get(tenant.name) or self._lines.setdefault(tenant.name, Line(tenant))
        line.follow(tenant, now)
        tenant.check_priority(priority)
        ticket = Ticket(line, priority, next(self._numbers), call)
        if not self._num_waiting and self._running < self._limits.max_streams and not line.full and not line.debt(now):
            self._begin(ticket)
            return ticket
        self._append(ticket)
        self._admit()
        if ticket.waits and remaining is not None:
            self._check_deadline(ticket, remaining, now)
        if self._num_waiting > self._limits.max_waiting:
            self._drop(ticket)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody wants the request any more, whether it waits or has just begun."""
        if ticket.begun:
            self._end(ticket, 0)
        elif ticket.waits:
            self._remove(ticket)
        self._admit()

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """A request is known to use so many tokens, at least."""
        ticket.charge(max(ticket.charged, tokens), self._clock())

    def leave(self, ticket: Ticket, prompt: int, completion: int, began: float) -> None:
        """A request has ended, which had begun at that time and has used so many tokens."""
        label, seconds = _label(ticket.line.tenant), self._clock() - began
        self._ended.add(label)
        self._tokens.add(label, "prompt", by=prompt)
        self._tokens.add(label, "completion", by=completion)
        for durations in (self._durations, ticket.line.durations):
            durations.add(seconds)
        ticket.line.tokens.add(prompt + completion)
        self._end(ticket, prompt + completion)
        self._admit()

    def _end(self, ticket: Ticket, tokens: int) -> None:
        ticket.charge(tokens, self._clock())
        ticket.line.running -= 1
        self._running -= 1

    def _admit(self) -> None:
        """Begins what may begin, and sees to it that this is looked at again when a rate allows more."""
        now = self._clock()
        while self._num_waiting and self._running < self._limits.max_streams and (line := self._next(now)):
            ticket = line.waiting[0]
            self._remove(ticket)
            self._begin(ticket)
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._num_waiting and self._running < self._limits.max_streams:
            delays = [line.debt(now) for line in self._waiting.values() if not line.full]
            if delays:
                self._timer = self._later(min(delays) + _TICK, self._admit)

    def _next(self, now: float) -> Line | None:
        able = (line for line in self._waiting.values() if not line.full and not line.debt(now))
        return min(able, key=lambda line: (-line.waiting[0].priority, line.running, line.turn), default=None)

    def _begin(self, ticket: Ticket) -> None:
        line, ticket.begun = ticket.line, True
        line.running += 1
        line.turn = next(self._turns)
        self._running += 1
        ticket.charge(line.guess, self._clock())
        ticket.call(None)

    def _append(self, ticket: Ticket) -> None:
        ticket.waits = True
        insort(ticket.line.waiting, ticket)
        self._waiting[ticket.line.tenant.name] = ticket.line
        self._num_waiting += 1

    def _remove(self, ticket: Ticket) -> None:
        line, ticket.waits = ticket.line, False
        line.waiting.remove(ticket)
        self._num_waiting -= 1
        if not line.waiting:
            del self._waiting[line.tenant.name]

    def _drop(self, newest: Ticket) -> None:
        """Takes somebody's place in a line that has become too long."""
        line = min(self._waiting.values(), key=lambda line: (line.waiting[-1].priority, -len(line.waiting), -line.turn))
        victim = line.waiting[-1]
        self._remove(victim)
        error = self._error(
            victim.line,
            f"{self._limits.max_waiting} requests wait at this gateway already, which is the most"
            + ("" if victim is newest else "; this one's place was taken by a higher priority, or a tenant with fewer"),
            "QUEUE_FULL",
            _wait(self._durations, self._num_waiting + 1, self._limits.max_streams),
        )
        if victim is newest:
            raise error
        victim.call(error)

    def _check_deadline(self, ticket: Ticket, remaining: float, now: float) -> None:
        """Raises ResourceExhausted for a request that would only find out later that it waited too long."""
        line, left = ticket.line, f"past its deadline in {max(remaining, 0):.1f} s"
        if debt := line.debt(now):
            wait: float | None = debt
            reason = "RATE_LIMITED"
            said = f"tenant {line.tenant.name!r} has used its {line.tenant.tokens_per_minute} tokens a minute"
        else:
            place, reason = bisect(line.waiting, ticket), "DEADLINE_TOO_SHORT"  # among its own; the first is 1
            said = f"{self._num_waiting} requests wait"
            if line.full:
                wait = _wait(line.durations, place, line.running)
            else:
                place = min((place - 1) * len(self._waiting) + 1, self._num_waiting)  # by turns, at best
                wait = _wait(self._durations, place, self._limits.max_streams)
        if wait is not None and wait > remaining:
            self._remove(ticket)
            raise self._error(line, f"{said}: this one may begin in about {wait:.1f} s, {left}", reason, wait)

    def _error(self, line: Line, message: str, reason: str, retry: float | None) -> ResourceExhausted:
        self._refused.add(_label(line.tenant), reason)
        after = _UNKNOWN_RETRY if retry is None else min(max(retry, _SHORTEST_RETRY), _LONGEST_RETRY)
        after = math.ceil(after * 1000) / 1000
        return ResourceExhausted(f"{message}: try again in {after:g} s", reason=reason, retry_after=after)


def _wait(durations: Mean, place: int, width: int) -> float | None:
    """Seconds until so many requests will have ended, of which `width` are under way at any time; None if unknown."""
    return None if durations.value is None else durations.value * place / width


def _label(tenant: Tenant) -> str:
    return tenant.name or NOBODY
