"""Frames between the front and a worker, and from rank 0 to others: a little-endian uint32 length, then the message."""

import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import AsyncGenerator
from typing import Any

_LENGTH = struct.Struct("<I")
_READ_SIZE = 1 << 18


def frame(message: bytes) -> bytes:
    """A message with its length in front."""
    return _LENGTH.pack(len(message)) + message


class Frames:
    """Makes messages of bytes, in whatever pieces they come.

    Args:
        largest: bytes of a message that the other side may send.
    """

    def __init__(self, largest: int = 1 << 32) -> None:
        self._buffer, self._largest = bytearray(), largest

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now. Raises ConnectionError: one would be too large."""
        self._buffer += data
        messages, start = [], 0
        while start + _LENGTH.size <= len(self._buffer):
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > self._largest:
                raise ConnectionError(f"the other side sends {length} bytes at once: it is none of ours")
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            messages.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return messages


async def read_frames(reader: asyncio.StreamReader, largest: int = 1 << 32) -> AsyncGenerator[bytes, None]:
    """The messages, until the other side is gone, or sends one of more than `largest` bytes."""
    frames = Frames(largest)
    with contextlib.suppress(OSError):  # the network's timeout among them
        while data := await reader.read(_READ_SIZE):
            for message in frames.feed(data):
                yield message


class FrameSocket:
    """A worker's end: blocking, read in whatever pieces have arrived."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection
        self._frames = Frames()

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def send(self, *messages: bytes) -> None:
        """Writes a frame each. Raises ConnectionError when the other side is gone."""
        self._socket.sendall(b"".join(map(frame, messages)))

    def receive(self, timeout: float | None, *others: Any) -> list[bytes]:
        """The messages that are there, waiting up to `timeout` seconds (None: without end) for the first.

        Args:
            others: files whose being readable ends the waiting, too.

        Raises:
            ConnectionError: the other side is gone.
        """
        if (timeout or (timeout is None and others)) and self._socket not in select.select(
            [self._socket, *others], [], [], timeout
        )[0]:
            return []
        try:
            data = self._socket.recv(_READ_SIZE, 0 if timeout is None else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionError("the other side is gone")
        return self._frames.feed(data)
