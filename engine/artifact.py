"""An engine as a thing that one can hold: where it is, and how it gets from one store into another or into a directory.

An engine directory is a directory store with a config.json beside it, which says which engine is meant:

    config.json            the engine's id, and its facts for people; written last
    engines/ blobs/        as in every store
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from engine import registry
from engine.backends import open_store
from engine.blobs import blob_key, fetch, put_file
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from engine.manifest import FileRef, Manifest
from engine.pins import pinned
from engine.store import Progress, Store

CONFIG = "config.json"


class _Named(msgspec.Struct):
    """The part of an engine directory's config.json that is read."""

    engine_id: str


class Engine:
    """An engine in a store: what `build` gives and `GenerationExecutor` runs.

    Attributes:
        store: where it is.
        manifest: what it is.
        reused: it was in the store already, and nothing was built.
        ours: everything that its manifest names is what the build has made, whoever published it first.

    Example:
        >>> from enginehouse import AutoModelForCausalLM, Engine, build
        >>> build(AutoModelForCausalLM.from_hugging_face("examples/demo-model")).save("demo.engine")
        >>> Engine.from_dir("demo.engine").manifest.model.architecture
        'LlamaForCausalLM'
    """

    def __init__(self, store: Store, manifest: Manifest, *, reused: bool = False, ours: bool = False) -> None:
        """Of an engine that is there."""
        self.store, self.manifest = store, manifest
        self.reused, self.ours = reused, ours

    def __repr__(self) -> str:
        return f"Engine({self.manifest.model.architecture}, {self.engine_id[:12]}, {self.store.url})"

    @property
    def engine_id(self) -> str:
        """SHA-256 of everything that decided it, hexadecimal."""
        return self.manifest.engine_id

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest as it is stored, hexadecimal."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    def save(self, engine_dir: str | Path) -> None:
        """Writes an engine directory; of an engine that was there before, the name and the files go.

        On one file system the files are linked, not copied.

        Args:
            engine_dir: made if it is not there.

        Raises:
            FailedPrecondition: the directory holds something else, whose config.json would be overwritten.
            NotFound, DataLoss: a file of the engine is missing or damaged where it is.
            ResourceExhausted, PermissionDenied, Unavailable: the disk, or the store.
        """
        root = Path(engine_dir).expanduser()
        before = _engine_id(root)
        if before is None and ((root / CONFIG).exists() or _foreign(root)):
            raise FailedPrecondition(
                f"{root} holds another program's {CONFIG} or engine: choose another directory",
                reason="OUTPUT_OCCUPIED",
            )
        store = DirectoryStore(root)
        copy(self, store)
        half = root / f".{CONFIG}.half"
        half.write_bytes(msgspec.json.format(msgspec.json.encode(_facts(self.manifest)), indent=2) + b"\n")
        half.replace(root / CONFIG)
        if before not in (None, self.engine_id):
            _drop(store, str(before))

    @staticmethod
    def from_dir(engine_dir: str | Path, rank: int = 0) -> "Engine":
        """What `save` has written, or the only engine of a directory store. Reads no weights.

        Args:
            rank: one of the engine's. The directory has the parts of all, and so has the result.

        Raises:
            NotFound: no engine there.
            InvalidArgument: a store of several engines, or no such rank.
            Unimplemented: an engine of TensorRT-LLM.
            DataLoss: its manifest is damaged.
        """
        root = Path(engine_dir).expanduser()
        if _foreign(root):
            raise Unimplemented(
                f"{root} is an engine of TensorRT-LLM, which runs nowhere but there: build it again from its checkpoint",
                reason="ENGINE_FOREIGN",
            )
        if not (root / "engines").is_dir():
            raise NotFound(f"{root} is no engine directory: give one that Engine.save wrote", reason="ENGINE_NOT_FOUND")
        store = DirectoryStore(root)
        ids = [found] if (found := _engine_id(root)) else registry.engine_ids(store)
        if len(ids) != 1:
            listed = f"holds {len(ids)} engines, {', '.join(one[:12] for one in ids)}" if ids else "holds no engine"
            raise InvalidArgument(
                f"{root} {listed}: give an engine directory, or the name of an engine with store={str(root)!r}",
                reason="ENGINE_AMBIGUOUS",
            )
        manifest = registry.manifest(store, ids[0])
        if not 0 <= rank < len(manifest.ranks):
            raise InvalidArgument(
                f"{root}: rank {rank}, but the last of {len(manifest.ranks)} ranks is {len(manifest.ranks) - 1}",
                reason="MAPPING_INVALID",
            )
        return Engine(store, manifest)

    def push(
        self, store: Store | str, name: str | None = None, progress: Callable[[int, int], object] = lambda *_: None
    ) -> str:
        """Puts the engine, with its signatures, into another store. What is there already is not sent again.

        Args:
            store: a store or its URL: a directory, s3://BUCKET/PREFIX.
            name: given to it there.
            progress: called with (bytes done, bytes in all).

        Returns:
            The engine's id.

        Raises:
            InvalidArgument: no store's URL, or no name.
            NotFound, DataLoss: a file of the engine is missing or damaged where it is.
            ResourceExhausted, PermissionDenied, Unavailable: the store.
        """
        if name is not None:
            registry.check_name(name)
        target = open_store(store) if isinstance(store, str) else store
        copy(self, target, progress)
        if name is not None:
            registry.set_name(target, name, self.engine_id)
        return self.engine_id


