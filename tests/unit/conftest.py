"""What the unit tests share."""

import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.backends import open_store
from engine.s3 import S3Store
from engine.store import Store
from tests.seaweed import SeaweedFS

MIB = 1024 * 1024
# "endpoint" is any S3 that ENGINEHOUSE_TEST_S3=s3://bucket/prefix?endpoint=... names, with credentials in AWS_*
BACKENDS = ["directory", "seaweedfs", *(["endpoint"] if os.environ.get("ENGINEHOUSE_TEST_S3") else [])]


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedFS]:
    """One server for all tests, which share its bucket and each have a prefix of it."""
    with SeaweedFS() as server:
        yield server


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store of each backend; a new backend is one more parameter and one more branch."""
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    prefix = f"test-{secrets.token_hex(8)}"
    if request.param == "seaweedfs":
        server: SeaweedFS = request.getfixturevalue("seaweed")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        return S3Store(
            server.url(prefix), part_size=5 * MIB
        )  # the least that S3 allows: files of several parts stay small
    base, _, query = os.environ["ENGINEHOUSE_TEST_S3"].partition("?")
    return S3Store(f"{base.rstrip('/')}/{prefix}?{query}", part_size=5 * MIB)


@pytest.fixture
def directory_store(tmp_path: Path) -> Store:
    """An empty store for tests that would show nothing more on another backend."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A file of several transfer steps and several parts, with a tail."""
    path = tmp_path / "large"
    path.write_bytes(random.Random(1).randbytes(16 * MIB + 5))
    return path
