"""Which executor a request goes to: the links, what is known of them, and the policy that chooses."""

import asyncio
import random
from collections.abc import Callable, Collection, Sequence

from engine.errors import Unavailable
from gateway.link import Link
from gateway.prefixes import Chain, Holder, PrefixIndex
from gateway.roster import Roster
from gateway.routing import Ask, Policy, View
from protos.v1.executor_pb2 import Submit

SAMPLE = 16  # executors that a choice looks at, beside those that are believed to have the prompt's beginning
_LOOK_AT = 64  # executors that are asked at once what they have, where none seems to have an engine


class Router:
    """Holds a link to each executor.

    Attributes:
        prefixes: what the executors' prefix caches are believed to hold.

    Args:
        link: makes the one to an address.
    """

    def __init__(
        self, addresses: Sequence[str], policy: Policy | None = None, link: Callable[[str], Link] = Link
    ) -> None:
        self.prefixes = PrefixIndex()
        self._policy = policy or Policy()
        self._by_address = {address: link(address) for address in dict.fromkeys(addresses)}
        self._links = list(self._by_address.values())
        self._roster = Roster[Link]()
        for made in self._links:
            made.on_change = self._roster.update
            made.fleet = len(self._links)
        self._tasks: list[asyncio.Task[None]] = []
        self._looking: asyncio.Future[list[None]] | None = None

    @property
    def links(self) -> Sequence[Link]:
        """One for each executor."""
        return self._links

    def start(self) -> None:
        """Begins to connect; executors that are down are connected when they come up."""
        self._tasks = [asyncio.create_task(link.run(), name=f"link-{link.address}") for link in self._links]

    async def stop(self) -> None:
        """Ends all links; requests that are still running fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ready(self, engine_id: str) -> int:
        """How many executors can take a request for the engine."""
        return len(self._roster.ready(engine_id))

    async def look(self, engine_id: str) -> None:
        """Where no executor seems to have the engine, asks a number of them: it may have been loaded just now."""
        if not self.ready(engine_id):
            if self._looking is None or self._looking.done():
                asked = self._links if len(self._links) <= _LOOK_AT else random.sample(self._links, _LOOK_AT)
                self._looking = asyncio.gather(*(link.look() for link in asked))
            await asyncio.shield(self._looking)  # one that leaves does not end it for the others

    def chain(self, submit: Submit) -> Chain | None:
        """What `choose` finds a prompt's prefix by; None where there is only one executor to choose."""
        if len(self._links) < 2:
            return None
        return Chain(submit.engine_id, submit.tenant, submit.token_ids)

    def choose(
        self, model: str, engine_id: str, chain: Chain | None = None, tokens: int = 0, avoid: Collection[str] = ()
    ) -> Link:
        """The link that a request for the engine goes to. Raises Unavailable if no executor can take it.

        Args:
            chain: of the prompt, if its prefix shall count.
            tokens: to be computed, the emitted ones among them.
            avoid: addresses of executors that have just failed it: they are taken if there is no other.
        """
        ready = self._roster.ready(engine_id)
        cached = self.prefixes.match(chain) if chain and len(ready) > 1 else {}
        ask = Ask(tokens, cached, avoid)
        found = self._best(self._candidates(ready, cached), engine_id, ask) or self._best(ready, engine_id, ask)
        if found is None:
            raise self._not_ready(model, engine_id)
        return found

    def _candidates(self, ready: Sequence[Link], cached: Collection[Holder]) -> Sequence[Link]:
        """All, if they are few; else some at random (Mitzenmacher, The Power of Two Choices, 2001) and those with the prefix."""
        if len(ready) <= SAMPLE:
            return ready
        sample = dict.fromkeys(random.sample(ready, SAMPLE))
        return list(sample | dict.fromkeys(self._by_address[holder.address] for holder in cached))

    def _best(self, links: Sequence[Link], engine_id: str, ask: Ask) -> Link | None:
        place = self._policy.choose(ask, [link.view(engine_id) for link in links])
        return None if place is None else links[place]

    def _not_ready(self, model: str, engine_id: str) -> Unavailable:
        connected = sum(link.connected for link in self._links)
        held_back = [view for link in self._roster.ready(engine_id) if not (view := link.view(engine_id)).trusted]
        if held_back:
            return Unavailable(
                f"{_executors(held_back)} with engine {engine_id[:12]} of model {model!r} failed several requests in a row and "
                "will be tried again soon: see the log of what failed",
                reason="EXECUTORS_FAILING",
                metadata={"engine_id": engine_id, "model": model},
                retry_after=1,
            )
        return Unavailable(
            f"no executor has engine {engine_id[:12]} of model {model!r} ready "
            f"({connected} of {len(self._links)} executors are connected): load it with `enginehouse load {model}`",
            reason="ENGINE_NOT_READY",
            metadata={"engine_id": engine_id, "model": model, "connected_executors": str(connected)},
        )


def _executors(views: Sequence[View]) -> str:
    return f"executor {views[0].address}" if len(views) == 1 else f"all {len(views)} executors"
