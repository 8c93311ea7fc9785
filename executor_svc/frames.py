"""Frames between the front and a worker: a little-endian uint32 length, then that many bytes of a protobuf message."""

import asyncio
import socket
import struct

_LENGTH = struct.Struct("<I")


def frame(message: bytes) -> bytes:
    """A message with its length in front."""
    return _LENGTH.pack(len(message)) + message


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next message, or None when the other side is gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class FrameSocket:
    """The worker's end: blocking, read in whatever pieces have arrived."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()

    def send(self, message: bytes) -> None:
        """Writes a frame. Raises ConnectionError when the front is gone."""
        self._socket.sendall(frame(message))

    def receive(self, timeout: float | None) -> list[bytes]:
        """The messages that are there, waiting up to `timeout` seconds (None: without end) for the first.

        Raises:
            ConnectionError: the front is gone.
        """
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(1 << 20)
        except (TimeoutError, BlockingIOError):
            return []
        finally:
            self._socket.settimeout(None)
        if not data:
            raise ConnectionError("the front is gone")
        self._buffer += data
        messages, start = [], 0
        while start + _LENGTH.size <= len(self._buffer):
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            messages.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return messages
