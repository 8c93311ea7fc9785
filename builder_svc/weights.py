"""A rank's weights: taken from the checkpoint tensor by tensor, written as safetensors, hashed on the way."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from builder_svc.checkpoint.reader import Checkpoint
from engine.blobs import Hasher
from engine.errors import InvalidArgument, ResourceExhausted
from engine.manifest import FileRef
from engine.program import ITEM_SIZE, Program

_DERIVED = ("rotary_emb.inv_freq",)  # older checkpoints store what their config implies
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


def check_weights(checkpoint: Checkpoint, names: Mapping[str, tuple[str, ...]], program: Program) -> None:
    """Raises InvalidArgument, naming tensor, shape and expected shape, unless the checkpoint has what the program needs.

    Args:
        names: our weight name -> the checkpoint's tensors, stacked along the first dimension.
    """
    for ours, theirs in names.items():
        expected = tuple(int(size) for size in program.weights[ours].shape)
        shapes = {name: checkpoint.shapes.get(name) for name in theirs}
        for name, shape in shapes.items():
            if shape is None:
                raise InvalidArgument(
                    f"{checkpoint.path} has no tensor {name!r}, which its config.json implies: download the weights that belong "
                    "to it",
                    reason="TENSOR_MISSING",
                )
            if shape[1:] != expected[1:]:
                raise _mismatch(name, shape, (*((-1,) if len(theirs) > 1 else expected[:1]), *expected[1:]))
        rows = sum(shape[0] for shape in shapes.values() if shape)
        if rows != expected[0]:
            raise _mismatch(" + ".join(theirs), (rows, *expected[1:]), expected)

    used = {name for theirs in names.values() for name in theirs}
    for name in checkpoint.shapes:
        if (
            name not in used
            and not name.endswith(_DERIVED)
            and not (name == "lm_head.weight" and "lm_head.weight" not in names)
        ):
            raise InvalidArgument(
                f"{checkpoint.path} holds tensor {name!r}, for which its config.json has no place: take the config.json of these "
                "weights",
                reason="TENSOR_UNEXPECTED",
            )


def _mismatch(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> InvalidArgument:
    wanted = ", ".join("any" if size < 0 else str(size) for size in expected)
    return InvalidArgument(
        f"tensor {name!r} has shape {list(shape)}, config.json implies [{wanted}]: take the config.json of these weights",
        reason="TENSOR_SHAPE_MISMATCH",
    )


def write_weights(
    checkpoint: Checkpoint,
    names: Mapping[str, tuple[str, ...]],
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
                    tensor = constants[name] if name in constants else _stack(checkpoint, names[name])
                    tensor = tensor.to(getattr(torch, program.weights[name].dtype)).contiguous()
                    data = memoryview(tensor.view(torch.uint8).view(-1).numpy())
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


def _stack(checkpoint: Checkpoint, names: tuple[str, ...]) -> torch.Tensor:
    parts = [checkpoint.read(name) for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
