"""A real client uploads to a real builder; both are killed on the way, and the bytes that travel are counted."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from engine.blobs import blob_key
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, Unavailable
from enginehouse import upload as upload_module
from enginehouse.client import BuilderClient
from tests.integration.services import Service, service
from tests.unit import hub_server
from tests.unit.gguf_models import write_gguf
from tests.unit.hub_server import Repository

LARGE = 24 * 1024 * 1024
BREAK = 9 * 1024 * 1024  # bytes that travel before somebody is killed
SLACK = 512 * 1024  # frames, headers, the small files


class Relay:
    """A port that leads to the builder, counts what a client sends, and stops passing it on after `limit` bytes."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.sent = 0
        self.limit: int | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            self.drop()
            await asyncio.sleep(0.05)

    def drop(self) -> None:
        """Ends all connections, as they end when a client dies."""
        for writer in self._connections:
            writer.transport.abort()  # `close` would wait for what the other side may never read

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            host, port = self.target.split(":")
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        self._connections |= {writer, back}
        passing = asyncio.create_task(self._pass(there, writer))
        with contextlib.suppress(OSError):
            await self._count(reader, back, passing)
        writer.close()
        back.close()
        await asyncio.gather(passing, return_exceptions=True)
        self._connections -= {writer, back}

    async def _count(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: "asyncio.Task[None]"
    ) -> None:
        while data := await reader.read(65536):
            self.sent += len(data)
            writer.write(data)
            await writer.drain()
            if self.limit is not None and self.sent >= self.limit:
                await asyncio.wait([passing])  # until one of both ends is gone

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


class Cluster:
    """A builder that can be started again, its store and its spool, and a relay before it."""

    def __init__(self, tmp_path: Path, root: Path) -> None:
        self.store = DirectoryStore(tmp_path / "store")
        self.spool = tmp_path / "temporary" / f"enginehouse-uploads-{os.getuid()}"
        self._log = tmp_path / "builder.log"
        self._root = root
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Cluster":
        self.start()
        self.relay = Relay(self.builder.address)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        arguments = ["--store", str(self.store.root), "--checkpoint-root", str(self._root)]
        self.builder: Service = self._stack.enter_context(service("builder_svc", self._log, *arguments))

    async def reached(self) -> None:
        """Returns when the builder has written what the relay has passed on, as far as messages are whole."""
        while self._in_spool() < BREAK - SLACK - upload_module.MESSAGE_SIZE:  # noqa: ASYNC110  (another process)
            await asyncio.sleep(0.01)

    async def let_go(self) -> int:
        """Bytes of the file that is on its way, once no builder writes it any more."""
        (path,) = self.spool.glob("*.partial")
        with path.open("rb") as file:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return path.stat().st_size
                await asyncio.sleep(0.01)

    def _in_spool(self) -> int:
        return max((path.stat().st_size for path in self.spool.glob("*.partial")), default=0)

    def is_whole(self, checkpoint: Path) -> bool:
        """Whether the large file is in the store as it should be."""
        data = (checkpoint / "model.safetensors").read_bytes()
        return self.store.read(blob_key(upload_module.hashlib.sha256(data).hexdigest())) == data


