"""Admission in simulated time: limits that hold, nobody who waits for ever, turns between tenants, errors in words."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EnginehouseError, InvalidArgument, PermissionDenied, ResourceExhausted
from gateway.admission import Admission, Grant, Limits
from gateway.bucket import TokenBucket
from gateway.waiting import Ticket
from protos.keys import ANYBODY, Tenant
from protos.metrics import Metrics
from protos.v1.common_pb2 import Usage


class Timer:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Simulation:
    """Time that passes from event to event."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Timer, Callable[[], None]]] = []

    def clock(self) -> float:
        return self.now

    def later(self, seconds: float, call: Callable[[], None]) -> Any:
        timer = Timer()
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), timer, call))
        return timer

    def run(self, until: float = float("inf")) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, timer, call = heapq.heappop(self._events)
            if not timer.cancelled:
                call()
        self.now = max(self.now, until) if until != float("inf") else self.now


class House:
    """A gateway's door, and what has happened there.

    Attributes:
        begun: (time, label) of requests that began; refused: label and error of those that did not.
    """

    def __init__(self, **limits: int) -> None:
        self.time = Simulation()
        self.metrics = Metrics()
        self.admission = Admission(Limits(**limits), self.metrics, self.time.clock, self.time.later)
        self.begun: list[tuple[float, str]] = []
        self.refused: list[tuple[str, EnginehouseError]] = []
        self.running: dict[str, int] = {}

    def ask(
        self,
        tenant: Tenant,
        label: str = "",
        *,
        priority: int = 0,
        remaining: float | None = None,
        seconds: float | None = 1.0,
        prompt: int = 0,
        completion: int = 0,
    ) -> Ticket | None:
        """A request that ends `seconds` after it has begun, or never."""
        label = label or tenant.name
        ticket: list[Ticket] = []

        def call(error: EnginehouseError | None) -> None:
            if error:
                self.refused.append((label, error))
                return
            self.begun.append((self.time.now, label))
            self.running[tenant.name] = self.running.get(tenant.name, 0) + 1
            self.time.later(0, go)

        def go() -> None:
            grant = Grant(self.admission, ticket[0], self.time.now)
            grant.charge_prompt(prompt)
            grant.follow(Usage(completion_tokens=completion))
            if seconds is not None:
                self.time.later(seconds, lambda: end(grant))

        def end(grant: Grant) -> None:
            self.running[tenant.name] -= 1
            grant.ended()

        try:
            ticket.append(self.admission.ask(tenant, priority, remaining, call))
        except EnginehouseError as error:
            self.refused.append((label, error))
            return None
        return ticket[0]

    @property
    def order(self) -> list[str]:
        return [label for _, label in self.begun]

    def waiting(self) -> int:
        return sum(len(line.waiting) for line in self.admission._lines.values())


A, B = Tenant("a", max_priority=None), Tenant("b", max_priority=None)


# --- the order


def test_the_highest_priority_begins_first_and_then_the_oldest() -> None:
    house = House(max_streams=1)
    for label, priority in (("first", 0), ("low", -1), ("old", 0), ("new", 0), ("high", 5)):
        house.ask(A, label, priority=priority)
    house.time.run()
    assert house.order == ["first", "high", "old", "new", "low"]
    assert [time for time, _ in house.begun] == [0, 1, 2, 3, 4]


def test_a_tenant_that_asks_for_much_does_not_keep_another_out() -> None:
    house = House(max_streams=2)
    for number in range(10):
        house.ask(A, f"a{number}")
    house.ask(B, "b0")
    house.ask(B, "b1")
    house.time.run()
    assert house.order[:4] == ["a0", "a1", "b0", "a2"]  # of two places that come free, each gets one
    assert house.order.index("b1") == 4


def test_a_tenant_at_its_own_limit_leaves_the_places_to_others() -> None:
    house = House(max_streams=4)
    narrow = Tenant("narrow", max_streams=1)
    for number in range(3):
        house.ask(narrow, f"n{number}")
    house.ask(A, "a0")
    house.time.run(0.5)
    assert house.order == ["n0", "a0"] and house.waiting() == 2
    house.time.run()
    assert [entry for entry in house.begun if entry[1].startswith("n")] == [(0, "n0"), (1, "n1"), (2, "n2")]


