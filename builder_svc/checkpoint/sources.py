"""Where a checkpoint comes from: this machine, the Hugging Face hub, or an upload. The service parses, the build opens."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from builder_svc.build_config import Progress
from builder_svc.checkpoint import uploaded
from engine import checkpoints, pins
from engine.errors import InvalidArgument, NotFound, PermissionDenied
from engine.store import Store

HUB, UPLOAD = "hf://", "upload://"

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB = re.compile(
    rf"(?P<repo>{_NAME}(?:/{_NAME}(?:/(?P<file>(?:[\w.+-]+/)*[\w.+-]+\.gguf))?)?)"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}))?",
    re.ASCII,
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Source(Protocol):
    """Where a checkpoint is. Its text, `str()`, says so; parsed again it gives the same source."""

    def check(self, store: Store) -> None:
        """Raises NotFound if the store is to have it and does not. Asks nobody else."""

    def open(self, store: Store, work_dir: Path | None, progress: Progress, weights: bool = True) -> Path:
        """A directory or GGUF file, downloaded first where it must be.

        Args:
            store: which has what was uploaded.
            work_dir: may be filled and is the caller's to remove; by default the system's temporary directory is used.
            progress: called with phase "download".
            weights: whether they are wanted.
        """


@dataclass(frozen=True)
class LocalSource:
    """A directory or GGUF file of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def check(self, store: Store) -> None:
        """Whoever reads it says what is wrong with it."""

    def open(self, store: Store, work_dir: Path | None, progress: Progress, weights: bool = True) -> Path:  # noqa: ARG002
        return self.path


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub at a branch, tag or commit, or one GGUF file of it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return (
            f"{HUB}{self.repo}"
            + (f"/{self.file}" if self.file else "")
            + (f"@{self.revision}" if self.revision else "")
        )

    def check(self, store: Store) -> None:
        """The hub is asked when the build begins."""

    def open(self, store: Store, work_dir: Path | None, progress: Progress, weights: bool = True) -> Path:  # noqa: ARG002
        from builder_svc.checkpoint import hub  # the service does without what it imports

        return hub.download(self.repo, self.revision, progress, self.file, weights=weights)


@dataclass(frozen=True)
class UploadedSource:
    """A checkpoint that a client has uploaded into the store."""

    checkpoint_id: str

    def __str__(self) -> str:
        return f"{UPLOAD}{self.checkpoint_id}"

    def check(self, store: Store) -> None:
        checkpoints.get(store, self.checkpoint_id)

    def open(self, store: Store, work_dir: Path | None, progress: Progress, weights: bool = True) -> Path:
        named = checkpoints.get(store, self.checkpoint_id)
        pins.hold(store, [file.digest for file in named.files])
        # A garbage collection may have dropped the record, and then the files, until the pin counted: what is still named
        # now is still there.
        return uploaded.download(store, checkpoints.get(store, self.checkpoint_id), work_dir, progress, weights)


def parse(text: str, root: Path | None) -> Source:
    """What a text stands for: a directory or GGUF file, hf://ORG/NAME[/FILE.gguf][@REVISION] or upload://ID.

    Args:
        root: resolved; paths are looked for in it and must not be outside. None takes any path.

    Raises:
        InvalidArgument: none of these forms, or one that is malformed.
        PermissionDenied, NotFound: a path that is not in the root, or not there.
    """
    if text.startswith(HUB):
        found = _HUB.fullmatch(text.removeprefix(HUB))
        repo, revision, file = found.group("repo", "revision", "file") if found else ("", None, None)
        repo = repo.removesuffix(f"/{file}")
        # ".." would lead out of the cache's folder; the others are the hub's own rules
        misplaced = (revision or "").endswith(".gguf")
        if not repo or len(repo) > 96 or ".." in text or "--" in repo or repo.endswith(".git") or misplaced:
            raise InvalidArgument(
                f"checkpoint {text[:200]!r} is no repository of the hub: write hf://ORG/NAME, with /FILE.gguf "
                "for one of its GGUF files, and with @REVISION",
                reason="CHECKPOINT_INVALID",
            )
        return HubSource(repo, revision, file)
    if text.startswith(UPLOAD):
        return UploadedSource(checkpoints.check_id(text.removeprefix(UPLOAD)))
    if _SCHEME.match(text):
        raise InvalidArgument(
            f"checkpoint {text[:200]!r}: give a directory or GGUF file, hf://ORG/NAME[/FILE.gguf][@REVISION], or upload://ID "
            "as an upload gave it",
            reason="CHECKPOINT_INVALID",
        )
    return LocalSource(find_checkpoint(root, text) if root else Path(text))


def is_repository(text: str) -> bool:
    """Whether it looks like ORG/NAME[/FILE.gguf][@REVISION], which may be a path as well."""
    return _HUB.fullmatch(text) is not None and "/" in text.partition("@")[0]