def is_engine_dir(path: Path) -> bool:
    """Whether `Engine.from_dir` is the one to read a directory, or to say why it cannot."""
    return (path / "engines").is_dir() or _foreign(path)


def _foreign(path: Path) -> bool:
    """Whether TensorRT-LLM has written an engine there."""
    return path.is_dir() and any(path.glob("*rank*.engine"))


def copy(engine: Engine, target: Store, progress: Callable[[int, int], object] = lambda *_: None) -> None:
    """Brings an engine into another store: files, manifest and signatures. Raises what `Engine.push` raises."""
    manifest = engine.manifest
    files = {file.digest: file for file in manifest.files()}
    done, total = 0, sum(file.size for file in files.values())
    with pinned(target, files) as pin:
        for file in files.values():

            def arrived(count: int, _: int, before: int = done) -> None:
                pin.refresh()
                progress(before + count, total)

            _copy_file(engine.store, target, file, arrived)
            done += file.size
        published = registry.publish(target, manifest)
    progress(total, total)
    if published == manifest:  # signatures are over its very bytes
        for entry in engine.store.list(f"signatures/{manifest.engine_id}/"):
            target.create(entry.key, engine.store.read(entry.key))


def _copy_file(source: Store, target: Store, file: FileRef, progress: Progress) -> None:
    key = blob_key(file.digest)
    if target.size(key) == file.size:
        return
    if isinstance(source, DirectoryStore):
        if not (isinstance(target, DirectoryStore) and target.link(key, source.file(key))):
            put_file(target, file, source.file(key), progress)
        return
    near = target.root if isinstance(target, DirectoryStore) else None
    with TemporaryDirectory(prefix=".enginehouse-", dir=near) as directory:
        local = Path(directory) / file.digest
        fetch(source, [(file, local)], "build the engine again")
        put_file(target, file, local, progress, move=True)


def _engine_id(root: Path) -> str | None:
    """Of an engine directory's config.json; None where there is none of ours."""
    try:
        return msgspec.json.decode((root / CONFIG).read_bytes(), type=_Named).engine_id
    except (OSError, msgspec.MsgspecError):
        return None


def _facts(manifest: Manifest) -> dict[str, object]:
    """In the layout of TensorRT-LLM's config.json."""
    model = msgspec.to_builtins(manifest.model)
    return {
        "version": version("enginehouse"),
        "engine_id": manifest.engine_id,
        "pretrained_config": {
            **model,
            "mapping": msgspec.to_builtins(manifest.mapping),
            "quantization": manifest.quantization,
        },
        "build_config": {
            **msgspec.to_builtins(manifest.limits),
            "device": manifest.fingerprint.device,
            "compute_capability": manifest.fingerprint.compute_capability,
        },
    }


def _drop(store: DirectoryStore, engine_id: str) -> None:
    """Removes an engine and the files that no other one has from an engine directory, unless it has a name there."""
    old = registry.find_manifest(store, engine_id)
    if old is None or engine_id in {record.engine_id for record in registry.named(store)}:
        return
    store.delete(registry.manifest_key(engine_id))
    kept = {file.digest for other in registry.engine_ids(store) for file in registry.manifest(store, other).files()}
    for file in old.files():
        if file.digest not in kept:
            store.delete(blob_key(file.digest))
    for entry in store.list(f"signatures/{engine_id}/"):
        store.delete(entry.key)