def test_one_who_leaves_the_line_makes_no_trouble_and_no_room_is_lost() -> None:
    house = House(max_streams=1)
    house.ask(A, "first")
    leaver = house.ask(A, "leaver")
    house.ask(A, "last")
    assert leaver
    house.admission.withdraw(leaver)
    house.admission.withdraw(leaver)  # twice is once
    house.time.run()
    assert house.order == ["first", "last"]


# --- rates


def test_a_rate_holds_on_average_and_a_debt_is_paid_first() -> None:
    house = House()
    tenant = Tenant("t", tokens_per_minute=600)  # 10 a second
    for number in range(5):
        house.time.later(number * 0.1, lambda: house.ask(tenant, seconds=0.05, prompt=300, completion=600) and None)
    house.time.run()
    times = [time for time, _ in house.begun]
    assert times[0] == 0
    # 900 used of a burst of 600: 300 owed at 0.05 s, which takes 30 s; then each owes 900 more, which takes 90.
    assert times[1:] == [pytest.approx(30, abs=0.2), *(pytest.approx(30 + 90 * n, abs=0.5) for n in (1, 2, 3))]


def test_a_debt_that_is_paid_lets_in_one_and_not_all_that_wait() -> None:
    """What a request will use is guessed when it begins; what was guessed too much is given back."""
    house = House()
    tenant = Tenant("t", tokens_per_minute=6000)  # 100 a second
    for _ in range(20):
        house.ask(tenant, seconds=1.0, prompt=50, completion=50)
    assert len(house.begun) == 7  # a thousand is guessed of each, the last of which goes beyond the minute's 6000
    house.time.run()
    assert len(house.begun) == 20 and house.begun[-1][0] < 3  # they have used a hundred each
    began = house.time.now
    for number in range(30):  # twenty times as many as guessed, of which half is known when the prompt is
        house.time.later(0.01 * number, lambda: house.ask(tenant, seconds=1.0, prompt=1000, completion=1000) and None)
    house.time.run()
    for seconds in (60, 120, 240, 480):
        used = sum(2000 for at, _ in house.begun[20:] if at <= began + seconds)
        assert (
            used <= 6000 + 100 * seconds + 7 * 1000
        )  # the burst, what was filled in, and of each of the first 7 the rest
    assert house.begun[-1][0] - began == pytest.approx((60_000 - 6000) / 100, rel=0.1)


def test_a_rate_that_was_changed_counts_from_then_on_and_a_debt_stays() -> None:
    bucket = TokenBucket(10, 600, 0)
    bucket.take(900, 0)
    bucket.change(100, 6000, 10)
    assert bucket.level(10) == -200 and bucket.ready_in(10) == 2
    bucket.change(1, 60, 1000)
    assert bucket.level(1000) == 60


@given(
    rate=st.integers(1, 1000),
    uses=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5000)), max_size=40),
)
def test_no_more_is_used_than_filled_in_and_the_burst_and_the_last_one(
    rate: int, uses: list[tuple[float, int]]
) -> None:
    """Whoever waits for `ready_in` before each use."""
    bucket, now, used, last = TokenBucket(rate, 60 * rate, 0), 0.0, 0, 0
    for pause, tokens in uses:
        now += pause
        now += bucket.ready_in(now)
        assert bucket.level(now) >= -1e-6
        assert used <= 60 * rate + rate * now + 1e-3
        bucket.take(tokens, now)
        used, last = used + tokens, tokens
        assert used <= 60 * rate + rate * now + last + 1e-3


# --- refusals


def test_a_full_line_refuses_the_newest_with_when_to_try_again() -> None:
    house = House(max_streams=1, max_waiting=2)
    for label in ("run", "w0", "w1", "w2"):
        house.ask(A, label)
    ((label, error),) = house.refused
    assert label == "w2" and isinstance(error, ResourceExhausted)
    assert (error.reason, error.retry_after) == ("QUEUE_FULL", 1.0)  # nothing has ended yet
    assert "2 requests wait at this gateway already" in error.message and "try again in 1 s" in error.message
    house.time.run(0.5)
    house.ask(A, "late")
    house.time.run()
    assert house.order == ["run", "w0", "w1"]
    house.ask(A, "run", seconds=10)
    for label in ("w0", "w1", "w2"):
        house.ask(A, label)
    assert house.refused[-1][1].retry_after == 3.0  # three have to end before it, which take a second each


