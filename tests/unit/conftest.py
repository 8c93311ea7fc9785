"""What the unit tests share."""

import random
from pathlib import Path

import pytest

from engine.backends import open_store
from engine.store import Store


@pytest.fixture(params=["directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each backend; a new backend is one more parameter and one more branch."""
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    raise NotImplementedError(request.param)


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A file of several transfer steps, with a tail."""
    path = tmp_path / "large"
    path.write_bytes(random.Random(1).randbytes(9 * 1024 * 1024 + 5))
    return path
