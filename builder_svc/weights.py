"""A rank's weights: taken from the checkpoint tensor by tensor, written as safetensors, hashed on the way."""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from builder_svc.checkpoint.tensors import Tensors
from builder_svc.models.sources import Source
from builder_svc.work_directory import MORE_ROOM, unwritable
from engine.blobs import Hasher
from engine.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from engine.manifest import FileRef
from engine.program import ITEM_SIZE, Program, TensorType

# What a build need not take: rotary frequencies and causal masks of older checkpoints, whose config implies them, and scales of
# activations, which not all targets quantize.
_DERIVED = (
    "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".input_scale",
)  # fmt: skip
_HEADS = ("lm_head.weight", "embed_out.weight")
MAX_FILE_BYTES = 4 * 1024**3
ALIGNMENT = 16  # bytes that a GPU reads at once
_FLUSH_BYTES = 256 * 1024**2
_UNDER_WAY = 3  # parts that are being written and hashed
_NAMES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}


def check_weights(checkpoint: Tensors, sources: Mapping[str, Source], declared: Mapping[str, TensorType]) -> None:
    """Raises InvalidArgument, naming tensor, shape and expected shape, unless the checkpoint has what is declared.

    Args:
        sources: our weight name -> the checkpoint's tensors that form it.
        declared: our weight name -> type.
    """
    for ours, source in sources.items():
        _check_source(checkpoint, source, tuple(int(size) for size in declared[ours].shape))
    used = {name for source in sources.values() for name in source.names}
    tied = () if "lm_head.weight" in sources else _HEADS
    for name in tied:
        if name in checkpoint.shapes and name not in used:
            _check_tied(checkpoint, name, sources["embedding"].names[0])
    for name in checkpoint.shapes:
        if name not in used and not name.endswith(_DERIVED) and name not in tied:
            raise InvalidArgument(
                f"{checkpoint.path} holds tensor {name!r}, for which its config.json has no place: take the config.json of these "
                "weights",
                reason="TENSOR_UNEXPECTED",
            )


def _check_source(checkpoint: Tensors, source: Source, expected: tuple[int, ...]) -> None:
    """Several tensors have the expected one's columns, and its rows together."""
    rows, stacked = 0, len(source.names) > 1 and not source.largest
    for name in source.names:
        shape = checkpoint.shapes.get(name)
        if shape is None:
            raise InvalidArgument(
                f"{checkpoint.path} has no tensor {name!r}, which its config.json implies: download the weights that belong "
                "to it",
                reason="TENSOR_MISSING",
            )
        turned = shape[::-1] if source.transposed else shape
        if not stacked and turned != expected:
            raise _mismatch(name, shape, expected[::-1] if source.transposed else expected)
        columns = expected[-1:] if len(expected) > 1 else ()
        if stacked and turned[len(turned) - len(columns) :] != columns:
            raise _mismatch(name, shape, (-1, *columns))
        rows = math.prod(turned) // math.prod(columns) + (rows if stacked else 0)
    if rows != math.prod(expected) // math.prod(columns):
        together = math.prod(expected) // math.prod(columns)
        raise _mismatch(" + ".join(source.names), (rows, *columns), (together, *columns))


def _check_tied(checkpoint: Tensors, head: str, embedding: str) -> None:
    """A head that is stored although it is tied is the embedding once more."""
    ours, theirs = checkpoint.read(head), checkpoint.read(embedding)
    if not torch.equal(ours, theirs.to(ours.dtype)):
        raise InvalidArgument(
            f"{checkpoint.path} holds tensor {head!r} of shape {list(ours.shape)}, which is not {embedding!r} of shape "
            f"{list(theirs.shape)}, but by its config.json both are one: where the model has a head of its own, set "
            "tie_word_embeddings to false there",
            reason="TENSOR_UNEXPECTED",
        )


