"""What can be done to a model's name beside giving it: take it away, change it, go back. The history only grows."""

from engine import registry
from engine.errors import FailedPrecondition, NotFound, Unavailable
from engine.registry import NameRecord
from engine.store import Store


def history(store: Store, name: str) -> list[NameRecord]:
    """What a name stands for and has stood for, newest first, also if it stands for nothing now. Raises NotFound."""
    records = list(registry.newest_first(store, name))
    if not records:
        raise registry.unknown_name(store, name)
    return records


def remove_name(store: Store, name: str) -> NameRecord:
    """Lets a name stand for nothing; its history and the engine stay. Raises NotFound."""
    for _ in range(registry.TRIES):
        if record := registry.append(store, name, registry.resolve(store, name), ""):
            return record
    raise registry.contended(name)


def rename(store: Store, old: str, new: str) -> NameRecord:
    """Gives a name's engine a new name, then takes the old one away; the new name's record.

    Raises:
        NotFound: the old name stands for nothing.
        FailedPrecondition: the new name stands for something.
        Unavailable: the old name was given to another engine meanwhile; both names stand then.
    """
    registry.check_name(new)
    before = registry.resolve(store, old)
    for _ in range(registry.TRIES):
        now = registry.latest(store, new)
        if now and now.engine_id:
            raise FailedPrecondition(
                f"model name {new!r} stands for engine {now.engine_id[:12]}: choose another, or remove it first "
                f"(enginehouse models rm {new})",
                reason="MODEL_NAME_TAKEN",
            )
        if record := registry.append(store, new, now, before.engine_id):
            break
    else:
        raise registry.contended(new)
    if not registry.append(store, old, before, ""):
        raise Unavailable(
            f"model name {old!r} was changed while it was renamed: {new!r} stands for engine {before.engine_id[:12]} now, "
            f"and {old!r} for what it was given",
            reason="NAME_CONTENDED",
        )
    return record


def rollback(store: Store, name: str, sequence: int | None = None) -> NameRecord:
    """Gives a name back to an earlier engine, as a new record.

    Args:
        sequence: of the record to go back to; by default the newest one with another engine than now, of those that exist.

    Raises:
        NotFound: an unknown name, no such record, or its engine does not exist any more.
        FailedPrecondition: there is nothing to go back to.
    """
    if sequence is not None:
        record = next((record for record in registry.newest_first(store, name) if record.sequence == sequence), None)
        if record is None:
            raise NotFound(
                f"model name {name!r} has no record {sequence}: see enginehouse models history {name}",
                reason="NAME_RECORD_NOT_FOUND",
            )
        if not record.engine_id:
            raise FailedPrecondition(
                f"model name {name!r} stood for nothing in record {sequence}: choose another",
                reason="NAME_RECORD_EMPTY",
            )
        return registry.set_name(store, name, record.engine_id)
    records = registry.newest_first(store, name)
    now = next(records, None)
    if now is None:
        raise registry.unknown_name(store, name)
    for record in records:
        if (
            record.engine_id not in ("", now.engine_id)
            and store.size(registry.manifest_key(record.engine_id)) is not None
        ):
            return registry.set_name(store, name, record.engine_id)
    raise FailedPrecondition(
        f"model name {name!r} has stood for no other engine that still exists", reason="NO_EARLIER_ENGINE"
    )
