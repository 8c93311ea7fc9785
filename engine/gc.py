"""Garbage collection: mark what is needed, sweep the rest.

What counts as needed are the files of all manifests, of checkpoints that were uploaded in the last week, and what running
builds have pinned (`engine/pins.py`); and whatever is younger than the grace, because its manifest may be on the way. Ages
are differences of times that the store gave. Anything that cannot be read stops it before the first delete.
"""

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from engine import checkpoints, pins, registry, signing
from engine.errors import DataLoss, EnginehouseError, NotFound
from engine.store import Entry, Store
from engine.sweeps import store_time, sweeping

DAY = 24 * 3600.0
CHECKPOINT_LIFE = 7 * DAY  # since it was last offered
BUILD_LIFE = 30 * DAY  # of a job's records, since the newest was written
_PARALLEL = 16  # small reads and deletes at a time; an object store answers each in some 10 ms
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_MANIFEST = re.compile(r"engines/([0-9a-f]{64})\.json")
_CHECKPOINT = re.compile(r"checkpoints/([0-9a-f]{64})\.json")

_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Amount:
    """Some blobs: how many, and bytes."""

    count: int
    size: int


@dataclass(frozen=True)
class Report:
    """What a garbage collection has done, or would do.

    Attributes:
        kept: blobs that are needed.
        young: blobs that nothing needs, but which are younger than the grace.
        deleted: blobs that nothing needs.
        checkpoints: uploaded ones, older than a week, that are deleted.
        builds: jobs, older than 30 days, whose records are deleted.
        signatures: of engines that do not exist any more.
        pins: of builds that have died.
        partial: interrupted uploads that were dropped; 0 in a dry run, which cannot know.
    """

    kept: Amount
    young: Amount
    deleted: Amount
    checkpoints: int
    builds: int
    signatures: int
    pins: int
    partial: int
    dry_run: bool


@dataclass(frozen=True)
class _Plan:
    kept: list[Entry]
    young: list[Entry]
    blobs: list[Entry]
    checkpoints: list[str]
    builds: list[list[str]]
    signatures: list[str]
    pins: list[str]
    others: list[str]

    def doomed(self) -> list[str]:
        """What is to be deleted, blobs last: what names them goes before them."""
        records = [key for build in self.builds for key in build]
        small = self.checkpoints + records + self.signatures + self.pins + self.others
        return small + [entry.key for entry in self.blobs]


def collect(store: Store, grace: float = DAY, *, dry_run: bool = False) -> Report:
    """Deletes what nothing needs.

    Args:
        grace: seconds; nothing younger is deleted.
        dry_run: only tell what would be deleted.

    Raises:
        FailedPrecondition: another garbage collection runs; or an engine is of a format that this release does not read.
        DataLoss: something that may name blobs cannot be read; nothing was deleted.
        Unavailable: the store could not be reached, or for so long that others may have taken this for dead.
    """
    if dry_run:
        return _report(_mark(store, grace), 0, dry_run=True)
    with sweeping(store) as sweep:
        plan = _mark(store, grace)

        def delete(key: str) -> None:
            sweep.check()
            store.delete(key)

        _each(delete, plan.doomed())
        sweep.check()
        partial = store.discard_partial(grace)
    return _report(plan, partial, dry_run=False)


def _mark(store: Store, grace: float) -> _Plan:
    """What is needed and what is not. The order matters: pins before manifests, because a build that ends in between has
    its manifest before it removes its pin."""
    now = store_time(store)
    pinned, dead_pins = pins.read(store, now)
    needed, old_checkpoints = _checkpoints(store, now, pinned)
    needed |= pinned
    engines = _engines(store)
    for digests in _each(lambda engine_id: _digests(store, engine_id), engines):
        needed |= digests
    kept: list[Entry] = []
    young: list[Entry] = []
    blobs: list[Entry] = []
    for entry in store.list("blobs/"):
        match = _BLOB.fullmatch(entry.key)
        if match and match[2] not in needed:
            (blobs if now - entry.modified > grace else young).append(entry)
        else:
            kept.append(entry)
    return _Plan(
        kept=kept,
        young=young,
        blobs=blobs,
        checkpoints=old_checkpoints,
        builds=_builds(store, now),
        signatures=_signatures(store, now - grace, set(engines)),
        pins=dead_pins,
        others=[
            *(entry.key for entry in store.list("gc/clock/") if now - entry.modified > DAY),
            *(entry.key for entry in store.list("uploads/") if _is_old_upload(entry, now, needed)),
        ],
    )