def test_a_full_line_gives_up_low_priorities_and_of_those_the_longest_queue() -> None:
    house = House(max_streams=1, max_waiting=3)
    house.ask(A, "run")
    for label in ("a0", "a1", "a2"):
        house.ask(A, label)
    house.ask(B, "b0")  # a has three, b one
    assert [label for label, _ in house.refused] == ["a2"]
    assert "place was taken by a higher priority, or a tenant with fewer" in house.refused[0][1].message
    house.ask(A, "urgent", priority=1)
    assert [label for label, _ in house.refused] == ["a2", "a1"]
    house.ask(A, "idle", priority=-1)
    assert [label for label, _ in house.refused] == ["a2", "a1", "idle"]
    house.time.run()
    assert house.order == ["run", "urgent", "b0", "a0"]


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    house = House(max_streams=1)
    house.ask(A, "first", seconds=10)
    house.time.run()
    house.ask(A, "run", seconds=10)
    house.ask(A, "patient", remaining=11)
    house.ask(A, "hasty", remaining=5)
    house.ask(B, "fair", remaining=11)  # its turn comes before a's second
    ((label, error),) = house.refused
    assert label == "hasty" and error.reason == "DEADLINE_TOO_SHORT" and error.retry_after == 20
    assert "may begin in about 20.0 s, past its deadline in 5.0 s" in error.message
    house.time.run()
    assert sorted(house.order[2:]) == ["fair", "patient"]


def test_a_deadline_within_a_debt_is_refused_and_one_behind_it_waits() -> None:
    house = House()
    tenant = Tenant("t", tokens_per_minute=60)
    house.ask(tenant, "big", prompt=100, seconds=0.0)
    house.time.run()
    house.ask(tenant, "hasty", remaining=39)
    house.ask(tenant, "patient", remaining=41)
    house.ask(A, "other", remaining=0.1)
    house.time.run()
    ((label, error),) = house.refused
    assert label == "hasty" and error.reason == "RATE_LIMITED" and error.retry_after == pytest.approx(40, abs=0.1)
    assert "tenant 't' has used its 60 tokens a minute" in error.message
    assert house.order == ["big", "other", "patient"]
    assert house.begun[-1][0] == pytest.approx(40, abs=0.1)


def test_what_waits_behind_nobody_is_not_refused_for_what_others_wait_for() -> None:
    """A tenant at its own limit says nothing of how long another would wait."""
    house = House(max_streams=10)
    narrow = Tenant("narrow", max_streams=1)
    house.ask(narrow, "slow", seconds=100)
    house.time.run()
    for _ in range(5):
        house.ask(narrow, "waits", seconds=100)
    house.ask(A, "a", remaining=0.01)
    assert house.refused == [] and house.order[-1] == "a"


def test_a_priority_above_the_tenants_is_denied_and_a_long_prompt_refused() -> None:
    house = House()
    tenant = Tenant("t", max_priority=2, max_prompt_tokens=100)
    house.ask(tenant, priority=2)
    house.ask(tenant, "high", priority=3)
    ((_, error),) = house.refused
    assert isinstance(error, PermissionDenied) and error.reason == "PRIORITY_DENIED"
    assert "priority is 3, and tenant 't' may have 2 at most" in error.message
    house.ask(ANYBODY, priority=2**31 - 1)
    with pytest.raises(InvalidArgument, match="the prompt has 101 tokens, and tenant 't' may give 100: shorten it"):
        house.ask(tenant, prompt=101)
        house.time.run()


def test_limits_of_a_tenant_follow_the_file_of_keys() -> None:
    house = House()
    house.ask(Tenant("t", max_streams=1), seconds=10)
    house.ask(Tenant("t", max_streams=2), seconds=10)
    assert len(house.begun) == 2


# --- whatever happens


REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 3),  # pause before it
        st.integers(0, 3),  # tenant
        st.integers(-1, 2),  # priority
        st.floats(0, 5),  # how long it is under way
        st.integers(0, 200),  # tokens
        st.one_of(st.none(), st.floats(0, 20)),  # deadline
        st.booleans(),  # whether its client gives up while it waits
    ),
    max_size=60,
)
TENANTS = (
    Tenant("0", max_priority=None),
    Tenant("1", max_priority=None, max_streams=1),
    Tenant("2", max_priority=None, tokens_per_minute=600),
    Tenant("3", max_priority=None, max_streams=2, tokens_per_minute=6000),
)


