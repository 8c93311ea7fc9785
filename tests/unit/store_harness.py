"""What the store's tests share."""

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from engine.store import Store

MIB = 1024 * 1024


def keys(store: Store, prefix: str = "") -> list[str]:
    """What a store lists."""
    return [entry.key for entry in store.list(prefix)]


class Interrupted(Exception):
    pass


def interrupt(store: Store, key: str, path: Path, at: int) -> None:
    """An upload that ends when `at` bytes are written."""

    def stop(done: int, total: int) -> None:
        if done >= at:
            raise Interrupted

    with pytest.raises(Interrupted):
        store.upload(key, path, stop)


class Proxy:
    """A line to a store that counts and can break.

    Attributes:
        endpoint: its own URL.
        sent: bytes that went to the store.
        cut_answer: called with the bytes of an answer that are about to go back and how many went before on this connection;
            when it returns True, the connection ends instead.
    """

    def __init__(self, endpoint: str) -> None:
        host = urlsplit(endpoint)
        self._target = (host.hostname or "", host.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = 0
        self.cut_answer: Callable[[bytes, int], bool] = lambda *_: False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=self._there, args=(client, server), daemon=True).start()
                threading.Thread(target=self._back, args=(client, server), daemon=True).start()

    def _there(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self.sent += len(data)
                server.sendall(data)
        _close(client, server)

    def _back(self, client: socket.socket, server: socket.socket) -> None:
        before = 0
        with contextlib.suppress(OSError):
            while (data := server.recv(65536)) and not self.cut_answer(data, before):
                before += len(data)
                client.sendall(data)
        _close(client, server)

    def close(self) -> None:
        self._listener.close()


def _close(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextlib.contextmanager
def scripted_store(*answers: tuple[int, str]) -> Iterator[tuple[str, deque[str]]]:
    """A store that gives these statuses and error codes, the last one for ever; its endpoint, and the requests as they come."""
    left, requests = deque(answers), deque[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append(f"{self.command} {self.path}")
            status, code = left.popleft() if len(left) > 1 else left[0]
            body = f"<Error><Code>{code}</Code><Message>in words</Message></Error>".encode() if code else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
