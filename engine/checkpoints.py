"""Checkpoints that clients have uploaded, in a store.

checkpoints/<id>.json     which files it has, create-only; the files are blobs. Garbage collection drops it after a week
"""

import re

import msgspec

from engine.errors import DataLoss, InvalidArgument, NotFound
from engine.manifest import FileRef, engine_id
from engine.store import Store

_ID = re.compile(r"[0-9a-f]{64}")


class UploadedCheckpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint's files, sorted by name."""

    files: tuple[FileRef, ...]

    @property
    def id(self) -> str:
        """SHA-256 over names and digests: the same files give the same id."""
        return engine_id({file.name: file.digest for file in self.files})


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


def _key(checkpoint_id: str) -> str:
    if not _ID.fullmatch(checkpoint_id):
        raise InvalidArgument(
            f"checkpoint id {checkpoint_id!r} is not 64 hexadecimal digits", reason="CHECKPOINT_ID_INVALID"
        )
    return f"checkpoints/{checkpoint_id}.json"