@settings(max_examples=200, deadline=None)
@given(requests=REQUESTS, max_streams=st.integers(1, 4), max_waiting=st.integers(1, 6))
def test_limits_hold_and_everyone_begins_or_is_refused_once(
    requests: list[tuple[float, int, int, float, int, float | None, bool]], max_streams: int, max_waiting: int
) -> None:
    house = House(max_streams=max_streams, max_waiting=max_waiting)
    at, withdrawn = 0.0, []

    def arrive(
        number: int, tenant: Tenant, priority: int, seconds: float, tokens: int, left: float | None, gone: bool
    ) -> None:
        ticket = house.ask(
            tenant, str(number), priority=priority, remaining=left, seconds=seconds, prompt=tokens, completion=tokens
        )
        if ticket and ticket.waits and gone:
            house.admission.withdraw(ticket)
            withdrawn.append(str(number))
        check()

    def check() -> None:
        assert sum(house.running.values()) == house.admission._running <= max_streams
        assert house.waiting() == house.admission._num_waiting <= max_waiting
        for tenant in TENANTS:
            assert tenant.max_streams is None or house.running.get(tenant.name, 0) <= tenant.max_streams
        if house.admission._running < max_streams:  # who waits, waits for a limit of its own
            now = house.time.now
            assert all(line.full or line.debt(now) for line in house.admission._lines.values() if line.waiting)

    for number, (pause, tenant, *rest) in enumerate(requests):
        at += pause
        house.time.later(at, lambda number=number, tenant=tenant, rest=rest: arrive(number, TENANTS[tenant], *rest))
    house.time.run()
    ends = [*house.order, *(label for label, _ in house.refused), *withdrawn]
    assert sorted(ends) == sorted(str(number) for number in range(len(requests)))
    assert house.waiting() == house.admission._running == 0 and house.admission._waiting == {}
    assert all(error.retry_after and 0.1 <= error.retry_after <= 60 for _, error in house.refused)


def test_under_steady_overload_every_tenant_gets_its_share() -> None:
    """Four tenants, of which one asks ten times as often as the others; 4 places, requests of a second each."""
    house, numbers = House(max_streams=4, max_waiting=40), random.Random(1)
    tenants = [Tenant(name) for name in "abcd"]
    for tenant, gap in zip(tenants, (0.05, 0.5, 0.5, 0.5), strict=True):
        at = 0.0
        while at < 200:
            at += numbers.uniform(0, 2 * gap)
            house.time.later(at, lambda tenant=tenant: house.ask(tenant) and None)
    house.time.run()
    counts = {tenant.name: house.order.count(tenant.name) for tenant in tenants}
    assert all(0.8 * 200 <= count <= 1.3 * 200 for count in counts.values()), counts  # of 800 that can be under way


# --- on an event loop


async def test_cancelled_tasks_leave_the_line_and_what_has_just_begun() -> None:
    admission = Admission(Limits(max_streams=1), Metrics())
    first = await admission.enter(A, 0, None)
    waiting = [asyncio.create_task(admission.enter(A, 0, None)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.sleep(0)
    first.ended()  # begins waiting[0], whose task has not run yet
    waiting[0].cancel()
    second = await asyncio.wait_for(waiting[2], 60)
    assert admission._running == 1 and admission._num_waiting == 0
    second.ended()
    assert admission._running == 0
    assert [task.cancelled() for task in waiting] == [True, True, False]


async def test_what_waits_and_is_used_is_told() -> None:
    metrics = Metrics()
    admission = Admission(Limits(max_streams=1, max_waiting=1), metrics)
    grant = await admission.enter(A, 0, None)
    waiting = asyncio.create_task(admission.enter(B, 0, None))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await admission.enter(B, 0, None)
    told = {metric.name: {tuple(s.labels.values()): s.value for s in metric.samples} for metric in metrics.collect()}
    assert told["enginehouse_gateway_tenant_streams"] == {("a",): 1, ("b",): 0}
    assert told["enginehouse_gateway_tenant_waiting"] == {("a",): 0, ("b",): 1}
    assert told["enginehouse_gateway_admission_refused"].pop(("b", "QUEUE_FULL")) == 1
    assert set(told["enginehouse_gateway_admission_refused"].values()) == {0}
    grant.charge_prompt(7)
    grant.follow(Usage(completion_tokens=5))
    grant.ended()
    (await waiting).ended()
    tokens = next(metric for metric in metrics.collect() if metric.name == "enginehouse_gateway_tenant_tokens")
    assert {tuple(s.labels.values()): s.value for s in tokens.samples} == {
        ("a", "prompt"): 7,
        ("a", "completion"): 5,
        ("b", "prompt"): 0,
        ("b", "completion"): 0,
    }
