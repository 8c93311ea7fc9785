"""The GGUF container, versions 2 and 3: metadata, and tensors that are dequantized when they are read.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package knows the quantizations; its own reader of
the header takes seconds for a vocabulary.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from builder_svc.models.fields import Fields
from engine.checkpoints import gguf_parts
from engine.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unimplemented

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
    "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
_SLICE = 256 * 1024  # elements that are dequantized at a time: what numpy makes on the way stays in the cache


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: `shape` as in PyTorch, slowest dimension first; `offset` in bytes from the file's begin."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int


class GgufFile:
    """One file, or all parts of a split one, memory-mapped.

    Attributes:
        parts: the files, in order.
        metadata: key -> value, of Python's types; a float alone as the shortest decimal that gives it.
        shapes: tensor name -> shape, slowest dimension first.

    Raises:
        NotFound: a part is missing.
        InvalidArgument: no GGUF file.
        DataLoss: damaged or incomplete.
        Unimplemented: a version, byte order or tensor type that we do not read.
    """

    def __init__(self, path: Path) -> None:
        self.parts = _parts(path)
        headers = [_read_header(part) for part in self.parts]
        self.metadata = headers[0][0]
        self._entries = {name: entry for _, entries in headers for name, entry in entries.items()}
        expected = self.metadata.get("split.tensors.count", len(self._entries))
        if self.metadata.get("split.count", 1) != len(self.parts) and len(self.parts) == 1:
            raise InvalidArgument(
                f"{path} is one part of {self.metadata['split.count']}: put all of them into one directory, with the names "
                "that they had, such as model-00001-of-00003.gguf",
                reason="GGUF_INVALID",
            )
        if not len(self._entries) == sum(len(entries) for _, entries in headers) == expected:
            raise _damaged(path, f"{len(self._entries)} tensors, and {expected} are expected")
        self.shapes: Mapping[str, tuple[int, ...]] = {name: entry.shape for name, entry in self._entries.items()}

    def __reduce__(self) -> tuple[type["GgufFile"], tuple[Path]]:
        return GgufFile, (self.path,)  # copies and pickles are opened again: what is mapped would be copied into memory

    @property
    def path(self) -> Path:
        """The file with the metadata."""
        return self.parts[0]

    def is_quantized(self, name: str) -> bool:
        """Whether reading gives float32 of a more compact form."""
        return self._entries[name].kind.name not in _PLAIN

    def dtype(self, name: str) -> torch.dtype:
        """What reading gives."""
        return _PLAIN.get(self._entries[name].kind.name, torch.float32)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or one entry of its first dimension; what is quantized comes as float32. From any thread.

        Raises KeyError for an unknown name.
        """
        entry = self._entries[name]
        shape, offset = entry.shape, entry.offset
        if index is not None:
            shape = shape[1:]
            offset += index * _num_bytes(shape, entry.kind)
        data = entry.data[offset : offset + _num_bytes(shape, entry.kind)]
        if plain := _PLAIN.get(entry.kind.name):
            return torch.frombuffer(bytearray(data), dtype=plain).view(shape)
        width = shape[-1]
        rows = data.reshape(-1, _num_bytes((width,), entry.kind))
        result = torch.empty(len(rows), width)
        step = max(1, _SLICE // width)
        with np.errstate(all="ignore"):  # infinite scales are the file's, and no news of ours
            for begin in range(0, len(rows), step):
                result[begin : begin + step] = torch.from_numpy(gguf.dequantize(rows[begin : begin + step], entry.kind))
        return result.view(shape)


class Metadata(Fields):
    """A file's metadata, keys without the architecture before them.

    Attributes:
        file: which also has the tensors that tell what a model has.
        architecture: general.architecture.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = Fields(file.metadata, str(file.path)).require("general.architecture", str)
        prefix = f"{self.architecture}."
        values = {key.removeprefix(prefix): self._uniform(key, value) for key, value in file.metadata.items()}
        super().__init__(values, str(file.path))

    def has(self, suffix: str) -> bool:
        """Whether a tensor's name ends so."""
        return any(name.endswith(suffix) for name in self.file.shapes)

    @property
    def head_dim(self) -> int:
        """Of queries and keys, and of values."""
        default = self.size("embedding_length") // self.size("attention.head_count")
        key, value = self.size("attention.key_length", default), self.size("attention.value_length", default)
        if key != value:
            raise Unimplemented(f"{self.where}: keys of {key} and values of {value} dimensions are not supported")
        return key

    def _uniform(self, key: str, value: Any) -> Any:
        """The one value of what could differ by layer."""
        if isinstance(value, list) and key.endswith((".head_count", ".head_count_kv", ".feed_forward_length")):
            if not value or any(one != value[0] for one in value):
                raise Unimplemented(f"{self.file.path}: {key} differs by layer, which is not supported: {value[:8]}")
            return value[0]
        return value


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Entry]]:
    try:
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}", reason="FILE_UNREADABLE") from None
    if bytes(data[:4]) != b"GGUF":
        raise InvalidArgument(f"{path} is no GGUF file: download it again", reason="GGUF_INVALID")
    cursor = _Cursor(data, 4)
    try:
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise Unimplemented(
                f"{path} is GGUF version {version}, or of the other byte order: take one of version 2 or 3, little-endian",
                reason="GGUF_VERSION_UNSUPPORTED",
            )
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_values)}
        found = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.scalar("I")
            sizes = [cursor.scalar("Q") for _ in range(num_dims)]
            found.append((name, tuple(reversed(sizes)), cursor.scalar("I"), cursor.scalar("Q")))
    except (struct.error, OverflowError, RecursionError) as error:  # the last one of arrays in arrays
        raise _damaged(path, f"its header: {error}") from None
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _damaged(path, f"general.alignment is {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    entries: dict[str, _Entry] = {}
    for name, shape, number, offset in found:
        kind = _kind(path, name, number)
        width, smallest = shape[-1] if shape else 0, min(shape, default=0)
        end = begin + offset + _num_bytes(shape, kind)
        if smallest < 1 or width % gguf.GGML_QUANT_SIZES[kind][0] or end > len(data) or name in entries:
            raise _damaged(path, f"tensor {name!r}, {kind.name} {list(shape)}, does not fit into its {len(data)} bytes")
        entries[name] = _Entry(data, kind, shape, begin + offset)
    return metadata, entries


def _kind(path: Path, name: str, number: int) -> gguf.GGMLQuantizationType:
    kind = next((kind for kind in gguf.GGMLQuantizationType if kind == number), None)
    if kind is None or kind.name not in (*_PLAIN, *_QUANTIZED):
        known = kind.name if kind is not None else f"number {number}"
        raise Unimplemented(
            f"{path}: tensor {name!r} is of type {known}, which is not supported: take another quantization of the "
            f"model; supported are {', '.join((*_PLAIN, *_QUANTIZED))}",
            reason="GGUF_TYPE_UNSUPPORTED",
        )
    return kind


def _damaged(path: Path, what: str) -> DataLoss:
    return DataLoss(f"{path} is damaged or incomplete ({what}): download it again", reason="WEIGHTS_DAMAGED")


class _Cursor:
    """Reads little-endian values one after another. Raises struct.error at the end of the data."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]], at: int) -> None:
        self._data, self.at = memoryview(data), at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return _shortest(value) if code == "f" else value

    def string(self) -> str:
        return str(self._take(self.scalar("Q")), "utf-8", "replace")  # some vocabularies have tokens that are no text

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise struct.error(f"no type of metadata has number {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))
        if count > len(self._data):
            raise struct.error(f"an array of {count} entries")
        return [self.value(inner) for _ in range(count)]

    def _take(self, count: int) -> memoryview:
        if count > len(self._data) - self.at:
            raise struct.error(f"{count} bytes at {self.at} are behind the end")
        self.at += count
        return self._data[self.at - count : self.at]


def _parts(path: Path) -> list[Path]:
    parts = [path.with_name(name) for name in gguf_parts(path.name)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise NotFound(
            f"{path.parent} lacks {', '.join(missing[:5])} of {len(parts)} parts: download that, too",
            reason="WEIGHTS_NOT_FOUND",
        )
    return parts


def _num_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = 1
    for length in shape:
        count *= length
    return count // block * size


def _shortest(value: float) -> float:
    """1e-06 for the float32 that is nearest to it."""
    return float(str(np.float32(value)))
