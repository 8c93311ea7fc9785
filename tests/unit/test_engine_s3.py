"""What only S3 can show: credentials, refusals, outages, broken connections, parts, TLS."""

import datetime
import http.server
import ipaddress
import json
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from store_harness import MIB, Proxy, interrupt, keys, scripted_store

from engine import blobs, s3_client, s3_transport
from engine.backends import open_store
from engine.errors import (
    DataLoss,
    EnginehouseError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from engine.manifest import CHUNK_SIZE
from engine.s3 import S3Store
from engine.s3_client import S3Client
from tests.seaweed import ACCESS_KEY, SECRET_KEY, SeaweedFS

PART = 5 * MIB


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The credentials of the test server, and nothing of this machine's own."""
    for name in (
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_CA_BUNDLE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def prefix() -> str:
    return f"s3-{secrets.token_hex(8)}"


@pytest.fixture
def s3(seaweed: SeaweedFS, prefix: str) -> S3Store:
    return S3Store(seaweed.url(prefix), part_size=PART)


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[Proxy]:
    line = Proxy(seaweed.endpoint)
    yield line
    line.close()


def through(proxy: Proxy, seaweed: SeaweedFS, prefix: str) -> S3Store:
    """The store as it is at the other end of a line."""
    return S3Store(f"s3://{seaweed.bucket}/{prefix}?endpoint={proxy.endpoint}", patience=5, part_size=PART)


# URLs


def test_a_url_names_all_that_another_process_needs(monkeypatch: pytest.MonkeyPatch):
    assert open_store("s3://bucket").url == "s3://bucket?endpoint=https://s3.us-east-1.amazonaws.com&region=us-east-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert (
        open_store("s3://bucket/a/").url == "s3://bucket/a?endpoint=https://s3.eu-west-1.amazonaws.com&region=eu-west-1"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:1")
    assert open_store("s3://bucket/a/b").url == "s3://bucket/a/b?endpoint=http://one:1&region=eu-west-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two:2")
    assert "endpoint=http://two:2&" in open_store("s3://bucket").url
    given = "s3://bucket?endpoint=http://three:3&region=other"
    assert open_store(given).url == given
    assert open_store(open_store(given).url).url == given


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://", "no bucket's name"),
        ("s3://Bucket", "'Bucket' is no bucket's name"),
        ("s3://bucket:80/x", "no bucket's name"),
        ("s3://bucket/../x", "no store"),
        ("s3://bucket/.x", "no store"),
        ("s3://bucket#x", "no store"),
        ("s3://bucket?endpoint=http://a:1&endpoint=http://b:1", "no store"),
        ("s3://bucket?reigon=x", "unknown parameter 'reigon'"),
        ("s3://bucket?endpoint=ftp://host", "scheme in endpoint must be http or https"),
        ("s3://bucket?endpoint=localhost:8333", "give https://host or http://host:port"),
        ("s3://bucket?endpoint=http://host/path", "path in endpoint"),
    ],
)
def test_urls_that_cannot_be_right(url: str, words: str):
    with pytest.raises(InvalidArgument, match=words):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket", "s3://bucket?endpoint=http://key:secret@host:1"])
def test_secrets_in_a_url_are_refused_and_not_repeated(url: str):
    with pytest.raises(InvalidArgument, match="AWS_ACCESS_KEY_ID") as caught:
        open_store(url)
    assert "secret@" not in str(caught.value)


