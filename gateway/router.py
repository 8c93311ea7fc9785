"""Which executor a request goes to."""

import asyncio
from collections.abc import Callable, Sequence

from engine.errors import Unavailable
from gateway.link import Link, View


def least_loaded(views: Sequence[View]) -> int | None:
    """The place of the executor to take, or None: of those that are connected and have the engine, the one with the fewest
    requests, then the fewest queued tokens, then the first."""
    able = [place for place, view in enumerate(views) if view.connected and view.ready]
    return min(able, key=lambda place: (views[place].requests, views[place].queued_tokens), default=None)


class Router:
    """Holds a link to each executor."""

    def __init__(self, addresses: Sequence[str], link: Callable[[str], Link] = Link) -> None:
        self._links = [link(address) for address in dict.fromkeys(addresses)]
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
        return sum(view.connected and view.ready for view in self._views(engine_id))

    async def find(self, model: str, engine_id: str) -> Link:
        """As `choose`. Where no executor seems to have the engine, all are asked first: it may have been loaded just now."""
        if not self.ready(engine_id):
            if self._looking is None or self._looking.done():
                self._looking = asyncio.gather(*(link.look() for link in self._links))
            await asyncio.shield(self._looking)  # one that leaves does not end it for the others
        return self.choose(model, engine_id)

    def choose(self, model: str, engine_id: str) -> Link:
        """The link that a request for the engine goes to. Raises Unavailable if no executor can take it."""
        views = self._views(engine_id)
        place = least_loaded(views)
        if place is None:
            connected = sum(view.connected for view in views)
            raise Unavailable(
                f"no executor has engine {engine_id[:12]} of model {model!r} ready "
                f"({connected} of {len(views)} executors are connected): load it with `enginehouse load {model}`",
                reason="ENGINE_NOT_READY",
                metadata={"engine_id": engine_id, "model": model, "connected_executors": str(connected)},
            )
        return self._links[place]

    def _views(self, engine_id: str) -> list[View]:
        return [link.view(engine_id) for link in self._links]
