"""Which executors are ready for which engine: kept as it changes, so that no request asks ten thousand of them."""

from collections.abc import Collection, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Roster(Generic[T]):
    """Members by engine, in no order; an update costs as much as has changed."""

    def __init__(self) -> None:
        self._members: dict[str, list[T]] = {}
        self._places: dict[tuple[str, T], int] = {}
        self._engines: dict[T, frozenset[str]] = {}

    def ready(self, engine_id: str) -> Sequence[T]:
        """Who is ready for the engine; not to be kept."""
        return self._members.get(engine_id, ())

    def update(self, member: T, engine_ids: Collection[str]) -> None:
        """What a member is ready for now."""
        before, now = self._engines.get(member, frozenset()), frozenset(engine_ids)
        if before == now:
            return
        self._engines[member] = now
        for engine_id in before - now:
            self._remove(engine_id, member)
        for engine_id in now - before:
            members = self._members.setdefault(engine_id, [])
            self._places[engine_id, member] = len(members)
            members.append(member)

    def _remove(self, engine_id: str, member: T) -> None:
        """The last one takes its place."""
        members, place = self._members[engine_id], self._places.pop((engine_id, member))
        last = members.pop()
        if last is not member:
            members[place] = last
            self._places[engine_id, last] = place
        if not members:
            del self._members[engine_id]
