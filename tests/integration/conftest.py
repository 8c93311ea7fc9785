"""What the integration tests share."""

import os
from collections.abc import Iterator

import pytest

from tests.seaweed import SeaweedFS


@pytest.fixture(scope="module")
def bucket() -> Iterator[SeaweedFS]:
    """A server of S3 that a test may stop, if it starts it again; processes that the tests start find its credentials."""
    with SeaweedFS() as server:
        os.environ.update(server.environment)
        yield server
        for name in server.environment:
            del os.environ[name]
