"""The sampler against its definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.core import Sampling
from executor_svc.sampler import philox, sample, uniform

COUNT = 20_000


def test_philox_known_answers() -> None:
    """From the Random123 distribution's kat_vectors; counters 2 and 3 are zero here, so the vectors with zeros only."""
    assert hex(int(philox(np.array([0], np.uint64), np.array([0], np.uint64))[0])) == "0x6627e8d5"


def test_philox_agrees_with_a_plain_implementation() -> None:
    def plain(seed: int, position: int) -> int:
        counter, key = [position & 0xFFFFFFFF, position >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [
                (right >> 32) ^ counter[1] ^ key[0],
                right & 0xFFFFFFFF,
                (left >> 32) ^ counter[3] ^ key[1],
                left & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return counter[0]

    pairs = [(0, 0), (1, 2), (2**64 - 1, 2**40 + 3), (0xDEADBEEF12345678, 77)]
    words = philox(
        np.array([seed for seed, _ in pairs], np.uint64), np.array([position for _, position in pairs], np.uint64)
    )
    assert [int(word) for word in words] == [plain(*pair) for pair in pairs]


def kept_by_definition(probabilities: list[float], top_k: int, top_p: float) -> list[float]:
    """top-k first, top-p on what is left, renormalized; for distinct probabilities."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(probabilities[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        mass += probabilities[token] / total
        if mass >= top_p:
            break
    scale = sum(probabilities[token] for token in kept)
    return [probabilities[token] / scale if token in kept else 0.0 for token in range(len(probabilities))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(1.7),
        Sampling(top_k=3),
        Sampling(top_p=0.6),
        Sampling(0.8, 5, 0.7),
        Sampling(1.0, 1),
    ],
)
def test_frequencies_are_the_distributions(sampling: Sampling) -> None:
    """Chi-square: the statistic of a right sampler is below the bound with probability 0.9999."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -2.5, 0.7, 1.6])
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1).tolist()
    wanted = kept_by_definition(probabilities, sampling.top_k, sampling.top_p)
    settings_ = [Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=9)] * COUNT
    tokens = sample(logits.expand(COUNT, -1), settings_, list(range(COUNT)))
    counts = np.bincount(tokens, minlength=8)
    assert all(count == 0 for count, share in zip(counts, wanted, strict=True) if share == 0)
    live = [(count, share * COUNT) for count, share in zip(counts, wanted, strict=True) if share > 0]
    statistic = sum((count - mean) ** 2 / mean for count, mean in live)
    freedom = max(len(live) - 1, 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 12


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    for numbers in (uniform([3] * COUNT, list(range(COUNT))), uniform(list(range(COUNT)), [3] * COUNT)):
        counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
        assert ((counts - COUNT / 50) ** 2 / (COUNT / 50)).sum() < 49 + 4 * math.sqrt(98) + 12
        assert numbers.min() >= 0 and numbers.max() < 1


rows = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 4, 1000]),
    st.sampled_from([0.1, 0.9, 1.0]),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(rows, min_size=1, max_size=6), at=st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_batch(drawn: list[tuple[float, int, float, int]], at: int) -> None:
    torch.manual_seed(at % 1000)
    logits = torch.randn(len(drawn), 50).bfloat16().float()  # coarse, so that there are ties
    chosen = [Sampling(*row) for row in drawn]
    together = sample(logits, chosen, [at] * len(drawn))
    alone = [sample(logits[row : row + 1], [chosen[row]], [at])[0] for row in range(len(drawn))]
    assert together == alone
    for row, sampling in enumerate(chosen):
        if sampling.temperature == 0:
            assert together[row] == int(logits[row].argmax())


def test_extreme_logits_stay_within_the_vocabulary() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")], [1e30, -1e30, 0.0]])
    assert sample(logits, [Sampling(seed=1), Sampling(seed=2)], [0, 0]) == [1, 0]
