"""What the integration tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse import LLM, Home
from tests.integration.llm_harness import DEMO
from tests.seaweed import SeaweedFS


@pytest.fixture(scope="module")
def bucket() -> Iterator[SeaweedFS]:
    """A server of S3 that a test may stop, if it starts it again; processes that the tests start find its credentials."""
    with SeaweedFS() as server:
        os.environ.update(server.environment)
        yield server
        for name in server.environment:
            del os.environ[name]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A data folder of the module's own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINEHOUSE_HOME", str(folder))
        yield Home.find()


@pytest.fixture(scope="module")
def engine_dir(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's engine, which is called demo in the home's store, too."""
    from builder_svc.pipeline import build  # imports torch, which most tests do without

    directory = tmp_path_factory.mktemp("engine") / "demo"
    engine = build(DEMO, store=home.store)
    engine.save(directory)
    engine.push(home.store, "demo")
    return directory


@pytest.fixture(scope="module")
def llm(engine_dir: Path) -> Iterator[LLM]:
    """One for a module's tests that leave it as it is."""
    with LLM(engine_dir) as made:
        yield made
