"""Uploads: what is missing, what comes in pieces, what is kept and what is refused, over a real server."""

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from builder_svc import spool as spool_module
from builder_svc.spool import SpoolFile, prepare
from builder_svc.upload_rpcs import UploadServicer
from builder_svc.uploads import OfferedFile, Uploads
from engine import checkpoints, sweeps
from engine.blobs import blob_key, describe, put_bytes
from engine.errors import (
    DataLoss,
    EnginehouseError,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from engine.store import Store
from enginehouse.client import BuilderClient
from protos import rpc
from protos.v1.builder_pb2 import (
    CheckpointFile,
    OfferCheckpointRequest,
    OfferCheckpointResponse,
    UploadFileHeader,
    UploadFileRequest,
)
from protos.v1.builder_pb2_grpc import BuilderServicer, BuilderStub, add_BuilderServicer_to_server

WEIGHTS = os.urandom(3 * 1024 * 1024 + 5)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "empty.json": b""}


class Servicer(UploadServicer, BuilderServicer):
    pass


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def uploads(store: Store, spool: Path) -> Uploads:
    return Uploads(store, spool)


@pytest.fixture
async def address(uploads: Uploads) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor()], options=rpc.CHANNEL_OPTIONS)
    add_BuilderServicer_to_server(Servicer(uploads), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def stub(address: str) -> AsyncIterator[BuilderStub]:
    async with grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS) as channel:
        yield BuilderStub(channel)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def described(files: dict[str, bytes]) -> list[CheckpointFile]:
    return [CheckpointFile(name=name, size=len(data), sha256=sha256(data)) for name, data in files.items()]


async def offer(stub: BuilderStub, files: dict[str, bytes] | None = None) -> OfferCheckpointResponse:
    return await stub.OfferCheckpoint(OfferCheckpointRequest(files=described(files or FILES)))


def missing(offered: OfferCheckpointResponse) -> dict[str, int]:
    return {entry.sha256: entry.offset for entry in offered.missing}


def header(data: bytes, offset: int = 0) -> UploadFileRequest:
    return UploadFileRequest(header=UploadFileHeader(sha256=sha256(data), size=len(data), offset=offset))


def messages(data: bytes, offset: int = 0, end: int | None = None, step: int = 1 << 20) -> list[UploadFileRequest]:
    rest = data[offset:end]
    parts = [UploadFileRequest(data=rest[at : at + step]) for at in range(0, len(rest), step)]
    return [header(data, offset), *parts]


async def send(stub: BuilderStub, requests: Iterable[UploadFileRequest]) -> None:
    await stub.UploadFile(iter(requests))


async def failure(stub: BuilderStub, requests: Iterable[UploadFileRequest]) -> EnginehouseError:
    with pytest.raises(grpc.RpcError) as caught:
        await send(stub, requests)
    return rpc.from_rpc_error(caught.value)


def left(spool: Path) -> list[str]:
    return [path.name for path in spool.iterdir()]


def fill(spool: Path, data: bytes) -> None:
    spool.mkdir()
    (spool / f"{sha256(data)}.partial").write_bytes(data)


def in_spool(spool: Path) -> int:
    path = spool / f"{sha256(WEIGHTS)}.partial"
    return path.stat().st_size if path.exists() else 0


async def arrived(spool: Path, size: int) -> None:
    """Returns when so much of the weights is in the spool."""
    for _ in range(6000):
        if in_spool(spool) >= size:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{size} bytes did not arrive")


# What is offered


async def test_a_checkpoint(stub: BuilderStub, store: Store, spool: Path) -> None:
    first = await offer(stub)
    assert (first.checkpoint, missing(first)) == ("", {sha256(data): 0 for data in FILES.values()})
    for data in FILES.values():
        await send(stub, messages(data))
    second = await offer(stub)
    assert not second.missing
    kept = checkpoints.get(store, second.checkpoint.removeprefix("upload://"))
    assert kept.files == tuple(describe(name, data) for name, data in sorted(FILES.items()))
    assert all(store.read(blob_key(ref.digest)) == FILES[ref.name] for ref in kept.files)
    assert left(spool) == []
    assert (await offer(stub, dict(reversed(FILES.items())))).checkpoint == second.checkpoint
    other = await offer(stub, {**FILES, "copy.json": b"{}"})  # all its bytes are here
    assert other.checkpoint not in ("", second.checkpoint)


async def test_only_what_is_new_is_missing(stub: BuilderStub) -> None:
    for data in FILES.values():
        await send(stub, messages(data))
    assert missing(await offer(stub, {**FILES, "config.json": b"[]"})) == {sha256(b"[]"): 0}


async def test_what_counts_as_there(stub: BuilderStub, store: Store) -> None:
    """A blob in its full size, and the record of its chunks; neither alone."""
    put_bytes(store, "config.json", b"{}")
    assert sha256(b"{}") in missing(await offer(stub))
    for data in FILES.values():
        await send(stub, messages(data))
    assert (await offer(stub)).checkpoint
    store.replace(blob_key(sha256(WEIGHTS)), WEIGHTS[:-1])
    assert missing(await offer(stub)) == {sha256(WEIGHTS): 0}
    store.delete(blob_key(sha256(WEIGHTS)))
    assert missing(await offer(stub)) == {sha256(WEIGHTS): 0}
    await send(stub, messages(WEIGHTS))
    assert (await offer(stub)).checkpoint


GOOD = OfferedFile("model.safetensors", "ab" * 32, 5)
CONFIG = OfferedFile("config.json", "cd" * 32, 2)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "no config.json"),
        ([GOOD], "no config.json"),
        (
            [OfferedFile("a.gguf", "ab" * 32, 5), OfferedFile("b.gguf", "ef" * 32, 5)],
            "several GGUF files, a.gguf, b.gguf",
        ),
        (
            [OfferedFile("a-00001-of-00000.gguf", "ab" * 32, 5), OfferedFile("b-00003-of-00002.gguf", "ef" * 32, 5)],
            "several GGUF files, a-00001-of-00000.gguf, b-00003",
        ),
        ([CONFIG, GOOD, OfferedFile("a/b.json", "ef" * 32, 1)], "'a/b.json'"),
        ([CONFIG, GOOD, OfferedFile("..", "ef" * 32, 1)], "'..'"),
        ([CONFIG, GOOD, OfferedFile(".hidden", "ef" * 32, 1)], "'.hidden'"),
        ([CONFIG, GOOD, OfferedFile("", "ef" * 32, 1)], "''"),
        ([CONFIG, GOOD, OfferedFile("a\0b", "ef" * 32, 1)], "file name"),
        ([CONFIG, GOOD, OfferedFile("x" * 256, "ef" * 32, 1)], "file name"),
        ([CONFIG, GOOD, GOOD], "two files are called 'model.safetensors'"),
        ([CONFIG, OfferedFile("model.safetensors", "AB" * 32, 5)], "model.safetensors: sha256 'ABAB"),
        ([CONFIG, OfferedFile("model.safetensors", "../" * 21 + "x", 5)], "model.safetensors: sha256"),
        ([CONFIG, OfferedFile("model.safetensors", "ab" * 32, -1)], "model.safetensors: size -1"),
        ([CONFIG, GOOD, OfferedFile("b.json", "ab" * 32, 6)], "b.json: another file of the same digest has 5 bytes"),
        ([CONFIG, GOOD, *(OfferedFile(f"{n}.json", "ef" * 32, 1) for n in range(1000))], "1002 files"),
    ],
)
def test_what_is_no_checkpoint(uploads: Uploads, files: list[OfferedFile], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        uploads.offer(files)


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "pytorch_model.bin"],
        ["config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
        ["model.gguf"],
        ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf", "tokenizer.json"],
    ],
)
def test_every_format_may_be_offered(uploads: Uploads, names: list[str]) -> None:
    files = [OfferedFile(name, f"{number:064x}", 1) for number, name in enumerate(names)]
    assert uploads.offer(files).missing == {file.digest: 0 for file in files}


# What comes in pieces