def _engines(store: Store) -> list[str]:
    """Ids of all engines. Raises DataLoss for what should be a manifest and is none."""
    found = []
    for entry in store.list("engines/"):
        match = _MANIFEST.fullmatch(entry.key)
        if match is None:
            raise DataLoss(
                f"{entry.key} in {store.url} is no manifest of an engine: nothing was deleted. Move it elsewhere",
                reason="MANIFEST_INVALID",
            )
        found.append(match[1])
    return found


def _digests(store: Store, engine_id: str) -> frozenset[str]:
    """Digests of all files of an engine; none when it has just been removed."""
    try:
        manifest = registry.find_manifest(store, engine_id)
    except EnginehouseError as error:
        message = (
            f"engine {engine_id} cannot be read, so that nothing was deleted: {error.message}. "
            f"To give it up: enginehouse engines rm {engine_id}"
        )
        raise type(error)(message, reason=error.reason) from error
    return frozenset(file.digest for file in manifest.files()) if manifest else frozenset()


def _checkpoints(store: Store, now: float, pinned: set[str]) -> tuple[set[str], list[str]]:
    """Digests of the files of uploaded checkpoints that are kept, and the keys of those that are not.

    An old one of which a file is pinned is kept: somebody is offering it again.
    """
    digests: set[str] = set()
    old = []
    for entry in store.list("checkpoints/"):
        match = _CHECKPOINT.fullmatch(entry.key)
        if match is None:
            raise DataLoss(
                f"{entry.key} in {store.url} is no uploaded checkpoint: nothing was deleted. Move it elsewhere",
                reason="CHECKPOINT_INVALID",
            )
        expired = now - entry.modified > CHECKPOINT_LIFE
        try:
            files = {file.digest for file in checkpoints.get(store, match[1]).files}
        except NotFound:
            continue
        except DataLoss:
            if not expired:
                raise
            files = set()
        if expired and not files & pinned:
            old.append(entry.key)
        else:
            digests |= files
    return digests, old


def _builds(store: Store, now: float) -> list[list[str]]:
    """The records of each job that has ended and whose newest one is old."""
    open_jobs = {entry.key.replace("queue/", "builds/") for entry in store.list("queue/")}
    jobs: dict[str, list[Entry]] = {}
    for prefix in ("builds/", "joins/", "ended/"):
        for entry in store.list(prefix):
            job = "/".join(entry.key.split("/")[:2])
            if job not in open_jobs:
                jobs.setdefault(job, []).append(entry)
    return [
        [entry.key for entry in entries]
        for entries in jobs.values()
        if now - max(entry.modified for entry in entries) > BUILD_LIFE
    ]


def _is_old_upload(entry: Entry, now: float, needed: set[str]) -> bool:
    """Whether an uploaded file's record is of no checkpoint that is kept; without it the file counts as not uploaded."""
    digest = entry.key.removeprefix("uploads/").removesuffix(".json")
    return digest not in needed and now - entry.modified > CHECKPOINT_LIFE


def _signatures(store: Store, before: float, engines: set[str]) -> list[str]:
    """Old signatures of engines that do not exist."""
    return [
        entry.key
        for entry in store.list(signing.PREFIX)
        if entry.key.split("/")[1] not in engines and entry.modified < before
    ]


def _each(work: Callable[[_Key], _Found], keys: Iterable[_Key]) -> list[_Found]:
    """Work on all of these in parallel; after an error no more is begun."""
    with ThreadPoolExecutor(_PARALLEL, "gc") as pool:
        running = [pool.submit(work, key) for key in keys]
        try:
            return [done.result() for done in running]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _report(plan: _Plan, partial: int, *, dry_run: bool) -> Report:
    def amount(entries: list[Entry]) -> Amount:
        return Amount(len(entries), sum(entry.size for entry in entries))

    return Report(
        kept=amount(plan.kept),
        young=amount(plan.young),
        deleted=amount(plan.blobs),
        checkpoints=len(plan.checkpoints),
        builds=len(plan.builds),
        signatures=len(plan.signatures),
        pins=len(plan.pins),
        partial=partial,
        dry_run=dry_run,
    )