def test_a_directory_needs_no_client(tmp_path: Path):
    script = (
        "import sys; from engine.backends import open_store; open_store(sys.argv[1]); print('minio' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# Credentials


def test_credentials_from_a_file(seaweed: SeaweedFS, prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    text = f"[default]\naws_access_key_id = x\naws_secret_access_key = y\n[mine]\naws_access_key_id = {ACCESS_KEY}\n"
    (tmp_path / "credentials").write_text(text + f"aws_secret_access_key = {SECRET_KEY}\n")
    with pytest.raises(PermissionDenied, match="InvalidAccessKeyId"):
        open_store(seaweed.url(prefix)).read("key")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store = open_store(seaweed.url(prefix))
    assert store.create("key", b"x")
    assert store.read("key") == b"x"


class _Metadata(http.server.BaseHTTPRequestHandler):
    """What a container's metadata service says of its role."""

    def do_GET(self) -> None:
        role = {
            "AccessKeyId": ACCESS_KEY,
            "SecretAccessKey": SECRET_KEY,
            "Token": "",
            "Expiration": "2099-01-01T00:00:00Z",
        }
        data = json.dumps(role).encode()
        self.send_response(200 if self.headers["Authorization"] == "container" else 403)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def test_credentials_of_a_role(seaweed: SeaweedFS, prefix: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{service.server_port}/role")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "container")
        store = open_store(seaweed.url(prefix))
        assert store.create("key", b"x")
        assert store.read("key") == b"x"
        service.shutdown()


@pytest.mark.parametrize("content", [None, "[other]\naws_access_key_id = x\n", "no such format"])
def test_no_credentials_in_words(
    seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    if content:
        (tmp_path / "credentials").write_text(content)
    began = time.monotonic()
    with pytest.raises(PermissionDenied, match="no credentials.*AWS_ACCESS_KEY_ID.*AWS_SHARED_CREDENTIALS_FILE.*role"):
        open_store(seaweed.url()).read("key")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_in_words(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch, large_file: Path, name: str):
    monkeypatch.setenv(name, "wrong")
    store = open_store(seaweed.url())
    for attempt in (
        lambda: store.read("key"),
        lambda: store.size("key"),
        lambda: store.create("key", b""),
        lambda: store.upload("key", large_file),
        lambda: list(store.list("")),
        lambda: store.delete("key"),
        lambda: store.discard_partial(0),
    ):
        with pytest.raises(PermissionDenied, match=r"bucket 'enginehouse'.*Set credentials") as caught:
            attempt()
        assert caught.value.reason == "STORE_DENIED"


def test_a_bucket_that_is_not_there(seaweed: SeaweedFS, large_file: Path):
    store = open_store(f"s3://no-such-bucket?endpoint={seaweed.endpoint}")
    for attempt in (
        lambda: store.read("key"),
        lambda: store.size("key"),
        lambda: store.create("key", b""),
        lambda: store.upload("key", large_file),
        lambda: list(store.list("")),
    ):
        with pytest.raises(NotFound, match=r"no bucket 'no-such-bucket' at http.*create it") as caught:
            attempt()
        assert caught.value.reason == "BUCKET_NOT_FOUND"


# What a store may answer


@pytest.mark.parametrize(
    ("status", "code", "kind", "reason", "words"),
    [
        (403, "QuotaExceeded", ResourceExhausted, "STORE_FULL", "full while writing key"),
        (507, "XMinioStorageFull", ResourceExhausted, "STORE_FULL", "full while writing key"),
        (507, "", ResourceExhausted, "STORE_FULL", "full while writing key"),
        (403, "RequestTimeTooSkewed", PermissionDenied, "CLOCK_SKEWED", "set the clock"),
        (400, "ExpiredToken", PermissionDenied, "STORE_DENIED", "ExpiredToken: in words"),
        (403, "", PermissionDenied, "STORE_DENIED", "AccessDenied"),
        (301, "PermanentRedirect", InvalidArgument, "STORE_REGION_WRONG", "region= in the store's URL"),
        (400, "AuthorizationHeaderMalformed", InvalidArgument, "STORE_REGION_WRONG", "'us-east-1'"),
        (405, "MethodNotAllowed", FailedPrecondition, "STORE_REFUSED", "MethodNotAllowed"),
        (501, "NotImplemented", FailedPrecondition, "STORE_REFUSED", "NotImplemented"),
    ],
)
def test_refusals_in_words(status: int, code: str, kind: type[EnginehouseError], reason: str, words: str):
    with scripted_store((status, code)) as (endpoint, requests):
        with pytest.raises(kind, match=words) as caught:
            open_store(f"s3://bucket?endpoint={endpoint}").replace("key", b"x")
        assert caught.value.reason == reason
        assert len(requests) == 1 + (code == "ExpiredToken")  # the credentials are looked up anew, once


@pytest.mark.parametrize("busy", [(503, "SlowDown"), (500, ""), (502, ""), (409, "ConditionalRequestConflict")])
def test_a_busy_store_is_asked_again(busy: tuple[int, str]):
    with scripted_store(busy, busy, (200, "")) as (endpoint, requests):
        assert open_store(f"s3://bucket?endpoint={endpoint}").create("key", b"x")
        assert list(requests) == ["PUT /bucket/key"] * 3


def test_a_store_that_stays_busy_is_given_up():
    with scripted_store((503, "SlowDown")) as (endpoint, requests):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"tried \d+ times in \d+\.\d s: SlowDown: in words") as caught:
            open_store(f"s3://bucket?endpoint={endpoint}", patience=1).read("key")
        assert 1 <= time.monotonic() - began < 30
        assert caught.value.reason == "STORE_UNAVAILABLE"
        assert 1 < len(requests) < 20


def test_a_success_that_turns_out_to_be_none():
    """So may the end of a multipart upload."""
    with scripted_store((200, "InternalError")) as (endpoint, requests):
        store = S3Store(f"s3://bucket?endpoint={endpoint}", patience=0.5)
        with pytest.raises(Unavailable, match="InternalError"):
            store._client.request("POST", "key", query={"uploadId": "x"})
        assert len(requests) > 1


def test_an_endpoint_that_is_something_else():
    with scripted_store((200, "")) as (endpoint, _), pytest.raises(FailedPrecondition, match=r"Is it S3\?"):
        list(open_store(f"s3://bucket?endpoint={endpoint}").list(""))


# A store that is not there


def test_nobody_listens(prefix: str, large_file: Path):
    store = S3Store("s3://bucket?endpoint=http://127.0.0.1:9", patience=0.5)
    for attempt in (
        lambda: store.read("key"),
        lambda: store.read_into("key", 0, memoryview(bytearray(1))),
        lambda: store.upload("key", large_file),
    ):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"at http://127.0.0.1:9.*tried \d+ times in .* s.*refused") as caught:
            attempt()
        assert 0.5 <= time.monotonic() - began < 30
        assert caught.value.reason == "STORE_UNAVAILABLE"


def test_a_host_that_has_no_name():
    with pytest.raises(Unavailable, match=r"no-such-host.invalid"):
        open_store("s3://bucket?endpoint=http://no-such-host.invalid", patience=0).read("key")


def test_a_store_that_takes_connections_and_says_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3_transport, "READ_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Unavailable, match="timed out"):
            open_store(f"s3://bucket?endpoint={endpoint}", patience=1).read("key")
        assert 1 <= time.monotonic() - began < 30


def test_patience_is_a_bound_when_the_store_says_nothing(tmp_path: Path):
    """With the timeouts as they are: one read may take 15 s, and patience is over before."""
    (tmp_path / "file").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = open_store(f"s3://bucket?endpoint=http://127.0.0.1:{listener.getsockname()[1]}", patience=3)
        verbs: list[Callable[[], object]] = [
            lambda: store.read("key"),
            lambda: store.read_into("key", 0, memoryview(bytearray(1))),
            lambda: store.size("key"),
            lambda: store.create("key", b"x"),
            lambda: list(store.list("")),
            lambda: store.delete("key"),
        ]
        began = time.monotonic()
        with ThreadPoolExecutor(len(verbs)) as pool:
            errors = [running.exception() for running in [pool.submit(verb) for verb in verbs]]
        assert 3 <= time.monotonic() - began < 15
    for error in errors:
        assert isinstance(error, Unavailable), error
        assert "tried 2 times in" in error.message  # a connection that died unnoticed is worth a second one


def test_a_body_that_takes_longer_than_patience_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    """Patience begins when the last byte has left, and bytes that leave for a store that never answers do not renew it."""
    now = [0.0]
    monkeypatch.setattr(s3_client.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(s3_client.time, "sleep", lambda _: None)
    attempts = s3_client.Attempts("PUT", patience=5)
    now[0] = 100
    attempts.sent()
    attempts.failed(TimeoutError())
    now[0] = 104
    attempts.sent()
    attempts.failed(TimeoutError())
    now[0] = 105
    with pytest.raises(Unavailable, match=r"tried 3 times in 5\.0 s"):
        attempts.failed(TimeoutError())


@pytest.fixture(scope="module")
def mortal() -> Iterator[SeaweedFS]:
    """A server that tests may kill."""
    with SeaweedFS() as server:
        yield server


def outage(server: SeaweedFS) -> threading.Thread:
    """Kills the server; it comes again after a second."""
    server.stop(signal.SIGKILL)

    def again() -> None:
        time.sleep(1)
        server.start()

    thread = threading.Thread(target=again)
    thread.start()
    return thread


def test_an_outage_in_the_middle_of_an_upload_is_survived(mortal: SeaweedFS, prefix: str, large_file: Path):
    store = S3Store(mortal.url(prefix), patience=60, part_size=PART)
    outages: list[threading.Thread] = []
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        steps.append(done)
        if not outages:
            outages.append(outage(mortal))

    store.upload("blobs/x", large_file, progress)
    outages[0].join()
    assert store.read("blobs/x") == large_file.read_bytes()
    assert steps == sorted(steps)


def test_an_outage_in_the_middle_of_a_read_is_survived(mortal: SeaweedFS, prefix: str, large_file: Path):
    S3Store(mortal.url(prefix)).upload("blobs/x", large_file)
    outages: list[threading.Thread] = []
    line = Proxy(mortal.endpoint)

    def cut(_: bytes, before: int) -> bool:
        if before > 6 * MIB and not outages:
            outages.append(outage(mortal))
        return False

    line.cut_answer = cut
    buffer = bytearray(large_file.stat().st_size)
    S3Store(f"s3://{mortal.bucket}/{prefix}?endpoint={line.endpoint}", patience=60).read_into(
        "blobs/x", 0, memoryview(buffer)
    )
    line.close()
    outages[0].join()
    assert buffer == large_file.read_bytes()


# Lines that break


def test_a_read_goes_on_where_the_line_broke(
    seaweed: SeaweedFS, s3: S3Store, proxy: Proxy, prefix: str, large_file: Path
):
    s3.upload("blobs/x", large_file)
    received: list[int] = []

    def cut(data: bytes, before: int) -> bool:
        received.append(len(data))
        return before > 3 * MIB

    proxy.cut_answer = cut
    buffer = bytearray(large_file.stat().st_size)
    through(proxy, seaweed, prefix).read_into("blobs/x", 0, memoryview(buffer))
    assert buffer == large_file.read_bytes()
    assert sum(received) < len(buffer) + 4 * MIB  # what had come was not read again


@pytest.mark.parametrize("there", [False, True])
def test_a_create_whose_answer_is_lost(seaweed: SeaweedFS, s3: S3Store, proxy: Proxy, prefix: str, there: bool):
    if there:
        s3.create("key", b"theirs")
    lost: list[bytes] = []

    def cut(data: bytes, before: int) -> bool:
        lost.append(data)
        return len(lost) == 1

    proxy.cut_answer = cut
    assert through(proxy, seaweed, prefix).create("key", b"ours") is not there
    assert lost[0].startswith(b"HTTP/1.1 412" if there else b"HTTP/1.1 200")
    assert lost[1].startswith(b"HTTP/1.1 412")
    assert s3.read("key") == (b"theirs" if there else b"ours")


# Parts

UPLOAD = """
import sys, time
from pathlib import Path
from engine.s3 import S3Store
store = S3Store(sys.argv[1], part_size=int(sys.argv[3]))
def progress(done, total):
    print(done, flush=True)
    if done >= 10 * 2**20:
        time.sleep(60)
store.upload("blobs/x", Path(sys.argv[2]), progress)
"""


def test_an_upload_resumes_what_a_killed_process_left(
    seaweed: SeaweedFS, s3: S3Store, proxy: Proxy, prefix: str, tmp_path: Path
):
    size = 41 * MIB + 5
    path = tmp_path / "file"
    path.write_bytes(random.Random(2).randbytes(size))
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, s3.url, path, str(PART)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    while int(process.stdout.readline()) < 10 * MIB:
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    (left,) = s3._uploads._list(prefix)[0]
    kept, deadline = 0, time.monotonic() + 60
    while kept < 10 * MIB:  # what had reached the server before the end may become a part later, and more than we count
        assert time.monotonic() < deadline
        kept = sum(part.size for part in s3._uploads._parts(left).values())
    steps: list[int] = []
    through(proxy, seaweed, prefix).upload("blobs/x", path, lambda done, _: steps.append(done))
    assert 0 < proxy.sent < size - kept + MIB
    assert steps[0] > kept
    assert s3.read("blobs/x") == path.read_bytes()
    assert s3.discard_partial(0) == 0


def test_a_part_that_is_damaged_is_sent_again(s3: S3Store, prefix: str, large_file: Path):
    interrupt(s3, "blobs/x", large_file, at=10 * MIB)
    (left,) = s3._uploads._list(prefix)[0]
    there = s3._uploads._parts(left)
    number = min(there)
    query = {"partNumber": str(number), "uploadId": left.id}
    s3._client.request("PUT", f"{prefix}/blobs/x", query=query, body=bytes(there[number].size))
    s3.upload("blobs/x", large_file)
    assert s3.read("blobs/x") == large_file.read_bytes()


@pytest.mark.parametrize("times", [1, 100])
def test_a_part_that_the_store_has_otherwise_than_it_was_sent(
    s3: S3Store, large_file: Path, monkeypatch: pytest.MonkeyPatch, times: int
):
    damaged: list[str] = []
    request = S3Client.request

    def damage(client: S3Client, method: str, key: str = "", **options: object) -> object:
        response = request(client, method, key, **options)  # type: ignore[arg-type]
        if method == "PUT" and len(damaged) < times:
            damaged.append(key)
            del response.headers["ETag"]
            response.headers["ETag"] = '"00000000000000000000000000000000"'
        return response

    monkeypatch.setattr(S3Client, "request", damage)
    if times == 1:
        s3.upload("blobs/x", large_file)
        assert s3.read("blobs/x") == large_file.read_bytes()
    else:
        with pytest.raises(DataLoss, match="arrives damaged"):
            s3.upload("blobs/x", large_file)
        assert s3.size("blobs/x") is None


def test_uploads_under_other_prefixes_are_left_alone(seaweed: SeaweedFS, s3: S3Store, prefix: str, large_file: Path):
    other = S3Store(seaweed.url(f"{prefix}-other"), part_size=PART)
    interrupt(other, "blobs/x", large_file, at=4 * MIB)
    interrupt(s3, "blobs/x", large_file, at=4 * MIB)
    time.sleep(1.1)  # times are whole seconds
    assert s3.discard_partial(age=0) == 1
    assert other.discard_partial(age=0) == 1


@pytest.mark.drill
def test_an_upload_that_still_grows_is_not_discarded(s3: S3Store, prefix: str, large_file: Path):
    interrupt(s3, "blobs/x", large_file, at=4 * MIB)
    (left,) = s3._uploads._list(prefix)[0]
    time.sleep(4.1)
    query = {"partNumber": "9", "uploadId": left.id}
    s3._client.request("PUT", left.key, query=query, body=b"new")
    assert s3.discard_partial(age=4) == 0
    time.sleep(4.1)
    assert s3.discard_partial(age=4) == 1


def test_an_upload_that_others_discard_begins_again(s3: S3Store, large_file: Path):
    discarded: list[int] = []

    def progress(done: int, total: int) -> None:
        if not discarded:
            time.sleep(1.1)
            discarded.append(s3.discard_partial(0))

    s3.upload("blobs/x", large_file, progress)
    assert discarded == [1]
    assert s3.read("blobs/x") == large_file.read_bytes()


# Many objects, large objects


def test_listings_of_several_pages(s3: S3Store, monkeypatch: pytest.MonkeyPatch):
    names = sorted(f"models/{number % 3}/{number}" for number in range(25))
    for name in names:
        s3.create(name, b"x")
    pages: list[str] = []
    request = S3Client.request

    def small(client: S3Client, method: str, key: str = "", **options: object) -> object:
        query = options.get("query")
        if isinstance(query, dict) and "list-type" in query:
            pages.append(query.get("continuation-token", ""))
            options["query"] = {**query, "max-keys": "10"}
        return request(client, method, key, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(S3Client, "request", small)
    assert keys(s3, "models/") == names
    assert len(pages) == 3


def test_files_are_read_back_verified_in_parallel(seaweed: SeaweedFS, s3: S3Store, prefix: str, tmp_path: Path):
    path = tmp_path / "weights"
    data = bytearray(random.Random(3).randbytes(2 * CHUNK_SIZE + 7))
    path.write_bytes(data)
    ref = blobs.describe("weights", bytes(data))
    blobs.put_file(s3, ref, path)
    assert blobs.read(s3, ref) == data
    data[CHUNK_SIZE + 1] ^= 1
    s3.replace(blobs.blob_key(ref.digest), bytes(data))
    with pytest.raises(DataLoss, match=r"weights.*chunk 1") as caught:
        blobs.read(s3, ref)
    assert caught.value.reason == "CHUNK_DIGEST_MISMATCH"
    data[CHUNK_SIZE + 1] ^= 1
    s3.replace(blobs.blob_key(ref.digest), bytes(data[:-1]))
    with pytest.raises(DataLoss) as caught:
        blobs.read(s3, ref)
    assert caught.value.reason == "OBJECT_TRUNCATED"


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A server's certificate, its key, and the certificate of the authority that signed it."""
    directory = tmp_path_factory.mktemp("tls")
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test authority")])
    now = datetime.datetime.now(datetime.UTC)

    def signed(subject: x509.Name, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> bytes:
        certificate = (
            x509.CertificateBuilder(authority, subject, public, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(authority_key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    (directory / "server.pem").write_bytes(signed(x509.Name([]), key.public_key(), host))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (directory / "ca.pem").write_bytes(
        signed(authority, authority_key.public_key(), x509.BasicConstraints(ca=True, path_length=None))
    )
    return directory / "server.pem", directory / "key.pem", directory / "ca.pem"


def test_tls_with_an_authority_of_ones_own(
    certificate: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, large_file: Path
):
    with SeaweedFS(certificate) as server:
        with pytest.raises(FailedPrecondition, match="not trusted.*AWS_CA_BUNDLE") as caught:
            open_store(server.url()).read("key")
        assert caught.value.reason == "STORE_UNTRUSTED"
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[2]))
        store = S3Store(server.url(), part_size=PART)
        store.upload("blobs/x", large_file)
        assert store.read("blobs/x") == large_file.read_bytes()
        buffer = bytearray(7 * MIB)
        store.read_into("blobs/x", MIB, memoryview(buffer))
        assert buffer == large_file.read_bytes()[MIB : 8 * MIB]


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_ca_bundle_that_holds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None):
    if content:
        (tmp_path / "ca.pem").write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with pytest.raises(InvalidArgument, match="AWS_CA_BUNDLE"):
        open_store("s3://bucket")
