"""The engines of a store: which there are, in short, and how one is removed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine import registry, signing
from engine.blobs import blob_key
from engine.errors import DataLoss, EnginehouseError, FailedPrecondition, NotFound
from engine.manifest import Manifest
from engine.pins import pinned
from engine.store import Store

_PARALLEL_READS = 16


@dataclass(frozen=True)
class Summary:
    """An engine in short.

    Attributes:
        created: ISO 8601.
        size: bytes of all its files.
        models: names that stand for it now.
        signers: ids of the keys under which it is signed; not verified.
        dummy_weights: its weights are random.
    """

    engine_id: str
    source: str
    created: str
    architecture: str
    dtype: str
    device: str
    num_parameters: int
    size: int
    models: tuple[str, ...]
    signers: tuple[str, ...]
    dummy_weights: bool = False


@dataclass(frozen=True)
class Unreadable:
    """An engine whose manifest cannot be read, and why."""

    engine_id: str
    problem: str


def engines(store: Store) -> tuple[list[Summary], list[Unreadable]]:
    """All engines, newest first, and those that cannot be read. Raises DataLoss if a name's record is damaged."""
    ids = registry.engine_ids(store)
    signers, models = signing.all_claims(store), _models(store)

    def read(engine_id: str) -> Summary | Unreadable | None:
        try:
            found = registry.find_manifest(store, engine_id)
        except EnginehouseError as error:
            return Unreadable(engine_id, error.message)
        return summary(found, models.get(engine_id, []), signers.get(engine_id, [])) if found else None

    with ThreadPoolExecutor(_PARALLEL_READS, "manifest-read") as pool:
        found = list(pool.map(read, ids))
    readable = [engine for engine in found if isinstance(engine, Summary)]
    readable.sort(key=lambda engine: engine.created, reverse=True)
    return readable, [engine for engine in found if isinstance(engine, Unreadable)]


def inspect(store: Store, engine_id: str) -> tuple[Summary, Manifest, bytes]:
    """One engine: in short, its manifest, and the manifest's bytes. Raises NotFound and DataLoss."""
    manifest, data = registry.stored(store, engine_id)
    models = _models(store).get(engine_id, [])
    return summary(manifest, models, signing.claims(store, engine_id)), manifest, data


def summary(manifest: Manifest, models: list[str], signers: list[str]) -> Summary:
    """A manifest in short."""
    return Summary(
        engine_id=manifest.engine_id,
        source=manifest.source,
        created=manifest.created,
        architecture=manifest.model.architecture,
        dtype=manifest.model.dtype,
        device=manifest.fingerprint.device,
        num_parameters=manifest.model.num_parameters,
        size=sum(file.size for file in manifest.files()),
        models=tuple(models),
        signers=tuple(signers),
        dummy_weights=manifest.dummy_weights,
    )


def remove_engine(store: Store, engine_id: str) -> None:
    """Makes an engine, also one that cannot be read, not exist; its blobs are left to the garbage collection.

    Waits for a garbage collection that runs: it must not see the store without a manifest that may come back.

    Raises:
        NotFound: no such engine.
        FailedPrecondition: a name stands for it.
        DataLoss: a name's record is damaged, so that it may; or the engine got a name meanwhile and has lost a file.
    """
    key = registry.manifest_key(engine_id)
    try:
        data = store.read(key)
    except NotFound:
        registry.manifest(store, engine_id)  # tells it in words
        raise
    _refuse_named(store, engine_id)
    try:
        manifest = Manifest.from_json(data)
    except EnginehouseError:  # of no known format: it names no files that could be kept
        manifest = None
    with pinned(store, [file.digest for file in manifest.files()] if manifest else []):
        store.delete(key)
        try:
            _refuse_named(store, engine_id)
        except EnginehouseError:  # `registry.set_name` has seen the engine just before: it looks again after its record
            store.create(key, data)
            if manifest:
                _refuse_incomplete(store, manifest)
            raise
    signing.remove_all(store, engine_id)


def _refuse_incomplete(store: Store, manifest: Manifest) -> None:
    if missing := registry.missing_files(store, manifest):
        blobs = ", ".join(dict.fromkeys(blob_key(file.digest) for file in missing))
        raise DataLoss(
            f"engine {manifest.engine_id[:12]} got a name while it was removed from {store.url}, and stays, but {blobs} "
            f"{'is' if len(missing) == 1 else 'are'} lost: build it again from {manifest.source}",
            reason="ENGINE_DAMAGED",
        )


def _refuse_named(store: Store, engine_id: str) -> None:
    if models := _models(store).get(engine_id):
        raise FailedPrecondition(
            f"engine {engine_id[:12]} has the name{'s' if len(models) > 1 else ''} {', '.join(models)}: give them to another "
            f"engine or remove them first (enginehouse models rm {models[0]})",
            reason="ENGINE_NAMED",
            metadata={"engine_id": engine_id, "models": ",".join(models)},
        )


def _models(store: Store) -> dict[str, list[str]]:
    """Engine id -> the names that stand for it."""
    found: dict[str, list[str]] = {}
    for record in registry.named(store):
        found.setdefault(record.engine_id, []).append(record.name)
    return found
