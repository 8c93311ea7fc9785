"""Which of several executors a request goes to: filters, scores and a pick, each small enough to be read and replaced alone.

A filter says who may have the request. A score says in [0, 1] how well each of them suits it, and what the step from 0 to 1
is worth in tokens of computing: the executor with the largest sum of values times worths is the one whose first token comes
soonest, as far as this gateway knows. The pick takes one of the best. None of them knows a link, a clock or the wire.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from gateway.prefixes import Holder

REQUEST_TOKENS = 64  # what a request costs those that come behind it, beside its prompt: each step carries it along
SCARCE = 0.1  # of the KV cache: with less than this free, prompts wait for blocks, and old prefixes go


@dataclass(frozen=True)
class View:
    """An executor as a request for one engine sees it.

    Attributes:
        address: HOST:PORT.
        connected: it answers, and the Run stream stands.
        ready: it has the engine loaded.
        requests: that it works on for this engine or that wait there, of all gateways.
        queued_tokens: known to it, or on their way to it, and not computed yet.
        others: of the requests, those of other gateways.
        free_kv: share of its KV cache that nobody uses.
        holder: its KV cache, as the `PrefixIndex` knows it; None before a request has been sent.
        trusted: its circuit lets a request through.
    """

    address: str
    connected: bool
    ready: bool
    requests: int
    queued_tokens: int
    others: int = 0
    free_kv: float = 1.0
    holder: Holder | None = None
    trusted: bool = True


@dataclass(frozen=True)
class Ask:
    """What a choice needs to know of a request.

    Attributes:
        prompt_tokens: to be computed, those among them that are emitted already.
        cached: of these, what each KV cache is believed to have; those that have none are left out.
        avoid: addresses of executors that have just failed it.
    """

    prompt_tokens: int
    cached: Mapping[Holder, int] = field(default_factory=dict)
    avoid: Collection[str] = ()


class Filter(Protocol):
    """Who may have a request."""

    def __call__(self, ask: Ask, view: View, /) -> bool:
        """Whether this one may."""


class Scores(NamedTuple):
    """One value a view, in [0, 1], the best 1; `worth`: tokens of computing between 0 and 1."""

    values: Sequence[float]
    worth: float


class Score(Protocol):
    """How well executors suit a request, in one regard."""

    def __call__(self, ask: Ask, views: Sequence[View], /) -> Scores:
        """Of each view, in their order; there is at least one."""


class Pick(Protocol):
    """Takes one of those that were scored."""

    def __call__(self, totals: Sequence[float], views: Sequence[View], /) -> int:
        """The place of the one to take; totals are in tokens, and only their differences mean anything."""


def serves(_ask: Ask, view: View) -> bool:
    """It answers and has the engine."""
    return view.connected and view.ready


def trusted(_ask: Ask, view: View) -> bool:
    """It has not failed several requests in a row just now."""
    return view.trusted


def untried(ask: Ask, view: View) -> bool:
    """It is not one that has just failed this request."""
    return view.address not in ask.avoid


def prefix_score(ask: Ask, views: Sequence[View]) -> Scores:
    """The share of the prompt that need not be computed. This is session affinity, too: a next turn begins with the last."""
    tokens = max(ask.prompt_tokens, 1)
    found = [ask.cached.get(view.holder, 0) if view.holder else 0 for view in views]
    return Scores([min(cached / tokens, 1.0) for cached in found], tokens)


def load_score(_ask: Ask, views: Sequence[View]) -> Scores:
    """How much less is to be done there than at the busiest."""
    backlogs = [view.queued_tokens + REQUEST_TOKENS * view.requests for view in views]
    most = max(backlogs)
    return Scores([1 - backlog / most if most else 1.0 for backlog in backlogs], most)


def memory_score(ask: Ask, views: Sequence[View]) -> Scores:
    """Whether there is room in the KV cache. Without, the request waits, or others are computed again."""
    return Scores([min(view.free_kv / SCARCE, 1.0) for view in views], ask.prompt_tokens + REQUEST_TOKENS)


@dataclass(frozen=True)
class NearBest:
    """Any of those that are as good as the best one, as far as old views can tell; which one is chance.

    What other gateways have sent since the last report is in no view, and all of them see the same executor idle. So a
    difference of one request is none, and where other gateways are at work none is below the square root of what they have
    there: the spread of arrivals that nobody has told of yet (Mitzenmacher, How Useful Is Old Information?, 2000).
    """

    chance: random.Random = field(default_factory=random.Random)

    def __call__(self, totals: Sequence[float], views: Sequence[View]) -> int:
        others = sum(view.others for view in views) / len(views)
        least = max(totals) - REQUEST_TOKENS * math.sqrt(others)
        return self.chance.choice([place for place, total in enumerate(totals) if total >= least])


@dataclass(frozen=True)
class Policy:
    """Filters, scores and the pick, together.

    Attributes:
        filters: all of which an executor must pass.
        preferences: those that none has to pass if nobody does.
    """

    filters: Sequence[Filter] = (serves, trusted)
    preferences: Sequence[Filter] = (untried,)
    scores: Sequence[Score] = (prefix_score, load_score, memory_score)
    pick: Pick = field(default_factory=NearBest)

    def choose(self, ask: Ask, views: Sequence[View]) -> int | None:
        """The place of the executor to take, or None if there is none that can."""
        able = [place for place, view in enumerate(views) if all(may(ask, view) for may in self.filters)]
        for prefers in self.preferences:
            able = [place for place in able if prefers(ask, views[place])] or able
        if len(able) < 2:
            return able[0] if able else None
        seen = [views[place] for place in able]
        totals = [0.0] * len(able)
        for score in self.scores:
            values, worth = score(ask, seen)
            for place, value in enumerate(values):
                totals[place] += value * worth
        return able[self.pick(totals, seen)]
