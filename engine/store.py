"""Where engines live: keys and bytes, in a directory or (through the same few verbs) an S3 bucket.

Everything the project keeps goes through `Store`. Keys are relative POSIX paths. `engine/registry.py` knows what they mean.
"""

import abc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.errors import InvalidArgument

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as a transfer goes on."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]*(/[A-Za-z0-9][A-Za-z0-9._@+-]*)*")


class Entry(NamedTuple):
    """An object as a listing shows it.

    Attributes:
        key: its address.
        size: bytes.
        modified: seconds since the epoch by the store's clock, which need not be this machine's.
    """

    key: str
    size: int
    modified: float


class Store(abc.ABC):
    """Ten verbs over keys; safe to use from several threads and processes.

    Each raises `Unavailable` when the store cannot be reached, `PermissionDenied` when it refuses and `ResourceExhausted`
    when it is full.
    """

    url: str

    @abc.abstractmethod
    def read(self, key: str) -> bytes:
        """A small object, whole. Raises NotFound."""

    @abc.abstractmethod
    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `offset` on. Raises NotFound, and DataLoss when the object ends before."""

    def read_ahead(self, key: str, offset: int, size: int) -> bool:  # noqa: ARG002
        """Has this machine's main memory keep a part of an object for who reads it next; False where it keeps nothing."""
        return False

    @abc.abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object, or None if there is none."""

    @abc.abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Writes a small object unless there is one: of several writers exactly one gets True. All or nothing."""

    @abc.abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Writes a small object over what may be there. All or nothing."""

    @abc.abstractmethod
    def upload(self, key: str, path: Path, progress: Progress | None = None, *, move: bool = False) -> None:
        """Writes a large object that nobody sees before it is whole.

        Args:
            move: the file is not needed any more, and may become the object.

        For immutable content: where an object of the file's size exists nothing is done (one of another size is damaged and
        replaced), and what an interrupted upload of the same file left is not sent again.
        """

    @abc.abstractmethod
    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects whose keys begin with `prefix` (whole path components ending in "/", or empty for all), sorted by key.

        What is no valid key is not listed.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; no error if there is none."""

    @abc.abstractmethod
    def discard_partial(self, age: float) -> int:
        """Removes what interrupted uploads have left, unless something was added to it in the last `age` seconds.

        An upload that runs is left alone, or begins again. Returns how many uploads that were.
        """


def is_key(text: str) -> bool:
    """Whether it could be a key: nothing that leaves the store, or that some backend cannot hold."""
    return _KEY.fullmatch(text) is not None and ".." not in text


def check_key(key: str) -> str:
    """The key itself. Raises InvalidArgument for what is none."""
    if not is_key(key):
        raise InvalidArgument(
            f"{key!r} is no valid key: use letters, digits and . _ @ + - between slashes", reason="KEY_INVALID"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself. Raises InvalidArgument unless it is empty or whole path components that end in "/"."""
    if prefix and not prefix.endswith("/"):
        raise InvalidArgument(f"{prefix!r} is no valid prefix: end it with /", reason="KEY_INVALID")
    if prefix:
        check_key(prefix[:-1])
    return prefix
