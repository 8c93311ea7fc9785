"""Engines by id and by name, in a store.

engines/<engine_id>.json     the manifest, create-only: what is in no manifest does not exist
models/<name>/<seq>.json     a name's engine, create-only with a rising number: the highest wins, the others are its history.
                             A record without an engine says that the name stands for nothing since then
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec

from engine.blobs import blob_key
from engine.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from engine.manifest import FileRef, Manifest
from engine.store import Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ID = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{6,63}")  # of an id; fewer digits are more likely a slip than a choice
_RECORD = re.compile(r"models/([^/]+)/([0-9]{10})\.json")
_PARALLEL_READS = 16  # small objects; an object store answers each in some 10 ms
TRIES = 100  # to take the next number of a name before other writers do


class NameRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a name's history.

    Attributes:
        sequence: rises with every change, from 1.
        engine_id: empty when the name stands for nothing since then.
        created: ISO 8601, by the clock of the machine that wrote it, for people; empty if that is not known.
    """

    name: str
    sequence: int
    engine_id: str
    created: str = ""


def check_name(name: str) -> str:
    """The name itself. Raises InvalidArgument unless it can be given to an engine and fits into a key on every backend."""
    if _ID.fullmatch(name):
        raise InvalidArgument(
            f"model name {name!r}: 64 hexadecimal digits are always read as an engine id, choose another name",
            reason="MODEL_NAME_INVALID",
        )
    return _check_known(name)


def _check_known(name: str) -> str:
    """The same for a name that may have been given before `check_name` refused ids: it can still be read and removed."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidArgument(
            f"model name {name!r}: use 1 to 128 letters, digits and . _ -, beginning with a letter or digit",
            reason="MODEL_NAME_INVALID",
        )
    return name


def find_manifest(store: Store, engine_id: str) -> Manifest | None:
    """The engine's manifest, or None."""
    found = find_stored(store, engine_id)
    return found[0] if found else None


def find_stored(store: Store, engine_id: str) -> tuple[Manifest, bytes] | None:
    """The engine's manifest and the very bytes that it was read from, which are what a signature is over; or None.

    Raises:
        InvalidArgument: no engine id.
        DataLoss: what is stored is no manifest, or another engine's.
        FailedPrecondition: a manifest of a format that this release does not read.
    """
    key = manifest_key(engine_id)
    try:
        data = store.read(key)
        found = Manifest.from_json(data)
    except NotFound:
        return None
    except InvalidArgument as error:
        raise DataLoss(
            f"engines/{engine_id}.json in {store.url} is damaged ({error.message}): delete it and build again",
            reason="MANIFEST_INVALID",
        ) from None
    if found.engine_id != engine_id:
        raise DataLoss(
            f"engines/{engine_id}.json in {store.url} holds engine {found.engine_id[:12]}: delete it and build again",
            reason="MANIFEST_MISPLACED",
        )
    return found, data


def manifest_key(engine_id: str) -> str:
    """The address of a manifest in the store. Raises InvalidArgument for what is no engine id."""
    if not _ID.fullmatch(engine_id):
        raise InvalidArgument(f"engine id {engine_id!r} is not 64 hexadecimal digits", reason="ENGINE_ID_INVALID")
    return f"engines/{engine_id}.json"


def manifest(store: Store, engine_id: str) -> Manifest:
    """The engine's manifest. Raises NotFound, and what `find_stored` does."""
    return stored(store, engine_id)[0]


def stored(store: Store, engine_id: str) -> tuple[Manifest, bytes]:
    """The engine's manifest and its bytes. Raises NotFound, and what `find_stored` does."""
    found = find_stored(store, engine_id)
    if found is None:
        raise _no_engine(engine_id, f"no engine {engine_id[:12]} in {store.url}")
    return found


def engine_ids(store: Store) -> list[str]:
    """Ids of all engines, sorted."""
    ids = (entry.key.removeprefix("engines/").removesuffix(".json") for entry in store.list("engines/"))
    return [engine_id for engine_id in ids if _ID.fullmatch(engine_id)]


def missing_files(store: Store, engine: Manifest) -> list[FileRef]:
    """Files of an engine whose blobs are not in the store, or not of their size."""
    return [file for file in engine.files() if store.size(blob_key(file.digest)) != file.size]


def publish(store: Store, new: Manifest) -> Manifest:
    """Makes an engine exist; returns the manifest that counts, which is an earlier one's if there was one.

    An earlier one whose files had been lost counts as well once they are there again, as a repeated build puts them.

    Raises:
        NotFound: a file of the engine is not in the store.
        DataLoss: an earlier manifest counts and names other files, of which one is lost; or see `find_stored`.
    """
    for file in missing_files(store, new):
        raise NotFound(
            f"engine {new.engine_id[:12]}: {file.name} ({file.digest[:12]}) is not in {store.url}",
            reason="BLOB_NOT_FOUND",
        )
    store.create(manifest_key(new.engine_id), new.to_json())
    found = manifest(store, new.engine_id)
    if found != new:
        for file in missing_files(
            store, found
        ):  # `new` has it in another form, so that this build has not put it there
            raise DataLoss(
                f"engine {found.engine_id[:12]} in {store.url} has other files than were built now, and its {file.name} "
                f"({blob_key(file.digest)}) is lost: remove it (enginehouse engines rm {found.engine_id}) and build it again",
                reason="ENGINE_DAMAGED",
            )
    return found


def find_engine(store: Store, engine: str) -> str:
    """The engine id that a model name, an engine id or the beginning of one stands for.

    64 hexadecimal digits are always an id, so that no name can take an engine's place; of a name and the beginning of an
    id, the name wins.

    Raises:
        NotFound: none of these; with the names there are.
        InvalidArgument: several engines' ids begin so, which the message lists.
    """
    if _ID.fullmatch(engine):
        return engine if store.size(manifest_key(engine)) is not None else manifest(store, engine).engine_id
    if not _PREFIX.fullmatch(engine):
        return resolve(store, engine).engine_id
    record = latest(store, engine)
    if record and record.engine_id:
        return record.engine_id
    found = [engine_id for engine_id in engine_ids(store) if engine_id.startswith(engine)]
    if len(found) > 1:
        raise InvalidArgument(
            f"{engine!r} is the beginning of {len(found)} engine ids, give more digits: {', '.join(found)}",
            reason="ENGINE_AMBIGUOUS",
        )
    return found[0] if found else resolve(store, engine).engine_id


def latest(store: Store, name: str) -> NameRecord | None:
    """The newest record of a name, which may say that it stands for nothing; None for an unknown name."""
    return next(newest_first(store, name), None)


def resolve(store: Store, name: str) -> NameRecord:
    """What a name stands for now. Raises NotFound with the names there are."""
    record = latest(store, name)
    if record is None or not record.engine_id:
        raise unknown_name(store, name)
    return record


def recent_engines(store: Store, name: str, count: int) -> list[str]:
    """The engine that a name stands for and those of its last changes before, newest first, `count` at most.

    Times when it stood for nothing are left out. Raises NotFound if it stands for nothing now.
    """
    found: list[str] = []
    for record in newest_first(store, name):
        if not record.engine_id and not found:
            break
        if record.engine_id:
            found.append(record.engine_id)
        if len(found) == count:
            break
    if not found:
        raise unknown_name(store, name)
    return found


def names(store: Store) -> list[str]:
    """All names that stand for something, sorted; also those whose record is damaged, which `resolve` tells."""
    return [name for name, record in _current(store) if isinstance(record, DataLoss) or record.engine_id]


def named(store: Store) -> list[NameRecord]:
    """What each name stands for now, sorted by name. Raises DataLoss if one cannot be read."""
    found = []
    for _, record in _current(store):
        if isinstance(record, DataLoss):
            raise record
        if record.engine_id:
            found.append(record)
    return found


def set_name(store: Store, name: str, engine_id: str) -> NameRecord:
    """Gives a name to an engine that exists; a name that has it already stays as it is.

    Raises:
        NotFound: no such engine, or it was being removed meanwhile; the name stands for what it stood for then.
        InvalidArgument: no name, see `check_name`.
    """
    check_name(name)
    manifest(store, engine_id)
    for _ in range(TRIES):
        now = latest(store, name)
        if now and now.engine_id == engine_id:
            return now
        if record := append(store, name, now, engine_id):
            if store.size(manifest_key(engine_id)) is None:  # removed while its remover could not see this name yet
                _take_back(store, name, record, now.engine_id if now else "")
                removed = f"it was being removed while it got the name {name!r}; see if it is there, and repeat"
                # also if its remover has seen the name and restored it by now: the name was taken back
                raise _no_engine(engine_id, f"no engine {engine_id[:12]} in {store.url}: {removed}")
            return record
    raise contended(name)


def _take_back(store: Store, name: str, record: NameRecord, before: str) -> None:
    """Gives a name back to the engine it had before a record, or to none if that was removed; not if others have changed it."""
    newest: NameRecord | None = record
    for engine_id in (before, ""):
        if newest and (not engine_id or store.size(manifest_key(engine_id)) is not None):
            newest = append(store, name, newest, engine_id)
            if not engine_id or store.size(manifest_key(engine_id)) is not None:
                return


def newest_first(store: Store, name: str) -> Iterator[NameRecord]:
    """A name's records, each read when it is asked for."""
    return (_record(store, key) for key in reversed(_record_keys(store, name)))


def append(store: Store, name: str, now: NameRecord | None, engine_id: str) -> NameRecord | None:
    """Writes the record after `now`, the newest one; None if another writer has done that first."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    record = NameRecord(name, now.sequence + 1 if now else 1, engine_id, created)
    key = f"models/{_check_known(name)}/{record.sequence:010d}.json"
    return record if store.create(key, msgspec.json.encode(record)) else None


def unknown_name(store: Store, name: str, shown: Callable[[str], bool] = lambda _: True) -> NotFound:
    """The error for a name that stands for nothing, with the names that there are and that may be shown."""
    known = ", ".join(filter(shown, names(store))) or "none yet"
    return NotFound(f"no model {name!r}; there are: {known}", reason="MODEL_NOT_FOUND", metadata={"model": name})


def _no_engine(engine_id: str, text: str) -> NotFound:
    return NotFound(text, reason="ENGINE_NOT_FOUND", metadata={"engine_id": engine_id})


def contended(name: str) -> Unavailable:
    """The error for a name of which others have always taken the next number first."""
    return Unavailable(f"model name {name!r} is being changed by many writers: try again", reason="NAME_CONTENDED")


def _record_keys(store: Store, name: str) -> list[str]:
    """Keys of a name's records, oldest first."""
    return [entry.key for entry in store.list(f"models/{_check_known(name)}/") if _RECORD.fullmatch(entry.key)]


def _current(store: Store) -> list[tuple[str, NameRecord | DataLoss]]:
    """Each name with its newest record, or why that cannot be read. One listing; records are read in parallel."""
    newest = {match[1]: entry.key for entry in store.list("models/") if (match := _RECORD.fullmatch(entry.key))}

    def read(key: str) -> NameRecord | DataLoss:
        try:
            return _record(store, key)
        except DataLoss as error:
            return error

    with ThreadPoolExecutor(_PARALLEL_READS, "name-read") as pool:
        return sorted(zip(newest, pool.map(read, newest.values()), strict=True), key=lambda pair: pair[0])


def _record(store: Store, key: str) -> NameRecord:
    try:
        return msgspec.json.decode(store.read(key), type=NameRecord)
    except msgspec.MsgspecError as error:
        raise DataLoss(f"{key} in {store.url} is damaged ({error}): delete it", reason="NAME_INVALID") from None