async def test_files_come_while_offers_wait_for_a_garbage_collection(
    stub: BuilderStub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many offers: there are more of them here than threads."""
    over = threading.Event()
    monkeypatch.setattr(sweeps, "wait_until_over", lambda _: over.wait(60))
    offers = [asyncio.create_task(offer(stub)) for _ in range(20)]
    try:
        while len(list(store.list("pins/"))) < 8:  # noqa: ASYNC110  (other threads)
            await asyncio.sleep(0.01)
        async with asyncio.timeout(60):
            await send(stub, messages(WEIGHTS))
        assert not any(task.done() for task in offers)
    finally:
        over.set()
        await asyncio.gather(*offers, return_exceptions=True)
    assert sha256(WEIGHTS) not in missing(offers[0].result())


async def test_an_upload_goes_on(stub: BuilderStub, store: Store) -> None:
    error = await failure(stub, messages(WEIGHTS, end=2_000_000))
    assert (type(error), error.reason, error.metadata["offset"]) == (FailedPrecondition, "UPLOAD_INCOMPLETE", "2000000")
    assert missing(await offer(stub))[sha256(WEIGHTS)] == 2_000_000
    error = await failure(stub, messages(WEIGHTS, offset=2_000_001))
    assert (type(error), error.reason, error.metadata["offset"]) == (FailedPrecondition, "UPLOAD_OFFSET", "2000000")
    await send(stub, messages(WEIGHTS, offset=2_000_000))
    assert store.read(blob_key(sha256(WEIGHTS))) == WEIGHTS


async def test_what_overlaps_is_replaced(stub: BuilderStub, store: Store) -> None:
    wrong = [header(WEIGHTS), UploadFileRequest(data=WEIGHTS[:1000] + b"x" * 5000)]
    assert (await failure(stub, wrong)).reason == "UPLOAD_INCOMPLETE"
    assert (await failure(stub, messages(WEIGHTS, offset=1000, end=1500))).metadata["offset"] == "1500"
    assert missing(await offer(stub))[sha256(WEIGHTS)] == 1500  # what stood behind is gone
    await send(stub, messages(WEIGHTS, offset=1500))
    assert store.read(blob_key(sha256(WEIGHTS))) == WEIGHTS


async def test_a_lost_call_keeps_what_has_come(stub: BuilderStub, spool: Path) -> None:
    call = stub.UploadFile()
    for message in messages(WEIGHTS, end=2 << 20):
        await call.write(message)
    await arrived(spool, 2 << 20)
    call.cancel()
    async with asyncio.timeout(60):
        while True:  # until the server has noticed
            try:
                await send(stub, messages(WEIGHTS, offset=2 << 20))
                break
            except grpc.RpcError as error:
                assert rpc.from_rpc_error(error).reason == "UPLOAD_IN_PROGRESS"


async def test_all_bytes_came_but_not_the_end(stub: BuilderStub, spool: Path) -> None:
    fill(spool, WEIGHTS)
    assert missing(await offer(stub))[sha256(WEIGHTS)] == len(WEIGHTS)
    await send(stub, [header(WEIGHTS, len(WEIGHTS))])
    assert sha256(WEIGHTS) not in missing(await offer(stub))


async def test_a_file_that_is_there_needs_no_bytes(stub: BuilderStub) -> None:
    await send(stub, messages(WEIGHTS))
    await send(stub, [header(WEIGHTS)])


async def test_one_writer_at_a_time(stub: BuilderStub, store: Store, spool: Path) -> None:
    call = stub.UploadFile()
    await call.write(header(WEIGHTS))
    await call.write(UploadFileRequest(data=WEIGHTS[:1000]))
    await arrived(spool, 1000)
    error = await failure(stub, messages(WEIGHTS))
    assert (type(error), error.reason) == (FailedPrecondition, "UPLOAD_IN_PROGRESS")
    await call.write(UploadFileRequest(data=WEIGHTS[1000:]))
    await call.done_writing()
    await call
    assert store.read(blob_key(sha256(WEIGHTS))) == WEIGHTS


async def test_bytes_that_are_not_what_the_digest_says(stub: BuilderStub, store: Store, spool: Path) -> None:
    wrong = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    error = await failure(stub, [header(WEIGHTS), *messages(wrong)[1:]])
    assert (type(error), error.reason) == (DataLoss, "UPLOAD_DIGEST_MISMATCH")
    assert "send the file again" in error.message
    assert left(spool) == []
    assert store.size(blob_key(sha256(WEIGHTS))) is None
    assert missing(await offer(stub))[sha256(WEIGHTS)] == 0


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([], "HEADER_MISSING"),
        ([UploadFileRequest(data=b"x")], "HEADER_MISSING"),
        ([header(b"xy"), header(b"xy")], "DATA_MISSING"),
        ([header(b"xy"), UploadFileRequest()], "DATA_MISSING"),
        ([header(b"xy"), UploadFileRequest(data=b"xyz")], "UPLOAD_TOO_LONG"),
        ([header(WEIGHTS), UploadFileRequest(data=bytes((4 << 20) + 1))], "MESSAGE_TOO_LARGE"),
        ([header(b"xy", 3)], "OFFSET_INVALID"),
        ([UploadFileRequest(header=UploadFileHeader(sha256="../../x", size=1))], "DIGEST_INVALID"),
    ],
)
async def test_what_is_no_upload(stub: BuilderStub, requests: list[UploadFileRequest], reason: str) -> None:
    error = await failure(stub, requests)
    assert (type(error), error.reason) == (InvalidArgument, reason)


# The spool


@pytest.mark.parametrize("end", [SpoolFile.break_off, SpoolFile.close])
def test_what_was_broken_off_is_not_opened(uploads: Uploads, end: Callable[[SpoolFile], None]) -> None:
    """A lost call's end may come before the opening that was on its way to another thread: the file stays free."""
    lost = uploads.receive(sha256(WEIGHTS), len(WEIGHTS), 0)
    end(lost)
    with pytest.raises(Unavailable) as caught:
        lost.open()
    assert caught.value.reason == "UPLOAD_BROKEN_OFF"
    following = uploads.receive(sha256(WEIGHTS), len(WEIGHTS), 0)
    following.open()
    following.close()


async def test_a_file_is_free_after_a_call_that_is_cancelled_twice(uploads: Uploads, spool: Path) -> None:
    """The second time while the file's end waits for a thread."""
    over, uploads.pool = threading.Event(), ThreadPoolExecutor(1)

    async def requests() -> AsyncIterator[UploadFileRequest]:
        for message in messages(WEIGHTS, end=1000):
            yield message
        await asyncio.Event().wait()

    call = asyncio.create_task(UploadServicer(uploads).UploadFile(requests(), None))  # type: ignore[arg-type]
    try:
        await arrived(spool, 1000)
        await asyncio.sleep(0)
        uploads.pool.submit(over.wait, 60)
        for _ in range(2):
            call.cancel()
            await asyncio.sleep(0.1)
        await asyncio.wait([call], timeout=60)
        assert call.cancelled()
    finally:
        over.set()
        uploads.pool.shutdown()
    following = uploads.receive(sha256(WEIGHTS), len(WEIGHTS), 1000)
    following.open()
    following.close()


async def test_the_spool_forgets_after_a_day(stub: BuilderStub, spool: Path) -> None:
    for data in (WEIGHTS, b"{}"):
        await failure(stub, messages(data, end=1))
    day = time.time() - 24 * 3600
    os.utime(spool / f"{sha256(WEIGHTS)}.partial", (day - 10, day - 10))
    os.utime(spool / f"{sha256(b'{}')}.partial", (day + 10, day + 10))
    assert missing(await offer(stub)) == {sha256(WEIGHTS): 0, sha256(b"{}"): 1, sha256(b""): 0}
    assert left(spool) == [f"{sha256(b'{}')}.partial"]


async def test_a_full_disk(stub: BuilderStub, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(spool_module.os, "pwrite", full)
        error = await failure(stub, messages(WEIGHTS))
    assert type(error) is ResourceExhausted
    assert str(spool) in error.message and "--work-dir" in error.message
    await send(stub, messages(WEIGHTS))


async def test_the_builders_words_reach_a_client_that_is_writing(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far it is: grpc fails its next write before the status is there."""
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS * 4)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spool_module.os, "pwrite", full)
    async with BuilderClient(address) as builder:
        for _ in range(10):
            with pytest.raises(ResourceExhausted, match="--work-dir"):
                await builder.upload(tmp_path)


def test_a_directory_that_somebody_else_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o1777)
    prepare(tmp_path / "spool")
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(PermissionDenied, match="belongs to another user"):
        prepare(tmp_path / "spool")
