"""Engines by id and by name, in a store.

engines/<engine_id>.json     the manifest, create-only: what is in no manifest does not exist
models/<name>/<seq>.json     a name's engine, create-only with a rising number: the highest wins, the others are its history
"""

import re

import msgspec

from engine.blobs import blob_key
from engine.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from engine.manifest import FileRef, Manifest
from engine.store import Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ID = re.compile(r"[0-9a-f]{64}")


class NameRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a name's history."""

    name: str
    sequence: int
    engine_id: str


def check_name(name: str) -> str:
    """The name itself. Raises InvalidArgument unless it fits into a key on every backend."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidArgument(
            f"model name {name!r}: use 1 to 128 letters, digits and . _ -, beginning with a letter or digit",
            reason="MODEL_NAME_INVALID",
        )
    return name


def find_manifest(store: Store, engine_id: str) -> Manifest | None:
    """The engine's manifest, or None."""
    if not _ID.fullmatch(engine_id):
        raise InvalidArgument(f"engine id {engine_id!r} is not 64 hexadecimal digits", reason="ENGINE_ID_INVALID")
    try:
        found = Manifest.from_json(store.read(f"engines/{engine_id}.json"))
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
    return found


def manifest(store: Store, engine_id: str) -> Manifest:
    """The engine's manifest. Raises NotFound."""
    found = find_manifest(store, engine_id)
    if found is None:
        raise NotFound(
            f"no engine {engine_id[:12]} in {store.url}", reason="ENGINE_NOT_FOUND", metadata={"engine_id": engine_id}
        )
    return found


def missing_files(store: Store, engine: Manifest) -> list[FileRef]:
    """Files of an engine whose blobs are not in the store, or not of their size."""
    return [file for file in engine.files() if store.size(blob_key(file.digest)) != file.size]


def publish(store: Store, new: Manifest) -> Manifest:
    """Makes an engine exist; returns the manifest that counts, which is an earlier one's if there was one.

    Raises:
        NotFound: a file of the engine is not in the store.
    """
    for file in missing_files(store, new):
        raise NotFound(
            f"engine {new.engine_id[:12]}: {file.name} ({file.digest[:12]}) is not in {store.url}",
            reason="BLOB_NOT_FOUND",
        )
    store.create(f"engines/{new.engine_id}.json", new.to_json())
    return manifest(store, new.engine_id)


def history(store: Store, name: str, last: int | None = None) -> list[NameRecord]:
    """What a name has stood for, oldest first, only the `last` ones if given; empty for an unknown name."""
    keys = sorted((entry.key for entry in store.list(f"models/{check_name(name)}/")), key=_sequence)
    return [_record(store, key) for key in (keys if last is None else keys[-last:])]


def set_name(store: Store, name: str, engine_id: str) -> NameRecord:
    """Gives a name to an engine that exists; a name that has it already stays as it is."""
    manifest(store, engine_id)
    for _ in range(100):  # another writer may take the number first
        now = latest(store, name)
        if now and now.engine_id == engine_id:
            return now
        record = NameRecord(name, now.sequence + 1 if now else 1, engine_id)
        if store.create(f"models/{name}/{record.sequence:010d}.json", msgspec.json.encode(record)):
            return record
    raise Unavailable(f"model name {name!r} is being changed by many writers: try again", reason="NAME_CONTENDED")


def latest(store: Store, name: str) -> NameRecord | None:
    """What a name stands for now, or None."""
    return next(iter(history(store, name, last=1)), None)


def resolve(store: Store, name: str) -> NameRecord:
    """What a name stands for now. Raises NotFound with the names there are."""
    record = latest(store, name)
    if record is None:
        known = ", ".join(names(store)) or "none yet"
        raise NotFound(f"no model {name!r}; there are: {known}", reason="MODEL_NOT_FOUND", metadata={"model": name})
    return record


def find_engine(store: Store, engine: str) -> str:
    """The engine id that a model name or an engine id stands for. Raises NotFound."""
    if _ID.fullmatch(engine):
        return manifest(store, engine).engine_id
    return resolve(store, engine).engine_id


def names(store: Store) -> list[str]:
    """All model names, sorted."""
    return sorted({entry.key.split("/")[1] for entry in store.list("models/")})


def _sequence(key: str) -> int:
    return int(key.rsplit("/", 1)[1].removesuffix(".json"))


def _record(store: Store, key: str) -> NameRecord:
    try:
        return msgspec.json.decode(store.read(key), type=NameRecord)
    except msgspec.MsgspecError as error:
        raise DataLoss(f"{key} in {store.url} is damaged ({error}): delete it", reason="NAME_INVALID") from None
