"""A rank's weights: taken from the checkpoint tensor by tensor, written as safetensors, hashed on the way."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from builder_svc.models.sources import Source
from engine.blobs import Hasher
from engine.errors import InvalidArgument, ResourceExhausted
from engine.manifest import FileRef
from engine.program import ITEM_SIZE, Program, TensorType

# What older checkpoints store although their config implies it: rotary frequencies and causal masks.
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
MAX_FILE_BYTES = 4 * 1024**3
_NAMES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}


class Weights(Protocol):
    """Tensors by name, such as a checkpoint's.

    Attributes:
        path: where they are, for errors.
        shapes: name -> shape.
    """

    @property
    def path(self) -> Path | str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises KeyError for an unknown name."""


def check_weights(checkpoint: Weights, sources: Mapping[str, Source], declared: Mapping[str, TensorType]) -> None:
    """Raises InvalidArgument, naming tensor, shape and expected shape, unless the checkpoint has what is declared.

    Args:
        sources: our weight name -> the checkpoint's tensors that form it.
        declared: our weight name -> type.
    """
    for ours, source in sources.items():
        _check_source(checkpoint, source, tuple(int(size) for size in declared[ours].shape))
    used = {name for source in sources.values() for name in source.names}
    tied = "lm_head.weight" not in sources
    for name in checkpoint.shapes:
        if name not in used and not name.endswith(_DERIVED) and not (tied and name == "lm_head.weight"):
            raise InvalidArgument(
                f"{checkpoint.path} holds tensor {name!r}, for which its config.json has no place: take the config.json of these "
                "weights",
                reason="TENSOR_UNEXPECTED",
            )


def _check_source(checkpoint: Weights, source: Source, expected: tuple[int, ...]) -> None:
    """Several tensors have the expected one's columns, and its rows together."""
    rows, stacked = 0, len(source.names) > 1
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
        rows += math.prod(turned) // math.prod(columns)
    if rows != math.prod(expected) // math.prod(columns):
        together = math.prod(expected) // math.prod(columns)
        raise _mismatch(" + ".join(source.names), (rows, *columns), (together, *columns))


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
) -> list[tuple[FileRef, Path]]:
    """Writes a program's weights as safetensors files of at most MAX_FILE_BYTES (or one tensor) into a directory.

    Tensors stand in the order of their first use, wider dtypes first, so that each is aligned to its own size. One of them
    is in memory at a time, with the parts that it is made of.

    Args:
        parts: the tensors that form a weight, one after another.
        names: the weights to write; the others are in no file.
        progress: called with (bytes done, bytes in all).

    Returns:
        Each file's description and path.
    """
    used = [name for op in program.ops for name in op.inputs if name in program.weights and name in names]
    order = sorted(dict.fromkeys(used), key=lambda name: -ITEM_SIZE[program.weights[name].dtype])
    total, done = sum(program.weights[name].nbytes for name in order), 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    written = []
    for number, group in enumerate(_groups(order, program)):
        path = directory / f"rank0-{number:05d}.safetensors"
        try:
            ref = write_file(path, {name: program.weights[name] for name in group}, parts, wrote)
        except ResourceExhausted as error:
            raise ResourceExhausted(f"{error.message}; choose another --work-dir", reason=error.reason) from None
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
        ResourceExhausted: the disk is full, or there is another reason why it cannot be written.
    """
    hasher = Hasher()
    try:
        with path.open("wb") as file:
            header = _header(declared)
            file.write(header)
            hasher.update(header)
            for name, type in declared.items():
                for part in parts(name):
                    tensor = part.to(getattr(torch, type.dtype)).contiguous()
                    data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                    file.write(data)
                    hasher.update(data)
                    wrote(tensor.nbytes)
    except OSError as error:
        raise ResourceExhausted(f"cannot write {path}: {error.strerror}", reason="WORK_DIR_FULL") from None
    return hasher.ref(path.name)


def read_parts(checkpoint: Weights, source: Source) -> Iterator[torch.Tensor]:
    """The tensors that form a weight, one after another, as they lie in it."""
    for name in source.names:
        part = checkpoint.read(name)
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
