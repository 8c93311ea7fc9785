"""Brings an uploaded checkpoint from the store into a directory."""

import errno
import tempfile
import threading
from pathlib import Path

from builder_svc.build_config import Progress
from engine import blobs
from engine.checkpoints import UploadedCheckpoint, check_file_name, is_setting
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, ResourceExhausted
from engine.manifest import CHUNK_SIZE, FileRef
from engine.store import Store


def download(
    store: Store, checkpoint: UploadedCheckpoint, work_dir: Path | None, progress: Progress, weights: bool = True
) -> Path:
    """Writes all files, or all but weights, into a new directory, chunks in parallel and each verified; memory stays at 32 MiB.

    Raises:
        NotFound: a file is not in the store any more.
        DataLoss: a file or the record of the checkpoint is damaged.
        ResourceExhausted: the disk is full.
    """
    for ref in checkpoint.files:
        _check(ref)
    beside = [ref for ref in checkpoint.files if is_setting(ref.name)]
    whole = weights or all(ref.name != "config.json" for ref in beside)  # a GGUF file holds its config
    wanted = checkpoint.files if whole else beside
    total, done, lock = sum(ref.size for ref in wanted), 0, threading.Lock()

    def arrived(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress("download", done, total, "bytes")

    try:
        directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=work_dir))
        blobs.fetch(store, [(ref, directory / ref.name) for ref in wanted], "upload the checkpoint again", arrived)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"the work directory is full while {total} bytes of an uploaded checkpoint are downloaded: free some space "
                "or choose another --work-dir",
                reason="WORK_DIR_FULL",
            ) from None
        raise FailedPrecondition(
            f"an uploaded checkpoint cannot be downloaded: {error}; choose another --work-dir",
            reason="WORK_DIR_UNUSABLE",
        ) from None
    return directory


def _check(ref: FileRef) -> None:
    """The record decides which files are written: it must not lead out of the directory or leave bytes unverified."""
    try:
        check_file_name(ref.name)
        sound = len(ref.chunks) == max(1, -(-ref.size // CHUNK_SIZE))
    except InvalidArgument:
        sound = False
    if not sound:
        raise DataLoss(
            f"the uploaded checkpoint's file {ref.name[:80]!r} is described wrongly in the store: upload it again",
            reason="CHECKPOINT_INVALID",
        )
