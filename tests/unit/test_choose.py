"""The tokens that masks allow, the most probable and random ones, by the library against torch and the definition."""

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


@pytest.mark.parametrize("size", [*SIZES, 1024, 20_000])
def test_random_tokens_are_where_the_sum_of_probabilities_exceeds_the_number(size: int) -> None:
    """By the definition in float64, up to rounding; the same alone."""
    rows, numbers = 12, np.random.default_rng(size)
    logits = 3 * torch.randn(rows, size + 3, generator=torch.Generator().manual_seed(size))[:, :size]
    logits[0, 1::2] = -torch.inf
    masks: list[np.ndarray | None] = [
        numbers.integers(0, 256, 4 * -(-size // 32), dtype=np.uint8) if row % 3 else None for row in range(rows)
    ]
    for mask in masks[1::3]:
        assert mask is not None
        mask[1 : -(-size // 8) - 1] = 0  # most of the vocabulary is passed over
    for mask in masks:
        if mask is not None:
            mask[-(-size // 8) - 1] |= 1  # not empty
    temperatures = {row: (0.3, 1.0, 2.0)[row % 3] for row in range(rows) if row != 5}
    shares = numbers.integers(0, 2**24, len(temperatures)) * 2.0**-24
    shares[:4] = 0, 1 - 2**-24, 0, 1 - 2**-24
    bits = 32 * -(-size // 32)
    found = choose.tokens(logits, addresses(masks), bits, temperatures, shares).tolist()
    assert found[5] == choose.tokens(logits, addresses(masks), bits)[5]
    for (row, temperature), share in zip(temperatures.items(), shares, strict=True):
        exact, mask = logits[row].double().numpy(), masks[row]
        allowed = mask is None or np.unpackbits(mask, count=size, bitorder="little").astype(bool)
        weights = np.where(allowed & (exact > -np.inf), np.exp(exact / temperature), 0)
        mass = np.concatenate([[0.0], weights.cumsum() / weights.sum()])
        token = found[row]
        assert weights[token] > 0 and mass[token] - 1e-5 <= share <= mass[token + 1] + 1e-5
        one = choose.tokens(logits[row : row + 1], addresses([mask]), bits, {0: temperature}, [share])
        assert one.tolist() == [token]


def test_random_tokens_of_extreme_logits_are_allowed_ones() -> None:
    mask = np.array([0b1110, 0, 0, 0], dtype=np.uint8)
    rows = torch.tensor([[torch.nan, 0, 1e30, -1e30], [9, -torch.inf, -torch.inf, -torch.inf], [9, 0, torch.nan, 1]])
    heats = dict.fromkeys(range(3), 1e-30)
    assert choose.tokens(rows, addresses([mask] * 3), 32, heats, [0.99] * 3).tolist() == [2, 1, 2]


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
    tests = (
        "test_the_best_of_what_is_allowed",
        "test_random_tokens_are_where_the_sum_of_probabilities_exceeds_the_number",
    )
    code = (
        f"from tests.unit import test_choose as t\nfor size in {SIZES}:\n for test in {tests}: getattr(t, test)(size)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ENGINEHOUSE_CPU": most})
