"""A rank's weights: taken from the checkpoint tensor by tensor, written as safetensors, hashed on the way."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from builder_svc.checkpoint.huggingface import HuggingFaceCheckpoint
from builder_svc.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from builder_svc.models.sources import Source
from engine.blobs import Hasher
from engine.errors import InvalidArgument, ResourceExhausted
from engine.manifest import FileRef
from engine.program import ITEM_SIZE, Program

# What older checkpoints store although their config implies it: rotary frequencies and causal masks.
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
AnyCheckpoint = HuggingFaceCheckpoint | QuantizedCheckpoint
MAX_FILE_BYTES = 4 * 1024**3
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


def check_weights(checkpoint: AnyCheckpoint, sources: Mapping[str, Source], program: Program) -> None:
    """Raises InvalidArgument, naming tensor, shape and expected shape, unless the checkpoint has what the program needs.

    Args:
        sources: our weight name -> the checkpoint's tensors that form it.
    """
    for ours, source in sources.items():
        _check_source(checkpoint, source, tuple(int(size) for size in program.weights[ours].shape))
    used = {name for source in sources.values() for name in source.names}
    tied = "lm_head.weight" not in sources
    for name in checkpoint.shapes:
        if name not in used and not name.endswith(_DERIVED) and not (tied and name == "lm_head.weight"):
            raise InvalidArgument(
                f"{checkpoint.path} holds tensor {name!r}, for which its config.json has no place: take the config.json of these "
                "weights",
                reason="TENSOR_UNEXPECTED",
            )


def _check_source(checkpoint: AnyCheckpoint, source: Source, expected: tuple[int, ...]) -> None:
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
    checkpoint: AnyCheckpoint,
    sources: Mapping[str, Source],
    constants: Mapping[str, torch.Tensor],
    program: Program,
    directory: Path,
    progress: Callable[[int, int], None],
) -> list[tuple[FileRef, Path]]:
    """Writes the program's weights as safetensors files of at most MAX_FILE_BYTES (or one tensor) into a directory.

    Tensors stand in the order of their first use, wider dtypes first, so that each is aligned to its own size. One of them
    is in memory at a time, with the parts that it is made of.

    Args:
        constants: weights that no checkpoint holds.
        progress: called with (bytes done, bytes in all).

    Returns:
        Each file's description and path.
    """
    used = [name for op in program.ops for name in op.inputs if name in program.weights]
    order = sorted(dict.fromkeys(used), key=lambda name: -ITEM_SIZE[program.weights[name].dtype])
    total, done = sum(program.weights[name].nbytes for name in order), 0
    written = []
    for number, group in enumerate(_groups(order, program)):
        hasher, path = Hasher(), directory / f"rank0-{number:05d}.safetensors"
        try:
            with path.open("wb") as file:
                header = _header(group, program)
                file.write(header)
                hasher.update(header)
                for name in group:
                    dtype = getattr(torch, program.weights[name].dtype)
                    parts = [constants[name]] if name in constants else _parts(checkpoint, sources[name])
                    for part in parts:
                        tensor = part.to(dtype).contiguous()
                        data = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                        file.write(data)
                        hasher.update(data)
                        done += tensor.nbytes
                        progress(done, total)
        except OSError as error:
            raise ResourceExhausted(
                f"cannot write {path}: {error.strerror}; choose another --work-dir", reason="WORK_DIR_FULL"
            ) from None
        written.append((hasher.ref(path.name), path))
    return written


def _parts(checkpoint: AnyCheckpoint, source: Source) -> Iterator[torch.Tensor]:
    """The tensors that form a weight, one after another, as they lie in it."""
    for name in source.names:
        part = checkpoint.read(name)
        if source.transposed:
            part = part.T
        if source.heads:
            part = source.heads.sorted(part)
        yield part.float() + source.offset if source.offset else part


def _groups(order: list[str], program: Program) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name in order:
        size = program.weights[name].nbytes
        if groups[-1] and filled + size > MAX_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _header(group: list[str], program: Program) -> bytes:
    """The safetensors header, padded so that the data begins at a multiple of 64 bytes."""
    entries, offset = {}, 0
    for name in group:
        declared = program.weights[name]
        end = offset + declared.nbytes
        entries[name] = {"dtype": _NAMES[declared.dtype], "shape": list(declared.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text
