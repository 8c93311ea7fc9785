"""SHA-256 of checkpoint files, remembered by what tells a file from its next version: inode, size and times of change."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_KEPT = 10_000  # digests, the newest


def cache_path() -> Path:
    """$XDG_CACHE_HOME/enginehouse/digests.json, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enginehouse" / "digests.json"


def file_digests(
    paths: list[Path], progress: Callable[[int, int], None] = lambda *_: None, cache: Path | None = None
) -> dict[str, str]:
    """File name -> SHA-256, hexadecimal. Files are hashed in parallel, and only those that changed since the last call."""
    cache = cache or cache_path()
    known = load_cache(cache)
    total, done = sum(path.stat().st_size for path in paths), 0
    found: dict[str, str] = {}

    def digest(path: Path) -> tuple[str, str]:
        key = signature(path)
        return key, known.get(key) or _sha256(path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, (key, value) in zip(paths, pool.map(digest, paths), strict=True):
            known[key] = found[path.name] = value
            done += path.stat().st_size
            progress(done, total)
    save_cache(cache, known)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signature(path: Path) -> str:
    """What changes when a file does."""
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def load_cache(cache: Path) -> dict[str, str]:
    """What was kept; empty if nothing can be read."""
    try:
        value = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def save_cache(cache: Path, known: dict[str, str]) -> None:
    """Best effort: a lost cache costs time only."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            json.dump(dict(list(known.items())[-_KEPT:]), file)
        Path(file.name).replace(cache)
    except OSError:
        return
