"""Which files of a checkpoint count, and the checkpoints that clients have uploaded, in a store.

checkpoints/<id>.json     which files it has; the files are blobs. Garbage collection drops it after a week
"""

import re
from fnmatch import fnmatchcase

import msgspec

from engine.errors import DataLoss, InvalidArgument, NotFound
from engine.manifest import FileRef, engine_id
from engine.store import Store

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
"""Patterns of what a build may read, in the checkpoint's directory itself. No pickles among them."""
NOT_FILES = ("*/*", ".*", "consolidated*.safetensors")
"""What the patterns above would take too: folders, and the same weights once more in another layout (Mistral's)."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Those of them that dummy weights do without."""

_ID = re.compile(r"[0-9a-f]{64}")


class UploadedCheckpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint's files, sorted by name."""

    files: tuple[FileRef, ...]

    @property
    def id(self) -> str:
        """SHA-256 over names and digests: the same files give the same id."""
        return engine_id({file.name: file.digest for file in self.files})


def is_read(name: str, weights: bool = True) -> bool:
    """Whether a build may read the checkpoint's file of this name; one with dummy weights reads no weights."""
    if not weights and any(fnmatchcase(name, pattern) for pattern in WEIGHTS):
        return False
    return any(fnmatchcase(name, pattern) for pattern in FILES) and not any(
        fnmatchcase(name, pattern) for pattern in NOT_FILES
    )


def check_file_name(name: str) -> str:
    """The name itself. Raises InvalidArgument unless it is one of a plain, visible file, without folders."""
    if not name or name[0] == "." or len(name.encode(errors="replace")) > 255 or re.search(r"[/\\\x00-\x1f]", name):
        raise InvalidArgument(
            f"file name {name[:80]!r}: give the name of a file in the checkpoint's directory, without folders, that does "
            "not begin with a dot",
            reason="FILE_NAME_INVALID",
        )
    return name


def put(store: Store, checkpoint: UploadedCheckpoint) -> str:
    """Makes a checkpoint known, whose files are in the store as blobs; its id."""
    store.replace(_key(checkpoint.id), msgspec.json.encode(checkpoint))  # a new time: the week begins again
    return checkpoint.id


def get(store: Store, checkpoint_id: str) -> UploadedCheckpoint:
    """An uploaded checkpoint. Raises InvalidArgument, NotFound and DataLoss."""
    key = _key(checkpoint_id)
    try:
        return msgspec.json.decode(store.read(key), type=UploadedCheckpoint)
    except NotFound:
        raise NotFound(
            f"no uploaded checkpoint {checkpoint_id[:12]} in {store.url}: upload it again",
            reason="CHECKPOINT_NOT_FOUND",
        ) from None
    except msgspec.MsgspecError as error:
        raise DataLoss(
            f"{key} in {store.url} is damaged ({error}): upload it again", reason="CHECKPOINT_INVALID"
        ) from None


def check_id(checkpoint_id: str) -> str:
    """The id itself. Raises InvalidArgument for what is none."""
    if not _ID.fullmatch(checkpoint_id):
        raise InvalidArgument(
            f"checkpoint id {checkpoint_id[:80]!r} is not 64 hexadecimal digits", reason="CHECKPOINT_ID_INVALID"
        )
    return checkpoint_id


def _key(checkpoint_id: str) -> str:
    return f"checkpoints/{check_id(checkpoint_id)}.json"