def accept(text: str, root: Path, store: Store) -> str:
    """The text of the source that a client means, as a build is asked for it. Raises what `parse` and `check` raise."""
    source = parse(text, root)
    source.check(store)
    return str(source)


def fetch(text: str, store: Store, work_dir: Path | None, progress: Progress, weights: bool = True) -> Path:
    """The directory or file of what `accept` has accepted, downloaded if need be. Raises the source's own errors."""
    return parse(text, None).open(store, work_dir, progress, weights)


def find_source(checkpoint: str, revision: str | None = None) -> str:
    """What a person means: a path stays one, and what is not there and looks like a repository becomes hf://....

    Raises:
        InvalidArgument: a revision for what is not of the hub, or a second one.
    """
    is_path = checkpoint[:1] in (".", "/", "~") or is_checkpoint(Path(checkpoint))
    source = checkpoint
    if not is_path and is_repository(checkpoint):
        source = HUB + checkpoint
    if revision is None:
        return source
    if not source.startswith(HUB):
        raise InvalidArgument(f"a revision is of a repository of the hub, ORG/NAME: {checkpoint!r} is none")
    if "@" in source:
        raise InvalidArgument(f"revision {revision} and {checkpoint}: give the revision once")
    return f"{source}@{revision}"


def fetch_here(
    place: str | Path,
    revision: str | None = None,
    *,
    weights: bool = True,
    progress: Progress = lambda *_: None,
) -> tuple[Path, str]:
    """The directory or GGUF file that a person means, downloaded if it is a repository of the hub, and its source as a text.

    Raises:
        NotFound: no such directory, file or repository.
        InvalidArgument: what `find_source` and `parse` raise.
        EnginehouseError: what the hub's download raises.
    """
    text = find_source(str(place), revision)
    if text.startswith(HUB):
        from builder_svc.checkpoint import hub

        found = parse(text, None)
        return hub.download(found.repo, found.revision, progress, found.file, weights=weights), text
    path = find_local(text)
    return path, str(path)


def find_local(text: str) -> Path:
    """The directory or GGUF file of this machine that a person means. Raises NotFound."""
    path = Path(text).expanduser()
    if not is_checkpoint(path):
        raise NotFound(
            f"{path} is no directory and no .gguf file; give a checkpoint in Hugging Face layout or in GGUF, or "
            "ORG/NAME of the hub",
            reason="CHECKPOINT_NOT_FOUND",
        )
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether a path may be one: a directory, or a file that is called .gguf."""
    return path.is_dir() or (path.suffix == ".gguf" and path.is_file())


def find_checkpoint(root: Path, checkpoint: str) -> Path:
    """The directory or GGUF file that a client means, its directory without symbolic links.

    Args:
        root: resolved; relative paths are relative to it.

    Raises:
        InvalidArgument: no path at all.
        PermissionDenied: not in the root, whether it exists or not.
        NotFound: no directory or GGUF file there.
    """
    if not checkpoint or "\0" in checkpoint:
        raise InvalidArgument(
            f"checkpoint {checkpoint!r}: give a directory or GGUF file under the builder's checkpoint root"
        )
    path = root / checkpoint
    try:
        inside = path.resolve().is_relative_to(root)
        # a link keeps its name, which the file behind it may not have
        path = path.parent.resolve() / path.name if path.suffix == ".gguf" and path.is_file() else path.resolve()
        found = inside and is_checkpoint(path)
    except (OSError, RuntimeError):  # a name too long, a circle of links
        inside, found = True, False
    if not inside:
        raise PermissionDenied(
            f"checkpoint {checkpoint!r} is outside of {root}, the builder's --checkpoint-root: move it there, or start "
            "the builder with another root",
            reason="CHECKPOINT_OUTSIDE_ROOT",
        )
    if not found:
        raise NotFound(
            f"no directory {checkpoint!r} and no such .gguf file under the builder's checkpoint root {root}",
            reason="CHECKPOINT_NOT_FOUND",
        )
    return path


def find_text(root: Path, path: str) -> Path:
    """The file or directory of text that a client means.

    Args:
        root: as in `find_checkpoint`.

    Raises:
        PermissionDenied: not in the root, whether it exists or not.
        NotFound: nothing there.
    """
    try:
        found = (root / path).resolve()
        inside, there = found.is_relative_to(root), found.exists()
    except (OSError, RuntimeError, ValueError):  # a name too long, a circle of links, a null byte
        found, inside, there = root, True, False
    if not inside:
        raise PermissionDenied(
            f"calib_dataset {path!r} is outside of {root}, the builder's --checkpoint-root: move it there",
            reason="CALIBRATION_OUTSIDE_ROOT",
        )
    if not there:
        raise NotFound(
            f"calib_dataset {path!r}: nothing of that name under the builder's checkpoint root {root}",
            reason="CALIBRATION_NOT_FOUND",
        )
    return found
