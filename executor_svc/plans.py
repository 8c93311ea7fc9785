"""Plans: what rank 0 tells the others of a step, the columns that its runner has laid out. Data, never code: no pickle."""

import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

_DTYPES = (np.dtype("int32"), np.dtype("int64"))


def pack(plan: Mapping[str, Any]) -> bytes:
    """Columns (arrays, or tensors in main memory, of int32 or int64), numbers, flags, lists of numbers and None, by name."""
    return msgspec.msgpack.encode(plan, enc_hook=_encode)


def unpack(data: bytes) -> dict[str, Any]:
    """The same, its columns as arrays of their own. Raises msgspec.DecodeError for what `pack` has not made."""
    plan: dict[str, Any] = msgspec.msgpack.decode(data, type=dict[str, Any], ext_hook=_decode)
    return plan


def _encode(column: Any) -> msgspec.msgpack.Ext:
    """An array as msgpack's extension: its type is the dtype; the number of its dimensions, each as uint32, then its bytes."""
    values = column.numpy() if isinstance(column, Tensor) else column
    header = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
    return msgspec.msgpack.Ext(_DTYPES.index(values.dtype), header + values.tobytes())


def _decode(code: int, data: memoryview) -> np.ndarray:
    dtype, ndim = _DTYPES[code], data[0]
    shape = struct.unpack_from(f"<{ndim}I", data, 1)
    return np.frombuffer(data[1 + 4 * ndim :].tobytes(), dtype=dtype).reshape(shape).copy()
