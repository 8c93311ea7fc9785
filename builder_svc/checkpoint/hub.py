"""Checkpoints of the Hugging Face hub, through huggingface_hub into its own cache.

That library's settings hold: HF_HOME, HF_TOKEN or a saved login, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import errno
import glob
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, snapshot_download
from tqdm import tqdm

from builder_svc.build_config import Progress
from engine.checkpoints import NOT_FILES, SETTINGS, WEIGHTS, choose_files, gguf_models, gguf_parts, is_setting
from engine.errors import (
    EnginehouseError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

DELAYS = (2.0, 8.0)  # seconds before each further attempt; the library repeats single requests by itself

_QUERY = re.compile(r"\?[^\s\"'<>]+")  # also of a path without a host, as some libraries name it

log = logging.getLogger(__name__)


def download(
    repo: str, revision: str | None, progress: Progress, file: str | None = None, *, weights: bool = True
) -> Path:
    """The directory of a repository's snapshot, with what a build reads; files that are in the cache are not loaded again.

    Where the hub cannot be reached, a whole snapshot in the cache will do.

    Args:
        file: a GGUF file of the repository, whose path is then given; all its parts are loaded, and nothing else.
        weights: without, the files beside them are enough; whether weights are in the directory is then left to chance.

    Raises:
        NotFound: no such repository, revision or file.
        InvalidArgument: no checkpoint in it, or several.
        PermissionDenied: gated or private, and no token that may read it.
        FailedPrecondition: not in the cache while HF_HUB_OFFLINE is set, or no cache that can be written.
        ResourceExhausted: the disk of the cache is full.
        Unavailable: the hub cannot be reached or fails, also after some attempts.
    """
    for logger in (logging.getLogger(), logging.getLogger("huggingface_hub")):
        for handler in logger.handlers:
            handler.addFilter(hide_queries)  # a no-op the second time
    name = f"{repo}@{revision}" if revision else repo
    bytes_done = _Bytes(progress)
    delays = iter(DELAYS)
    while True:
        try:
            path = _snapshot(repo, revision, file, weights, bytes_done.bars())
        except EnginehouseError:
            raise
        except Exception as error:
            known = explain(error, repo, name)
            delay = next(delays, None) if isinstance(known, Unavailable) else None
            if delay is None:
                raise known from error
            log.warning("%s; trying again in %.0f s", known.message, delay)
            time.sleep(delay)
        else:
            bytes_done.end()
            return path


def _snapshot(repo: str, revision: str | None, file: str | None, weights: bool, bars: type[Any]) -> Path:
    try:
        info = HfApi().model_info(repo, revision=revision or constants.DEFAULT_REVISION)
        names = [file.rfilename for file in info.siblings or []]
    except Exception as error:
        if not isinstance(explain(error, repo, repo), (Unavailable, FailedPrecondition)):
            raise
        path = _cached(repo, revision, file, weights)
        if path is None:
            raise
        return path
    chosen = [glob.escape(name) for name in _choose(repo, names, file, weights)]
    path = Path(snapshot_download(repo, revision=revision, allow_patterns=chosen, tqdm_class=bars))
    return path / file if file else path


def _cached(repo: str, revision: str | None, file: str | None, weights: bool) -> Path | None:
    """What is in the cache as a whole, of the first format that is."""
    formats = [gguf_parts(file)] if file else [[*SETTINGS, pattern] for pattern in WEIGHTS]
    if not weights and not file:
        formats.insert(0, [*SETTINGS, "config.json"])
    for patterns in formats:
        try:
            path = Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=None if file else list(NOT_FILES),
                    local_files_only=True,
                )
            )
        except errors.LocalEntryNotFoundError:
            continue
        if any(path.glob(patterns[-1])):
            return path / file if file else path
    return None


def _choose(repo: str, names: list[str], file: str | None, weights: bool) -> list[str]:
    """Which files of a repository are downloaded."""
    models = gguf_models(names)
    if file:
        if file not in names:
            there = f"its GGUF files are {', '.join(models)}" if models else "it has no GGUF files"
            raise NotFound(f"{repo} has no file {file!r}: {there}", reason="FILE_NOT_FOUND")
        return gguf_parts(file)
    try:
        chosen = choose_files(names, weights)
        return chosen if weights or "config.json" not in chosen else list(filter(is_setting, chosen))
    except InvalidArgument as error:
        hint = ""
        if models:
            named = "\n  ".join(f"hf://{repo}/{model}" for model in models)
            hint = f". Of the GGUF files, name one (before an @REVISION):\n  {named}"
        raise InvalidArgument(f"{repo}: {error.message}{hint}", reason=error.reason) from None


def without_queries(text: str) -> str:
    """A text whose URLs have lost what follows their "?".

    The hub redirects to addresses that are signed there: whoever has one reads the file, also of a private repository. What
    a build says and prints stays in its job's record.
    """
    return _QUERY.sub("", text)


def hide_queries(record: logging.LogRecord) -> bool:
    """The same for what libraries print, as a filter of a handler: they name the address of each request."""
    record.msg, record.args = without_queries(record.getMessage()), None
    return True


def explain(error: Exception, repo: str, name: str) -> EnginehouseError:
    """What went wrong, in words and with a status.

    Args:
        repo: ORG/NAME.
        name: the same with the revision, as the caller wrote it.
    """
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either" is only half of the story
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FailedPrecondition(
            f"{name} is not (or not as a whole) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
            "download it: unset HF_HUB_OFFLINE, or fill the cache",
            reason="HUB_OFFLINE",
        )
    if isinstance(error, errors.HFValidationError):
        return InvalidArgument(
            f"{name} is no repository of the hub: {without_queries(str(error))}", reason="CHECKPOINT_INVALID"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, repo, name)
    text = without_queries(f"{type(error).__name__}: {error}")
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
        return ResourceExhausted(
            f"the disk of the hub's cache {constants.HF_HUB_CACHE} is full while {name} is downloaded: free some space, "
            "or put the cache elsewhere with HF_HOME",
            reason="HUB_CACHE_FULL",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return FailedPrecondition(
            f"the hub's cache {constants.HF_HUB_CACHE} cannot be written ({without_queries(str(error))}): put it elsewhere "
            "with HF_HOME",
            reason="HUB_CACHE_UNUSABLE",
        )
    return Unavailable(f"{name} cannot be downloaded from {constants.ENDPOINT}: {text[:500]}", reason="HUB_UNAVAILABLE")


def _explain_status(error: errors.HfHubHTTPError, repo: str, name: str) -> EnginehouseError:
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return PermissionDenied(
            f"{repo} is gated: accept its license at {constants.ENDPOINT}/{repo}, and set HF_TOKEN where it is built to a "
            "token of that account",
            reason="REPOSITORY_GATED",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(
            f"{repo} has no revision {name.partition('@')[2] or 'main'!r}: give one of its branches, tags or commits",
            reason="REVISION_NOT_FOUND",
        )
    if status == 403 or isinstance(error, errors.DisabledRepoError):
        return PermissionDenied(
            f"{constants.ENDPOINT} refuses {repo}: set HF_TOKEN where it is built to a token that may read it",
            reason="REPOSITORY_DENIED",
        )
    if status == 404 or isinstance(
        error, errors.RepositoryNotFoundError
    ):  # the hub tells strangers 401 of what is private
        return NotFound(
            f"no repository {repo!r} on {constants.ENDPOINT}, or it is private: look at its name, or set HF_TOKEN where it "
            "is built to a token that may read it",
            reason="REPOSITORY_NOT_FOUND",
        )
    if status == 401:
        return PermissionDenied(
            f"{constants.ENDPOINT} does not accept the token for {repo}: set HF_TOKEN where it is built to a valid one",
            reason="HUB_TOKEN_INVALID",
        )
    return Unavailable(f"{name}: {constants.ENDPOINT} answers with status {status}", reason="HUB_UNAVAILABLE")


class _Bytes:
    """Sums up the bars that huggingface_hub would show: bytes received and bytes written, of the same files."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0

    def bars(self) -> type[Any]:
        """A class for `tqdm_class`; the totals of its bars rise while files are found."""
        reports = self
        shown: list[Any] = []

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **{**options, "disable": True})
                self._counts_bytes = options.get("unit") == "B"
                if self._counts_bytes:
                    shown.append(self)

            def update(self, n: float | None = 1) -> None:
                with reports._lock:
                    self.n += n or 0
                    if self._counts_bytes:
                        reports._report(shown)

        return Bar

    def _report(self, shown: list[Any]) -> None:
        totals = [int(bar.total) for bar in shown if bar.total]
        self._total = max(self._total, min(totals, default=0))
        self._done = max(self._done, int(max(bar.n for bar in shown)))
        # It is at its end when all files are there, and not when those are that have begun.
        self._progress("download", min(self._done, max(self._total - 1, 0)), self._total, "bytes")

    def end(self) -> None:
        """All is there."""
        if self._total:
            self._progress("download", self._total, self._total, "bytes")
        else:
            self._progress("download", 1, 1, "")
