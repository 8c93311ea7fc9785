"""Which store a URL stands for."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.directory import DirectoryStore
from engine.errors import InvalidArgument
from engine.store import Store

PATIENCE = 10.0  # seconds: somebody waits for the answer
TRANSFER_PATIENCE = 60.0  # of builds and loads, which would lose minutes of work


def open_store(url: str, patience: float = PATIENCE) -> Store:
    """The store at a path, a file:// URL or s3://bucket/prefix (see `engine.s3.S3Store`).

    Args:
        url: as above.
        patience: seconds that each operation goes on trying while the store cannot be reached; a directory does not wait.

    Raises:
        InvalidArgument: the URL cannot be right.
    """
    parts = urlsplit(url)
    if parts.scheme == "" and url:
        return DirectoryStore(Path(url).expanduser())
    if parts.scheme == "file" and parts.path and parts.netloc in ("", "localhost"):
        return DirectoryStore(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        from engine.s3 import S3Store  # here, so that who has no such store does not wait for its client

        return S3Store(url, patience)
    raise InvalidArgument(
        f"{url!r} is no store: give a directory, file:///directory or s3://bucket/prefix", reason="STORE_URL_INVALID"
    )
