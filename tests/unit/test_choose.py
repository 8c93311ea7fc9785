"""The most probable tokens that masks allow, by the library against torch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from executor_svc.kernels import choose, native

pytestmark = pytest.mark.skipif(
    not native.available, reason="compiled without a C compiler: torch's operators are used"
)

SIZES = (1, 3, 16, 31, 100, 257, 3071)


def case(size: int, seed: int) -> tuple[Tensor, list[np.ndarray | None], Tensor]:
    """Logits with equal ones, infinities and a NaN; masks of every other row; logits of which each row has the allowed ones."""
    generator, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    logits = torch.randn(9, size + 5, generator=generator).round(decimals=1)[:, :size]  # rows lie apart
    logits[0] = -torch.inf
    logits[1, -1], logits[2, -1] = torch.nan, torch.inf
    words = -(-size // 32)
    masks: list[np.ndarray | None] = [
        numbers.integers(0, 256, 4 * words, dtype=np.uint8) if row % 2 else None for row in range(8)
    ]
    masks.append(np.zeros(4 * words, dtype=np.uint8))
    only = numbers.integers(size)
    masks[-1][only >> 3] = 1 << (only & 7)  # type: ignore[index]
    allowed = logits.clone()
    for row, mask in zip(allowed, masks, strict=True):
        if mask is not None:
            row[~torch.from_numpy(np.unpackbits(mask, count=size, bitorder="little")).bool()] = -torch.inf
    return logits, masks, allowed


def addresses(masks: list[np.ndarray | None]) -> list[int]:
    return [0 if mask is None else mask.ctypes.data for mask in masks]


@pytest.mark.parametrize("size", SIZES)
def test_the_best_of_what_is_allowed(size: int) -> None:
    for seed in range(5):
        logits, masks, allowed = case(size, seed)
        bits = 32 * -(-size // 32)
        found, wanted = choose.tokens(logits, addresses(masks), bits), allowed.argmax(-1)
        some = allowed.isnan().any(-1) | (allowed > -torch.inf).any(-1)  # where all are -inf, torch gives the first
        assert torch.equal(found[some], wanted[some])
        for row, mask in enumerate(masks):
            if mask is not None and mask.any() and row != 1:
                assert mask[found[row] >> 3] >> (found[row] & 7) & 1 or found[row] == 0
        choose.forbid(logits, addresses(masks), bits)
        assert torch.equal(logits.nan_to_num(7), allowed.nan_to_num(7))


def test_an_allowed_token_is_chosen_if_all_are_impossible() -> None:
    mask = np.array([0, 2, 0, 0], dtype=np.uint8)
    assert choose.tokens(torch.full((1, 20), -torch.inf), addresses([mask]), 32).tolist() == [9]
    assert choose.tokens(torch.full((1, 20), -torch.inf), [0]).tolist() == [0]


def test_masks_of_other_logits_are_refused() -> None:
    mask = np.full(4, 255, dtype=np.uint8)
    with pytest.raises(ValueError, match="1 masks of 32 tokens do not belong to logits"):
        choose.tokens(torch.zeros(1, 33), addresses([mask]), 32)
    with pytest.raises(ValueError, match="do not belong"):
        choose.forbid(torch.zeros(2, 32), addresses([mask]), 32)


@pytest.mark.parametrize("most", ["avx2", "plain"])
def test_every_instruction_set(most: str) -> None:
    """The processor's best is what the other tests run."""
    if os.environ.get("ENGINEHOUSE_CPU"):
        pytest.skip("runs with less than the best itself")
    code = f"from tests.unit import test_choose as t\nfor size in {SIZES}: t.test_the_best_of_what_is_allowed(size)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ENGINEHOUSE_CPU": most})
