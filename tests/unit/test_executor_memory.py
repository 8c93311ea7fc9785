"""Memory of weights and KV cache."""

from pathlib import Path

import pytest
import torch

from executor_svc import memory


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_zeros_that_can_be_written(size: int) -> None:
    found = memory.zeros(size)
    assert found.dtype == torch.uint8 and found.shape == (size,) and not found.any()
    found.fill_(7)
    assert int(found.sum(dtype=torch.int64)) == 7 * size


def test_pages_are_taken_when_they_are_written_and_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size, before = 256 << 20, resident()
    found = memory.zeros(size).view(torch.bfloat16)
    assert resident() - before < size // 8
    found[: len(found) // 2] = 1
    assert resident() - before > size // 3
    del found
    assert resident() - before < size // 8
