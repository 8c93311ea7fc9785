"""Weights on their way from the store into a device's memory: chunks in parallel, each verified before it goes to its place."""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine import blobs, manifest
from engine.errors import DataLoss
from engine.manifest import FileRef
from engine.store import Store

_TURN = 1e-4  # seconds a thread that computes keeps others waiting: each chunk needs the interpreter some ten times
_SPARE = 2  # buffers beside those that are read into, whose bytes are on their way to the device

_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32, "I64": torch.int64,
    "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


class Arrival:
    """Files of weights that are being read into memory of a device, which is all allocated from the beginning.

    Threads read chunks into a few buffers of main memory, verify them there and copy them to their places; to a GPU from pinned
    memory, on a stream of its own, so that it computes meanwhile. Main memory holds some 320 MiB, whatever the weights' size.

    A context: leaving it waits until all is there, and raises what reading has raised; leaving it with an error stops reading.

    Args:
        files: in safetensors.
        device: a device of torch.
        arrived: called with the bytes of each chunk that has arrived, from several threads. What it raises ends the reading.

    Raises (`tensors`, and leaving the context):
        NotFound: a blob is missing.
        DataLoss: a chunk does not match its digest or ends early; no tensor may be used then.
    """

    def __init__(
        self, store: Store, files: Sequence[FileRef], device: str, arrived: Callable[[int], None] = lambda _: None
    ) -> None:
        self._store, self._files, self._arrived = store, files, arrived
        gpu = device == "cuda"
        self._stream = torch.cuda.Stream() if gpu else None
        self._places = [torch.empty(file.size, dtype=torch.uint8, device=device) for file in files]
        # Each buffer with what tells that its last chunk has left it.
        self._ring: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        most = min(manifest.CHUNK_SIZE, max((file.size for file in files), default=0))
        for _ in range(blobs.PARALLEL_READS + _SPARE):
            buffer = torch.empty(most, dtype=torch.uint8, pin_memory=gpu)
            self._ring.put((buffer, torch.cuda.Event(blocking=True) if gpu else None))
        self._stopped, self._turn = False, sys.getswitchinterval()
        sys.setswitchinterval(_TURN)
        self._pool = ThreadPoolExecutor(blobs.PARALLEL_READS, "weights")
        # The beginnings first: without their headers nobody knows where a tensor will be.
        self._heads = [self._pool.submit(self._head, number) for number in range(len(files))]
        self._rest = [
            self._pool.submit(self._chunk, number, index)
            for number, file in enumerate(files)
            for index in range(1, len(file.chunks))
        ]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all files by name, where they will be; waits for the files' beginnings."""
        found: dict[str, Tensor] = {}
        for head, place in zip(self._heads, self._places, strict=True):
            found |= views(head.result(), place)
        return found

    def __enter__(self) -> "Arrival":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                done, _ = wait([*self._heads, *self._rest], return_when=FIRST_EXCEPTION)
                for read in done:
                    read.result()
        finally:
            self._stopped = True
            sys.setswitchinterval(self._turn)
            self._pool.shutdown(cancel_futures=True)
            if self._stream:
                self._stream.synchronize()

    def _head(self, number: int) -> bytes:
        """Reads a file's first chunk; its header, with the 8 bytes of its length."""
        beginning = b""

        def keep(part: Tensor) -> None:
            nonlocal beginning
            size = 8 + int.from_bytes(part[:8].numpy().tobytes(), "little")
            beginning = part[:size].numpy().tobytes() if size <= len(part) else b""

        self._chunk(number, 0, keep)
        if not beginning and not self._stopped:
            raise DataLoss(
                f"{self._files[number].name} has no safetensors header in its first chunk: build the engine again",
                reason="WEIGHTS_INVALID",
            )
        return beginning

    def _chunk(self, number: int, index: int, keep: Callable[[Tensor], None] = lambda _: None) -> None:
        """Reads and verifies a chunk, and sends it to its place; `keep` sees it in main memory."""
        if self._stopped:
            return
        file, begin = self._files[number], index * manifest.CHUNK_SIZE
        buffer, left = self._ring.get()
        try:
            if left:
                left.synchronize()
            part = buffer[: min(manifest.CHUNK_SIZE, file.size - begin)]
            if not blobs.read_chunk(self._store, file, index, memoryview(part.numpy())):
                raise blobs.damaged(self._store, file, index, "build the engine again")
            keep(part)
            place = self._places[number][begin : begin + len(part)]
            with torch.cuda.stream(self._stream):  # of None: no stream
                place.copy_(part, non_blocking=True)
                if left:
                    left.record()
        finally:
            self._ring.put((buffer, left))
        self._arrived(len(part))


def views(header: bytes | memoryview, data: Tensor) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Args:
        header: the file's beginning, at least to the header's end.
        data: uint8, the whole file; views of it are returned.
    """
    start = 8 + int.from_bytes(header[:8], "little")
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(_DTYPES[entry["dtype"]])
        .view(entry["shape"])
        for name, entry in json.loads(bytes(header[8:start])).items()
        if name != "__metadata__"
    }
