"""A checkpoint's way to a builder: what is there already is not sent, and what breaks off goes on where it was."""

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from engine.checkpoints import choose_files, gguf_parts, is_setting
from engine.errors import DataLoss, EnginehouseError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from protos.v1.builder_pb2 import CheckpointFile, OfferCheckpointResponse, UploadFileHeader

Progress = Callable[[str, int, int, str], None]
"""Called with (step, done, total, unit): the steps are "hash" and "send", the unit is "bytes"."""

MESSAGE_SIZE = 1024 * 1024  # bytes of a file in one message
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0)  # seconds before each further attempt; they begin anew after progress
PATIENCE = 600.0  # seconds that another client's upload of the same file may take without progress that we see

_READ_SIZE = 4 * 1024 * 1024
_IN_PROGRESS = "UPLOAD_IN_PROGRESS"
_TRANSIENT = (_IN_PROGRESS, "UPLOAD_OFFSET", "UPLOAD_INCOMPLETE")
_TRANSIENT_CODES = (1, Unavailable.code, DataLoss.code)  # 1, CANCELLED, comes of a builder that stops


@dataclass(frozen=True)
class LocalFile:
    """A file as it was when it was hashed; `version` is another one when it has been changed since."""

    path: Path
    size: int
    digest: str
    version: tuple[int, ...]


class Receiver(Protocol):
    """What takes a checkpoint: a client of a builder.

    Attributes:
        address: host:port.
    """

    address: str

    async def offer(self, files: Sequence[CheckpointFile]) -> OfferCheckpointResponse:
        """Says what a checkpoint consists of; the answer, what of it is missing."""

    async def send_file(self, header: UploadFileHeader, parts: AsyncIterator[bytes]) -> None:
        """Sends a file's bytes from the header's offset on."""


async def upload(builder: Receiver, path: Path, progress: Progress, weights: bool = True) -> str:
    """Brings what a build reads of a checkpoint directory or GGUF file to a builder; gives BuildSpec.checkpoint for it.

    Goes on after a connection that broke, and where an earlier call, of whatever process, has ended.

    Args:
        weights: send them, too; a build with dummy weights does without.

    Raises:
        NotFound, InvalidArgument: nothing there, or no checkpoint in it, or several.
        FailedPrecondition: a file was changed meanwhile.
        EnginehouseError: the builder's own error; Unavailable when it cannot be reached, or stays away.
    """
    files = await hash_files(find_files(path, weights), progress)
    offered = [CheckpointFile(name=file.path.name, size=file.size, sha256=file.digest) for file in files]
    by_digest = {file.digest: file for file in files}
    total = sum(file.size for file in by_digest.values())
    most = -1  # bytes that the builder has had at an offer
    delays, patience = iter(DELAYS), 0.0

    def report(before: int, sent: int) -> None:
        progress("send", before + sent, total, "bytes")

    while True:
        problem: EnginehouseError | None = None
        progressed = False
        try:
            offer = await builder.offer(offered)
            missing = [(by_digest[entry.sha256], entry.offset) for entry in offer.missing]
            done = total - sum(file.size - offset for file, offset in missing)
            progress("send", done, total, "bytes")
            if not missing:
                return offer.checkpoint
            if progressed := done > most:
                most, delays, patience = done, iter(DELAYS), time.monotonic() + PATIENCE
            for file, offset in missing:
                try:
                    await _send(builder, file, offset, partial(report, done))
                    done += file.size - offset
                except FailedPrecondition as error:
                    if error.reason != _IN_PROGRESS:
                        raise
                    problem = error  # somebody else sends it: the others first
        except EnginehouseError as error:
            if most < 0 or (error.code not in _TRANSIENT_CODES and error.reason not in _TRANSIENT):
                raise
            problem = error
        if problem or not progressed:
            delay = next(delays, None)
            if delay is None and problem and problem.reason == _IN_PROGRESS and time.monotonic() < patience:
                delay = DELAYS[-1]
            if delay is None:
                raise problem or Unavailable(
                    f"the builder at {builder.address} loses files of {path} that it has taken",
                    reason="UPLOAD_LOST",
                )
            await asyncio.sleep(delay)


def find_files(path: Path, weights: bool = True) -> list[Path]:
    """What a build reads of a directory, with its weights or without, or of a GGUF file. Raises NotFound and InvalidArgument."""
    if path.is_dir():
        try:
            names = choose_files((file.name for file in path.iterdir() if file.is_file()), weights)
        except InvalidArgument as error:
            raise InvalidArgument(f"{path}: {error.message}", reason=error.reason) from None
        return [path / name for name in names if weights or is_setting(name)]
    parts = [path.with_name(name) for name in gguf_parts(path.name)]
    if path.suffix != ".gguf" or not all(part.is_file() for part in parts):
        missing = next((part for part in parts if not part.is_file()), path)
        raise NotFound(
            f"{missing} is no directory and no .gguf file; give a checkpoint in Hugging Face layout or in GGUF",
            reason="CHECKPOINT_NOT_FOUND",
        )
    return parts


async def hash_files(paths: list[Path], progress: Progress = lambda *_: None) -> list[LocalFile]:
    """Describes files, several at a time on threads. Raises FailedPrecondition when one is changed meanwhile."""
    loop = asyncio.get_running_loop()
    total, done = sum(path.stat().st_size for path in paths), 0
    stopped = threading.Event()

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress("hash", done, total, "bytes")

    def describe(path: Path) -> LocalFile:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            version = _version(file)
            while (data := file.read(_READ_SIZE)) and not stopped.is_set():
                digest.update(data)
                loop.call_soon_threadsafe(count, len(data))
            if _version(file) != version:
                raise _changed(path)
        return LocalFile(path, version[0], digest.hexdigest(), version)

    with ThreadPoolExecutor(os.cpu_count(), "hash") as pool:
        try:
            return list(await asyncio.gather(*(loop.run_in_executor(pool, describe, path) for path in paths)))
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


async def _send(builder: Receiver, file: LocalFile, offset: int, progress: Callable[[int], None]) -> None:
    """Sends a file's bytes from `offset` on; `progress` is called with the bytes sent so far."""
    header = UploadFileHeader(sha256=file.digest, size=file.size, offset=offset)
    async with aclosing(_parts(file, offset, progress)) as parts:
        await builder.send_file(header, parts)


async def _parts(file: LocalFile, offset: int, progress: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    with file.path.open("rb", buffering=0) as opened:
        opened.seek(offset)
        sent = 0
        while data := await asyncio.to_thread(opened.read, MESSAGE_SIZE):
            yield data
            sent += len(data)
            progress(sent)
        if _version(opened) != file.version:  # before the end is said: the builder could only find a wrong digest
            raise _changed(file.path)


def _version(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns


def _changed(path: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} was changed while it was uploaded: try again when it is as it should be", reason="FILE_CHANGED"
    )
