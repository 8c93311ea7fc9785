"""Long load and fault tests; `make drills` runs them."""

import pytest

from tests.integration.test_soak import addresses, soak

__all__ = ["addresses"]

pytestmark = pytest.mark.drill


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_thousand_random_requests(addresses: tuple[str, str], seed: int) -> None:
    await soak(*addresses, count=1000, at_once=150, seed=seed)
