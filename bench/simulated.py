"""A cluster on simulated time: the real router and failover, the real scheduler, and a runner that takes as long as was measured.

Simulated are the clock, the wire (nothing is lost, nothing takes time) and the runner: a step takes as long as an 8B's step took
where it was measured (`bench/results`), by its decoding rows and its prompt tokens.
"""

import asyncio
import heapq
import json
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from executor_svc.core import Batch, Sampled, SchedulerConfig
from executor_svc.core import Sequence as Running
from executor_svc.scheduler import Scheduler
from gateway.failover import Failover
from gateway.inbox import Inbox
from gateway.inboxes import Inboxes
from gateway.prefixes import Holder
from gateway.router import Router
from gateway.routing import Policy, View
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, FinishInfo
from protos.v1.executor_pb2 import EngineLoad, Submit

MEASURED = Path(__file__).parent / "results" / "2026-11-29-h200-8b.json"
ENGINE = "e" * 64
BLOCK, KV_BLOCKS = 16, 50_000  # as 105 GB of an H200 hold of an 8B's keys
STATUS_INTERVAL = 1.0  # seconds, as of `gateway.link`


class Cost:
    """What a step takes: measured at some numbers of decoding rows and of prompt tokens, and between them in proportion."""

    def __init__(self, measured: Path = MEASURED) -> None:
        found = json.loads(measured.read_text())
        self._rows = [(0, found["itl_ms_b1"])] + [(n, found[f"itl_ms_b{n}"]) for n in (1, 8, 64, 256)]
        self._tokens = [(0, found["itl_ms_b1"]), (128, found["ttft_ms_128"]), (4096, found["ttft_ms_4096"])]

    def seconds(self, batch: Batch) -> float:
        """Of one step. What both kinds of rows need, reading the weights, is needed once."""
        rows = sum(item.count == 1 for item in batch.items)
        tokens = sum(item.count for item in batch.items if item.count > 1)
        return (_between(self._rows, rows) + _between(self._tokens, tokens) - self._tokens[0][1]) / 1000


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    place = min(max(bisect_left(points, (at, 0.0)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


class Clock:
    """Events in the order of their time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, event))

    def run(self) -> None:
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


class SimExecutor:
    """A scheduler whose batches take simulated time."""

    def __init__(self, clock: Clock, cost: Cost, kv_blocks: int) -> None:
        config = SchedulerConfig(kv_blocks, BLOCK, 256, 8192, 131_072, max_waiting=100_000)
        self.scheduler = Scheduler(config, lambda: clock.now)
        self.computed = 0  # tokens
        self._clock, self._cost = clock, cost
        self._inboxes: dict[Running, tuple[SimLink, Inbox]] = {}
        self._told: set[Running] = set()
        self._busy = False

    def submit(self, submit: Submit, link: "SimLink", inbox: Inbox) -> None:
        token_ids, count = list(submit.token_ids), submit.stopping.max_tokens
        sequence = Running(0, inbox.handle, token_ids, len(token_ids), count)
        self._inboxes[sequence] = link, inbox
        self.scheduler.add(sequence)
        if not self._busy:
            self._busy = True
            self._clock.after(0.0, self._step)

    def load(self) -> EngineLoad:
        scheduler = self.scheduler
        return EngineLoad(
            engine_id=ENGINE,
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            queued_tokens=scheduler.queued_tokens(),
            free_kv_blocks=scheduler.cache.num_free,
            total_kv_blocks=scheduler.cache.num_blocks,
        )

    def _step(self) -> None:
        batch = self.scheduler.schedule()
        self._busy = batch is not None
        if batch:
            for item in batch.items:
                if item.sequence not in self._told:
                    self._told.add(item.sequence)
                    link, inbox = self._inboxes[item.sequence]
                    link.inboxes.queued_tokens[ENGINE] -= inbox.queued_tokens
                    inbox.queued_tokens = 0
                    inbox.start(item.sequence.num_cached or 0)
            self.computed += sum(item.count for item in batch.items)
            self._clock.after(self._cost.seconds(batch), lambda: self._end(batch))

    def _end(self, batch: Batch) -> None:
        samples = sum(item.samples for item in batch.items)
        emitted = self.scheduler.commit(batch, Sampled([hash((batch.step, n)) % 30_000 for n in range(samples)]))
        news, load = dict[Inbox, None](), self.load()
        for each in emitted:
            link, inbox = self._inboxes[each.sequence]
            link.loaded = load
            inbox.push([each.token_id])
            if each.finish:
                link.inboxes.forget(inbox.handle)
                del self._inboxes[each.sequence]
                self._told.discard(each.sequence)
                inbox.finish(FinishInfo(reason=FINISH_REASON_LENGTH))
            news[inbox] = None
        for inbox in news:
            _CLIENTS[inbox].news()
        self._step()


class SimLink:
    """What `gateway.link.Link` is to a router."""

    connected, num_requests = True, 0

    def __init__(self, address: str, executor: SimExecutor, clock: Clock) -> None:
        self.address = address
        self.on_change: Callable[[SimLink, Sequence[str]], None] = lambda _link, _engine_ids: None
        self.fleet = 0
        self.inboxes = Inboxes(lambda _inbox: None)
        self.loaded = executor.load()
        self._executor, self._clock = executor, clock
        self._holder = Holder(address)

    def view(self, engine_id: str) -> View:
        load, own = self.loaded, self.inboxes.live[engine_id]
        reported = load.running + load.waiting
        return View(
            self.address,
            True,
            True,
            max(reported, own),
            max(load.queued_tokens, self.inboxes.queued_tokens[engine_id]),
            max(reported - own, 0),
            load.free_kv_blocks / load.total_kv_blocks,
            self._holder,
        )

    def holder(self, _engine_id: str) -> Holder:
        return self._holder

    def send(self, submit: Submit, inbox: Inbox) -> None:
        self.inboxes.open(submit, inbox)
        self._executor.submit(submit, self, inbox)

    def cancel(self, _inbox: Inbox) -> None:
        """Everything here runs to its end."""

    def poll(self) -> None:
        self.loaded = self._executor.load()


_CLIENTS: dict[Inbox, "Client"] = {}


@dataclass
class Result:
    """Of one simulation.

    Attributes:
        throughput: tokens of completions a second, until nine tenths of the requests had ended: then a few long ones are left.
        first_tokens: seconds from each request to its first token.
        computed: tokens, of prompts and completions.
    """

    throughput: float = 0.0
    first_tokens: list[float] = field(default_factory=list)
    computed: int = 0

    @property
    def first_token(self) -> float:
        return statistics.fmean(self.first_tokens)


class Client:
    """Requests one after another, each of which begins with the last and its answer, if they are a conversation.

    Args:
        turns: tokens of what is new in each prompt, and of its answer; clients may share them.
        roams: each request goes to any gateway, instead of all to one.
    """

    def __init__(
        self,
        world: "World",
        turns: list[tuple[int, int]],
        conversation: bool,
        draw: random.Random,
        roams: bool,
    ) -> None:
        self._world, self._turns, self._conversation, self._draw = world, turns, conversation, draw
        self._gateways = world.gateways if roams else [draw.choice(world.gateways)]
        self._text: list[int] = []
        self._began = 0.0

    def ask(self) -> None:
        if not self._turns:
            return
        new, answer = self._turns.pop(0)
        if not self._conversation:
            self._text = []
        self._text += [self._draw.randrange(30_000) for _ in range(new)]
        submit = Submit(engine_id=ENGINE, token_ids=self._text)
        submit.stopping.max_tokens = answer
        self._began = self._world.clock.now
        self._request = self._draw.choice(self._gateways).request("8b", lambda _submit: None)
        self._inbox = self._request.send(submit, asyncio.Event())
        _CLIENTS[self._inbox] = self

    def news(self) -> None:
        inbox = self._inbox
        if len(inbox.token_ids) == 1:
            self._world.result.first_tokens.append(self._world.clock.now - self._began)
        if inbox.closed:
            self._world.ended.append((self._world.clock.now, len(inbox.token_ids)))
            self._text += inbox.token_ids
            del _CLIENTS[inbox]
            self._request.cancel(inbox)
            self.ask()


class World:
    """Executors, gateways and clients.

    Args:
        policies: makes one for each gateway, of its random numbers.
    """

    def __init__(
        self,
        policy: Callable[[random.Random], Policy],
        executors: int = 4,
        gateways: int = 1,
        seed: int = 0,
        kv_blocks: int = KV_BLOCKS,
    ) -> None:
        cost = Cost()
        self.clock, self.result = Clock(), Result()
        self.ended: list[tuple[float, int]] = []  # when, and tokens
        self.draw = random.Random(seed)
        self._executors = {f"e:{n}": SimExecutor(self.clock, cost, kv_blocks) for n in range(executors)}
        self.gateways = []
        for number in range(gateways):
            router = Router(
                list(self._executors),
                policy(random.Random(1000 * seed + number)),
                lambda address: SimLink(address, self._executors[address], self.clock),  # type: ignore[arg-type,return-value]
            )
            for link in router.links:
                link.on_change(link, [ENGINE])
            self.gateways.append(Failover(router))
            self.clock.after(STATUS_INTERVAL * number / gateways, lambda router=router: self._poll(router))

    def add(self, at: float, turns: list[tuple[int, int]], *, conversation: bool, roams: bool = False) -> None:
        """A client that begins at a time."""
        client = Client(self, turns, conversation, random.Random(self.draw.random()), roams)
        self.clock.after(at, client.ask)

    def run(self) -> Result:
        self.clock.run()
        most = self.ended[: len(self.ended) * 9 // 10]
        self.result.throughput = sum(tokens for _, tokens in most) / most[-1][0]
        self.result.computed = sum(executor.computed for executor in self._executors.values())
        return self.result

    def _poll(self, router: Router) -> None:
        for link in router.links:
            link.poll()  # type: ignore[attr-defined]
        if any(not executor.scheduler.idle for executor in self._executors.values()) or not self.ended:
            self.clock.after(STATUS_INTERVAL, lambda: self._poll(router))
