"""Memory of one rank that others of the same machine read and write where it is: on GPUs by CUDA's IPC, and on CPUs a file's.

It stays until the process ends, since nobody knows when the others have let go of it.
"""

import ctypes
import mmap
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import InvalidArgument

BYTES_VARIABLE = "ENGINEHOUSE_ALL_REDUCE_BYTES"
LARGEST = 1 << 26  # the kernel's places are numbers of 32 bits
_SENT = 8 << 20  # bytes to all of several others together
_PAGE = 1 << 21  # what is smaller may lie beside others' memory, all of which would be shared
_LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class PeerMemory(Protocol):
    """Bytes on this rank's device.

    Attributes:
        address: of the first one.
        handle: what another process on this machine reaches it by.
    """

    address: int
    handle: bytes

    def reach(self, handle: bytes) -> int:
        """The address in this process of another rank's memory, of the same size. Raises OSError: there is no way."""


def peer_memory(on_gpu: bool, size: int, fill: int) -> PeerMemory:
    """`size` bytes on this rank's device, all 32 bits of which are `fill`. Raises OSError: there are none to be had."""
    return _CudaMemory(size, fill) if on_gpu else _HostMemory(size, fill)


def default_bytes(ranks: int) -> int:
    """Of a message, up to which so many ranks sum by themselves.

    Of two as much as can be, since bench/all_reduce.py finds that faster than NCCL at every size. Of more each sends its own to
    all the others, where a ring would send less.
    """
    return _SENT // (ranks - 1) if ranks > 2 else LARGEST


def most_bytes(ranks: int) -> int:
    """What the environment says instead of `default_bytes`, or that.

    Raises:
        InvalidArgument: it says something else.
    """
    text = os.environ.get(BYTES_VARIABLE, str(default_bytes(ranks)))
    if not (text.isdecimal() and int(text) <= LARGEST):
        raise InvalidArgument(f"{BYTES_VARIABLE} is {text!r}, expected bytes up to {LARGEST}, or 0 for NCCL alone")
    return 0 if os.environ.get("NCCL_P2P_DISABLE") == "1" else int(text)


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = [("bytes", ctypes.c_ubyte * 64)]


class _CudaMemory:
    """An allocation of its own, and not torch's allocator's, whose blocks may be parts of one or of a form that has no handle."""

    def __init__(self, size: int, fill: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        torch.cuda.current_stream().synchronize()  # the device's context is this thread's from now on
        size = -(-size // _PAGE) * _PAGE
        address, handle = ctypes.c_uint64(), _Handle()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._call("cuMemsetD32_v2", address, ctypes.c_uint(fill), ctypes.c_size_t(size // 4))
        self._call("cuCtxSynchronize")
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        self.address, self.handle = address.value, bytes(handle)

    def reach(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        theirs = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), theirs, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return address.value

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._cuda, name)(*arguments):
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'').decode() or f'error {status}'}")


class _HostMemory:
    """Pages of a file without a name."""

    def __init__(self, size: int, fill: int) -> None:
        file = os.memfd_create("peers")
        os.ftruncate(file, size)
        self.handle = f"/proc/{os.getpid()}/fd/{file}".encode()
        self._size, self._kept = size, [self._map(file, size)]
        self._kept[0].fill_(fill - (fill >> 31 << 32))  # as a signed number
        self.address = self._kept[0].data_ptr()

    def reach(self, handle: bytes) -> int:
        file = os.open(handle, os.O_RDWR)
        self._kept.append(self._map(file, self._size))
        os.close(file)
        return self._kept[-1].data_ptr()

    @staticmethod
    def _map(file: int, size: int) -> Tensor:
        return torch.frombuffer(mmap.mmap(file, size), dtype=torch.int32)
