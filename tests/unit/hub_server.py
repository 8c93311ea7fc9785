"""A hub of one machine: what huggingface_hub asks of huggingface.co, over a directory of files."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/?]+)(\?.*)?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^?]+)(\?(?P<signature>.*))?")


@dataclass
class Repository:
    """Files at a commit; `refusal` is (status, X-Error-Code) for whoever comes without the token."""

    directory: Path
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    token: str | None = None
    refusal: tuple[int, str] = (401, "GatedRepo")


@dataclass
class Hub:
    """Repositories by name, and what was asked for: "GET /path"."""

    repositories: dict[str, Repository]
    requests: list[str] = field(default_factory=list)
    fail: int = 0  # so many requests are answered with 503
    signature: str = ""  # files are sent from addresses with this query, to which those without are redirected
    url: str = ""

    def downloaded(self) -> set[str]:
        """Names of the files that were sent."""
        return {line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.fail:
            self.hub.fail -= 1
            return self._answer(503, {"error": "busy"})
        found = _API.fullmatch(self.path) or _FILE.fullmatch(self.path)
        repository = found and self.hub.repositories.get(found["repo"])
        if not found or not repository:
            return self._refuse(404, "RepoNotFound")
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._refuse(*repository.refusal)
        commits = {**repository.revisions, **{commit: commit for commit in repository.revisions.values()}}
        commit = commits.get(found["revision"])
        if not commit:
            return self._refuse(404, "RevisionNotFound")
        if "name" in found.groupdict():
            if self.hub.signature and self.command == "GET" and not found["signature"]:
                return self._send(302, b"", {"Location": f"{self.hub.url}{self.path}?{self.hub.signature}"})
            return self._file(repository.directory / found["name"], commit)
        files = [path for path in sorted(repository.directory.rglob("*")) if path.is_file()]
        if found["what"] == "revision":
            siblings = [{"rfilename": path.relative_to(repository.directory).as_posix()} for path in files]
            return self._answer(
                200, {"id": found["repo"], "sha": commit, "private": False, "tags": [], "siblings": siblings}
            )
        return self._answer(
            200,
            [
                {
                    "type": "file",
                    "path": path.relative_to(repository.directory).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ],
        )

    do_HEAD = do_GET

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-ETag": f'"{etag}"'})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"refused: {code}"})

    def _answer(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """The hub on a free port of the loopback interface."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub_url: str, home: Path, **more: str) -> dict[str, str]:
    """Variables with which huggingface_hub asks this hub, and nobody else."""
    return {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }
