"""Columns on their way to a device that is behind."""

import numpy as np
import pytest
import torch

from executor_svc.cuda_host import HostMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_columns_that_wait_for_the_device_are_not_overwritten() -> None:
    """As in a pipeline, where nobody waits for the parts of a long prompt."""
    host = HostMemory(torch.device("cuda"), in_flight=2, columns=8, rows=4)
    found = []
    for number in range(12):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms, in which the host is long done
        found += host.send(np.full(4, number, dtype=np.int32), np.full(40, -number, dtype=np.int32))
    assert [part.tolist() for part in found[::2]] == [[number] * 4 for number in range(12)]
    assert [part.tolist() for part in found[1::2]] == [[-number] * 40 for number in range(12)]
