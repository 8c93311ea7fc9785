"""Compiled kernels as one file: what Triton keeps in its cache, as `executor_svc/compile.py` packs it and an executor takes it.

Triton finds a kernel by a key over its source, its arguments' types, its options, the target and Triton itself. So an archive is
never wrong: what it does not have under a launch's key is compiled.
"""

import atexit
import io
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime.cache import CacheManager, FileCacheManager

from engine import blobs
from engine.errors import DataLoss
from engine.manifest import Manifest
from engine.store import Store
from engine.trust import Trust
from executor_svc.kernels.tactics import RULE, Table, from_json, to_json

log = logging.getLogger(__name__)

_MEMBER = re.compile(r"[A-Z2-7]+/[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a key's directory, and a file there
_KEPT = (".cubin", ".json", ".so")  # the code, how it is launched, and functions of the host that do so
_PREFIX = "enginehouse-kernels-"  # of a directory, before the number of the process that uses it
_TACTICS = "tactics.json"  # a table of `kernels/tactics.py`, where a builder has measured one
_PLACES = ("extern_libs",)  # of the metadata: paths that say where something was, which nothing reads


def archive_name(compute_capability: str) -> str:
    """What the archive is called that this Triton takes on a GPU of this compute capability, such as "9.0"."""
    return f"kernels-triton-{triton.__version__}-sm{compute_capability.replace('.', '')}.tar"


def pack(cache: Path, table: Table = RULE) -> bytes:
    """A directory that Triton had as its cache, and the table, as an archive: the same kernels give the same bytes."""
    output = io.BytesIO()

    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        archive.addfile(member, io.BytesIO(data))

    with tarfile.open(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(cache.glob("*/*")):
            if path.suffix not in _KEPT or path.name.startswith("__grp__"):
                continue
            data = path.read_bytes()
            if path.suffix == ".json":
                facts = json.loads(data)
                data = json.dumps({**facts, **dict.fromkeys(_PLACES, [])}, sort_keys=True).encode()
            add(archive, f"{path.parent.name}/{path.name}", data)
        if table:
            add(archive, _TACTICS, to_json(table))
    return output.getvalue()


def unpack(data: bytes, directory: Path) -> tuple[int, Table]:
    """Writes an archive's kernels below a directory; how many those are, and the table beside them.

    Raises:
        DataLoss: it is no archive, or holds something else than files of a cache.
    """
    count, table = 0, RULE
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isreg() else None
                if source is not None and member.name == _TACTICS:
                    table = _table(source.read())
                    continue
                if source is None or not _MEMBER.fullmatch(member.name) or not member.name.endswith(_KEPT):
                    raise DataLoss(
                        f"compiled kernels: {member.name!r} is no file of a cache: build the engine again",
                        reason="KERNELS_INVALID",
                    )
                path = directory / member.name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(source.read())
                count += path.suffix == ".cubin"
    except tarfile.TarError as error:
        raise DataLoss(
            f"compiled kernels: no archive ({error}): build the engine again", reason="KERNELS_INVALID"
        ) from None
    return count, table


def _clear() -> None:
    """Removes what workers that were killed have left."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _table(data: bytes) -> Table:
    try:
        return from_json(data)
    except (ValueError, TypeError, IndexError) as error:
        log.warning("the table of tactics is of another release (%s): the rule is used", error)
        return RULE


def adopt(data: bytes) -> tuple[int, Table]:
    """Lets Triton find an archive's kernels, in this process, before its own; how many those are, and the table beside them.

    Its own cache stays what it was: there is what others have not brought.

    Raises:
        DataLoss: see `unpack`.
    """
    _clear()
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    count, table = unpack(data, directory)

    class Carried(CacheManager):  # type: ignore[misc]
        """The archive's files, read only; then the cache that Triton has by itself."""

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            self._arguments = (key, override, dump)
            self._folder = directory / ("" if override or dump else key)

        @cached_property
        def _own(self) -> FileCacheManager:
            return FileCacheManager(*self._arguments)

        def get_file(self, filename: str) -> str | None:
            path = self._folder / filename
            return str(path) if path.is_file() else self._own.get_file(filename)

        def get_group(self, filename: str) -> dict[str, str] | None:
            if (self._folder / filename).is_file():
                return {path.name: str(path) for path in self._folder.iterdir()}
            return self._own.get_group(filename)

        def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
            return str(self._own.put(data, filename, binary))

        def put_group(self, filename: str, group: dict[str, str]) -> str:
            return str(self._own.put_group(filename, group))

    knobs.cache.manager_class = Carried
    return count, table


def adopt_from(store: Store, manifest: Manifest, trust: Trust, compute_capability: str, rank: int = 0) -> Table:
    """Lets Triton find a rank's compiled kernels, if it has any for here and the engine's code may run; else logs why not.

    Returns the table of tactics that is beside them.

    Raises:
        NotFound, DataLoss: the archive is missing or damaged.
    """
    engine, kernels = manifest.engine_id[:12], {file.name: file for file in manifest.ranks[rank].kernels}
    if not kernels:
        return RULE
    if not trust.code:
        log.warning(
            "engine %s has compiled kernels, but nobody says that its code can be trusted: they are compiled again here. To use "
            "them start the executor with --trusted-keys FILE of those who have signed it, or with --trust-native",
            engine,
        )
        return RULE
    wanted = archive_name(compute_capability)
    if wanted not in kernels:
        log.warning("engine %s has %s, and not %s: kernels are compiled here", engine, ", ".join(kernels), wanted)
        return RULE
    count, table = adopt(blobs.read(store, kernels[wanted]))
    log.info("engine %s: %d compiled kernels", engine, count)

    def seen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            log.warning("kernel %s is compiled here: the engine does not have it in this form", metadata["name"])

    knobs.compilation.listener = seen
    return table
