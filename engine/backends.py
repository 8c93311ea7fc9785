"""Which store a URL stands for."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.directory import DirectoryStore
from engine.errors import InvalidArgument
from engine.store import Store


def open_store(url: str) -> Store:
    """The store at a path or a file:// URL. Raises InvalidArgument for another scheme."""
    parts = urlsplit(url)
    if parts.scheme == "" and url:
        return DirectoryStore(Path(url).expanduser())
    if parts.scheme == "file" and parts.path and parts.netloc in ("", "localhost"):
        return DirectoryStore(Path(unquote(parts.path)))
    raise InvalidArgument(f"{url!r} is no store: give a directory or file:///directory", reason="STORE_URL_INVALID")