@pytest.fixture
def cluster(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ENGINEHOUSE_BUILDER", raising=False)
    with Cluster(tmp_path, checkpoint.parent) as cluster:
        yield cluster


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """What could be a checkpoint, as far as an upload is concerned."""
    directory = tmp_path / "large"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(os.urandom(LARGE))
    (directory / "pytorch_model.bin").write_bytes(bytes(LARGE))
    return directory


async def enginehouse(*arguments: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "enginehouse", *arguments]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_a_client_that_is_killed_goes_on(cluster: Cluster, large: Path, number: signal.Signals) -> None:
    relay = cluster.relay
    async with relay.serve() as address, asyncio.timeout(60):
        relay.limit = BREAK
        client = await enginehouse("build", str(large), "--builder", address, "--upload")
        await cluster.reached()
        client.send_signal(number)
        await client.communicate()
        assert client.returncode == (130 if number == signal.SIGINT else -number)
        relay.drop()
        there = await cluster.let_go()
        assert 0 < there < LARGE

        relay.limit, relay.sent = None, 0
        async with BuilderClient(address) as builder:
            text = await builder.upload(large)
        assert text.startswith("upload://")
        assert LARGE - there <= relay.sent < LARGE - there + SLACK
        assert cluster.is_whole(large)

        relay.sent = 0
        async with BuilderClient(address) as builder:
            assert await builder.upload(large) == text
        assert relay.sent < SLACK


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.drill)])
async def test_a_builder_that_is_killed_goes_on(cluster: Cluster, large: Path, number: signal.Signals) -> None:
    relay = cluster.relay
    steps: list[tuple[str, int, int, str]] = []
    async with relay.serve() as address, asyncio.timeout(60), BuilderClient(address) as builder:
        relay.limit = BREAK
        uploading = asyncio.create_task(builder.upload(large, lambda *step: steps.append(step)))
        await cluster.reached()
        await asyncio.to_thread(cluster.builder.stop, number)
        there = await cluster.let_go()
        assert 0 < there < LARGE

        relay.limit, relay.sent = None, 0
        cluster.start()
        relay.target = cluster.builder.address
        assert (await uploading).startswith("upload://")
        assert LARGE - there <= relay.sent < LARGE - there + SLACK
    assert cluster.is_whole(large)
    assert steps[-1] == ("send", LARGE + 2, LARGE + 2, "bytes")


async def test_a_builder_that_stays_away(cluster: Cluster, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "DELAYS", (0.05, 0.05))
    relay = cluster.relay
    async with relay.serve() as address, asyncio.timeout(60), BuilderClient(address) as builder:
        relay.limit = BREAK
        uploading = asyncio.create_task(builder.upload(large))
        await cluster.reached()
        cluster.builder.stop(signal.SIGKILL)
        with pytest.raises(Unavailable, match=address):
            await uploading
        with pytest.raises(Unavailable, match=f"(no builder answers at|the builder at) {address}"):
            await builder.upload(large)


async def test_two_clients_with_the_same_file(cluster: Cluster, large: Path) -> None:
    async def upload() -> str:
        async with BuilderClient(cluster.builder.address) as builder:
            return await builder.upload(large)

    async with asyncio.timeout(60):
        first, second = await asyncio.gather(upload(), upload())
    assert first == second
    assert cluster.is_whole(large)


async def test_a_file_that_is_changed_meanwhile(cluster: Cluster, large: Path) -> None:
    def change(step: str, done: int, _total: int, _unit: str) -> None:
        if step == "send" and done > LARGE // 2:
            with (large / "model.safetensors").open("r+b") as file:
                file.write(b"changed")

    async with BuilderClient(cluster.builder.address) as builder:
        with pytest.raises(FailedPrecondition, match=r"model\.safetensors was changed") as caught:
            await builder.upload(large, change)
    assert caught.value.reason == "FILE_CHANGED"


@pytest.mark.parametrize("file", ["", pytest.param("copy.gguf", marks=pytest.mark.drill)])
async def test_the_same_engine_from_everywhere(
    file: str, cluster: Cluster, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By upload, by path and from the hub; only the first is built, since the others have the same id."""
    copy, original = tmp_path / "copy", checkpoint
    if file:
        original = checkpoint.parent / file
        write_gguf(original, "llama", checkpoint)
        copy.mkdir()
        shutil.copy(original, copy)
    else:
        shutil.copytree(checkpoint, copy)
    (copy / "README.md").write_text("not read")
    with hub_server.serve({"org/copy": Repository(copy)}) as hub:
        for name, value in hub_server.environment(hub.url, tmp_path / "hub").items():
            monkeypatch.setenv(name, value)
        cluster.start()  # the builder with these variables
        there, here = ["--builder", cluster.builder.address], ["--store", str(cluster.store.root)]
        told = []
        for arguments in (
            ["--upload", str(copy / file), *there],
            [str(original), "--name", "copy", *there],
            [f"{Path('org/copy') / file}@main", *there],
            [str(Path("org/copy") / file), *here],
        ):
            client = await enginehouse("build", *arguments, "--json")
            out, err = await client.communicate()
            assert client.returncode == 0, err
            told.append(json.loads(out))
    assert [(engine["name"], engine["reused"]) for engine in told] == [("copy", False)] + 3 * [("copy", True)]
    assert len({engine["engine_id"] for engine in told}) == 1
    manifest = json.loads(cluster.store.read(f"engines/{told[0]['engine_id']}.json"))
    assert manifest["source"].startswith("upload://")
