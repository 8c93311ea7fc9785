"""A gateway before many executors: what a choice costs, how evenly gateways spread requests, and what is sent beside them.

python -m bench.scale [--out FILE.json] [--largest N]; docs/scale.md says what the numbers mean. Times and sizes are this
machine's; waits are of simulated time, with the real router and its policy, and the same everywhere.
"""

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.routing import by_chance, ours
from bench.simulated import ENGINE, Clock
from gateway.failover import Failover
from gateway.inbox import Inbox
from gateway.inboxes import Inboxes
from gateway.link import _POLL_INTERVAL, _POLLS, Link
from gateway.models import _KEPT_HISTORY, _NAME_TTL
from gateway.prefixes import BLOCK_TOKENS, Chain, Holder, PrefixIndex
from gateway.router import Router
from gateway.routing import Policy, View
from protos.v1.executor_pb2 import ENGINE_STATE_READY, EngineLoad, EngineStatus, ExecutorStatus, Submit

GATEWAYS = 100
PLACES, UTILIZED, SECONDS = 8, 0.7, 5.0  # requests that an executor runs at a time, share that is busy, of a request
MODELS = 100  # in use at every gateway


class Place:
    """An executor as a queue: it runs so many at a time, each for as long as it takes.

    Attributes:
        history: its load at each second.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.running = 0
        self.waiting: deque[Callable[[], None]] = deque()
        self.waited: list[float] = []
        self.history: list[int] = []

    @property
    def load(self) -> int:
        return self.running + len(self.waiting)

    def submit(self, seconds: float, end: Callable[[], None]) -> None:
        came = self.clock.now

        def start() -> None:
            self.waited.append(self.clock.now - came)
            self.running += 1
            self.clock.after(seconds, done)

        def done() -> None:
            self.running -= 1
            end()
            if self.waiting:
                self.waiting.popleft()()

        if self.running < PLACES:
            start()
        else:
            self.waiting.append(start)


class ScaleLink:
    """What `gateway.link.Link` is to a router. It hears of the load with each end of its own requests, and by polling.

    Args:
        interval: seconds between two polls; a poll tells of the load as it was at the full second before.
    """

    connected = True

    def __init__(self, address: str, place: Place | None = None, interval: float = 1.0) -> None:
        self.address, self.place, self.interval = address, place, interval
        self.phase, self.heard = _draw.random() * interval, 0.0
        self.on_change: Callable[[ScaleLink, list[str]], None] = lambda _link, _engine_ids: None
        self.fleet = 0
        self.inboxes = Inboxes(lambda _inbox: None)
        self.reported = 0
        self._holder = Holder(address)

    def view(self, engine_id: str) -> View:
        own = self.inboxes.live[engine_id]
        if self.place:
            polled = self.phase + (self.place.clock.now - self.phase) // self.interval * self.interval
            if polled > self.heard:
                self.heard, self.reported = polled, self.place.history[int(polled)]
        others = max(self.reported - own, 0)
        return View(self.address, True, True, max(self.reported, own), 0, others, holder=self._holder)

    def holder(self, _engine_id: str) -> Holder:
        return self._holder

    def send(self, submit: Submit, inbox: Inbox) -> None:
        self.inboxes.open(submit, inbox)

        def end() -> None:
            self.inboxes.forget(inbox.handle)
            if self.place:
                self.heard, self.reported = self.place.clock.now, self.place.load

        if self.place:
            self.place.submit(_draw.expovariate(1 / SECONDS), end)


_draw = random.Random(0)


def made_router(links: "list[ScaleLink]", policy: Policy | None = None) -> Router:
    """A router to links that are all ready."""
    by_address = {link.address: link for link in links}
    router = Router(list(by_address), policy, by_address.__getitem__)  # type: ignore[arg-type]
    for link in links:
        link.on_change(link, [ENGINE])
    return router


@contextmanager
def timed(found: dict[str, float], name: str, times: int) -> Iterator[None]:
    """Microseconds each."""
    began = time.perf_counter()
    yield
    found[name] = round((time.perf_counter() - began) / times * 1e6, 1)


def choices(executors: int) -> dict[str, float]:
    """What a request's choice costs, in microseconds."""
    found: dict[str, float] = {}
    router = made_router([ScaleLink(f"e:{n}") for n in range(executors)])
    prompts = [[_draw.randrange(30_000) for _ in range(2000)] for _ in range(300)]
    with timed(found, "hash a prompt of 2000 tokens", len(prompts)):
        chains = [Chain(ENGINE, "", prompt) for prompt in prompts]
    with timed(found, "choose", len(chains)):
        links = [router.choose("m", ENGINE, chain, 2000) for chain in chains]
    with timed(found, "remember", len(chains)):
        for chain, link in zip(chains, links, strict=True):
            router.prefixes.add(chain, link.holder(ENGINE))
    with timed(found, "choose by prefix", len(chains)):
        again = [router.choose("m", ENGINE, chain, 2000) for chain in chains]
    found["found by prefix"] = sum(a is b for a, b in zip(links, again, strict=True)) / len(links)
    with timed(found, "count the ready", 1000):
        for _ in range(1000):
            router.ready(ENGINE)
    return found


def spread(
    executors: int, gateways: int, policy: Callable[[random.Random], Policy], interval: float, seconds: float = 25.0
) -> dict[str, float]:
    """How long requests wait where gateways choose by what they have heard: polls are `interval` seconds apart."""
    _draw.seed(1)
    clock = Clock()
    places = [Place(clock) for _ in range(executors)]
    failovers = [
        Failover(
            made_router(
                [ScaleLink(f"e:{n}", place, interval) for n, place in enumerate(places)], policy(random.Random(number))
            )
        )
        for number in range(gateways)
    ]

    def note() -> None:
        for place in places:
            place.history.append(place.load)
        if clock.now < seconds:
            clock.after(1.0, note)

    note()
    submit = Submit(engine_id=ENGINE, token_ids=range(20))
    rate, at, asked = executors * PLACES * UTILIZED / SECONDS, 0.0, 0
    while at < seconds:
        failover = _draw.choice(failovers)
        clock.after(at, lambda failover=failover: failover.request("m", _no_limit).send(submit, _EVENT))
        at += _draw.expovariate(rate)
        asked += 1
    clock.run()
    waited = sorted(wait for place in places for wait in place.waited)
    return {
        "requests": asked,
        "waited": round(sum(wait > 0 for wait in waited) / len(waited), 4),
        "mean wait, ms": round(1000 * statistics.fmean(waited), 1),
        "p99 wait, ms": round(1000 * waited[len(waited) * 99 // 100], 1),
    }


def _no_limit(_submit: Submit) -> None: ...


_EVENT = asyncio.Event()


async def memory(links: int = 1000) -> dict[str, float]:
    """What a link and a remembered block take, in bytes: of channels that were never connected."""
    before = _resident()
    kept = [Link(f"127.0.0.1:{20_000 + n}") for n in range(links)]
    a_link = (_resident() - before) / links
    for link in kept:
        await link._channel.close()
    before, index, holders = _resident(), PrefixIndex(1 << 20), [Holder(str(n)) for n in range(4)]
    blocks = 50_000
    for _ in range(blocks // 32):
        index.add(Chain(ENGINE, "", [_draw.randrange(30_000) for _ in range(32 * BLOCK_TOKENS)]), _draw.choice(holders))
    return {"link": round(a_link), "prefix block": round((_resident() - before) / blocks)}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def messages(executors: int, gateways: int, models: int = MODELS) -> dict[str, float]:
    """What is sent beside requests, in a second: computed from the constants of the code."""
    interval = max(_POLL_INTERVAL, executors / _POLLS)
    load = EngineLoad(
        engine_id="e" * 64, running=99, waiting=99, queued_tokens=99_999, free_kv_blocks=9_999, total_kv_blocks=9_999
    )
    status = ExecutorStatus(
        engines=[
            EngineStatus(engine_id="e" * 64, state=ENGINE_STATE_READY, max_seq_len=8192, max_batch_size=256, load=load)
        ],
        device="cuda",
        version="0.1.0",
    )
    return {
        "connections of a gateway": executors,
        "connections of an executor": gateways,
        "polls of a gateway": round(executors / interval, 1),
        "polls of an executor": round(gateways / interval, 2),
        "status bytes": status.ByteSize(),
        "S3 lists": gateways * models / _NAME_TTL,
        "S3 reads at most": gateways * models / _NAME_TTL * _KEPT_HISTORY,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--largest", type=int, default=10_000, help="executors")
    arguments = parser.parse_args()
    found: dict[str, object] = {"bytes": asyncio.run(memory())}
    for executors in [count for count in (10, 1_000, 10_000) if count <= arguments.largest]:
        found[f"{executors} executors, a choice, us"] = choices(executors)
        found[f"{executors} executors, {GATEWAYS} gateways, beside requests"] = messages(executors, GATEWAYS)
    for name, policy in (("ours", ours), ("by chance", by_chance)):
        found[f"10 executors, a gateway, {name}"] = spread(10, 1, policy, 1.0)
        for interval in (1.0, 20.0):  # as with up to 500 executors, and with 10,000
            found[f"200 executors, {GATEWAYS} gateways, polls {interval:g} s apart, {name}"] = spread(
                200, GATEWAYS, policy, interval
            )
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