def _mismatch(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> InvalidArgument:
    wanted = ", ".join("any" if size < 0 else str(size) for size in expected)
    return InvalidArgument(
        f"tensor {name!r} has shape {list(shape)}, config.json implies [{wanted}]: take the config.json of these weights",
        reason="TENSOR_SHAPE_MISMATCH",
    )


def write_weights(
    program: Program,
    parts: Callable[[str], Iterable[torch.Tensor]],
    names: Collection[str],
    directory: Path,
    progress: Callable[[int, int], None],
    stem: str = "rank0",
) -> list[tuple[FileRef, Path]]:
    """Writes a program's weights as safetensors files of at most MAX_FILE_BYTES (or one tensor) into a directory.

    Tensors stand in the order of their first use, wider dtypes first, and those of a size that is no multiple of ALIGNMENT behind
    the others: so each is aligned to its own items, and all that GPUs read in vectors to ALIGNMENT. A few of the parts that they
    are made of are in memory at a time.

    Args:
        parts: the tensors that form a weight, one after another.
        names: the weights to write; the others are in no file.
        progress: called with (bytes done, bytes in all).
        stem: of the files' names.

    Returns:
        Each file's description and path.
    """
    used = [name for op in program.ops for name in op.inputs if name in program.weights and name in names]
    types = program.weights
    order = sorted(
        dict.fromkeys(used), key=lambda name: (types[name].nbytes % ALIGNMENT > 0, -ITEM_SIZE[types[name].dtype])
    )
    total, done = sum(program.weights[name].nbytes for name in order), 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    written = []
    for number, group in enumerate(_groups(order, program)):
        path = directory / f"{stem}-{number:05d}.safetensors"
        try:
            ref = write_file(path, {name: program.weights[name] for name in group}, parts, wrote)
        except (ResourceExhausted, FailedPrecondition) as error:
            raise type(error)(f"{error.message}; {MORE_ROOM}", reason=error.reason) from None
        written.append((ref, path))
    return written


def write_file(
    path: Path,
    declared: Mapping[str, TensorType],
    parts: Callable[[str], Iterable[torch.Tensor]],
    wrote: Callable[[int], None] = lambda _: None,
) -> FileRef:
    """Writes one safetensors file, each weight in its declared dtype, and describes it.

    Args:
        declared: in the order of the file.
        parts: the tensors that form a weight, one after another.
        wrote: called with the bytes of each part.

    Raises:
        InvalidArgument: integers that are to be floating point.
        ResourceExhausted: the disk is full.
        FailedPrecondition: another reason why it cannot be written.
    """
    cast = (_cast(part, name, type).contiguous() for name, type in declared.items() for part in parts(name))
    try:
        with ThreadPoolExecutor(1, "weights-read") as reader, _Output(path) as output:
            output.write(_header(declared))
            for part in _ahead(cast, reader):
                output.write(memoryview(part.view(-1).view(torch.uint8).numpy()))
                wrote(part.nbytes)
    except OSError as error:
        raise unwritable(path, error) from None
    return output.hasher.ref(path.name)


def _cast(part: torch.Tensor, name: str, declared: TensorType) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, declared.dtype)
    if dtype.is_floating_point and not part.dtype.is_floating_point:
        raise InvalidArgument(
            f"the tensors of weight {name!r} are {str(part.dtype).removeprefix('torch.')}, and nothing says which numbers these "
            "codes stand for: take the config.json of these weights, with its quantization_config",
            reason="TENSOR_DTYPE_MISMATCH",
        )
    made = part.to(dtype)
    if dtype is torch.float16 and part.dtype is not dtype and made.isinf().any() and not part.isinf().any():
        raise InvalidArgument(
            f"weight {name!r} holds numbers up to {part.abs().max().item():.4g}, more than float16 can: choose bfloat16",
            reason="DTYPE_TOO_SMALL",
        )
    return made


class _Output:
    """A file that is hashed as it is written. The two digests, the writing and the disk have a thread each."""

    def __init__(self, path: Path) -> None:
        self.hasher = Hasher()
        self._file = path.open("wb", buffering=0)
        self._takers = [self._write, self.hasher.update_whole, self.hasher.update_chunks]
        self._threads = [ThreadPoolExecutor(1, "weights-write") for _ in self._takers]
        self._under_way: deque[list[Future[object]]] = deque()
        self._disk, self._unflushed = ThreadPoolExecutor(1, "weights-flush"), 0
        self._flushed: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> None:
        """Takes the next bytes, which must not change any more; may wait for those before them."""
        pairs = zip(self._threads, self._takers, strict=True)
        self._under_way.append([thread.submit(take, data) for thread, take in pairs])
        if len(self._under_way) > _UNDER_WAY:
            self._wait()

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                while self._under_way:
                    self._wait()
                self._flushed.append(self._disk.submit(os.fdatasync, self._file.fileno()))
                for flushed in self._flushed:  # a lost write is told once: whoever flushes again would not hear of it
                    flushed.result()
        finally:
            for thread in (*self._threads, self._disk):
                thread.shutdown(cancel_futures=kind is not None)
            self._file.close()

    def _wait(self) -> None:
        for taken in self._under_way.popleft():
            taken.result()

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._unflushed += len(data)
        if self._unflushed > _FLUSH_BYTES:  # the disk begins now, so that little is left for the end
            self._unflushed = 0
            self._flushed.append(self._disk.submit(os.fdatasync, self._file.fileno()))


def _ahead(parts: Iterator[torch.Tensor], pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
    """The same, each read while the one before it is used."""
    coming = pool.submit(next, parts, None)
    while (part := coming.result()) is not None:
        coming = pool.submit(next, parts, None)
        yield part


def read_parts(checkpoint: Tensors, source: Source) -> Iterator[torch.Tensor]:
    """The tensors that form a weight, one after another, as they lie in it."""
    if source.largest:
        yield torch.stack([checkpoint.read(name).float().max() for name in source.names]).max(0, keepdim=True).values
        return
    for name in source.names:
        tensor = checkpoint.read(name)
        for part in tensor if tensor.dim() == 3 else (tensor,):  # experts one by one: they are mapped, not read
            if source.transposed:
                part = part.T
            if source.heads:
                part = source.heads.sorted(part)
            yield part.float() + source.offset if source.offset else part


def _groups(order: list[str], program: Program) -> list[list[str]]:
    groups: list[list[str]] = []
    filled = 0
    for name in order:
        size = program.weights[name].nbytes
        if not groups or filled + size > MAX_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _header(declared: Mapping[str, TensorType]) -> bytes:
    """The safetensors header, padded so that the data begins at a multiple of 64 bytes."""
    entries, offset = {}, 0
    for name, type in declared.items():
        end = offset + type.nbytes
        entries[name] = {"dtype": _NAMES[type.dtype], "shape": list(type.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text
