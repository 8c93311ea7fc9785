"""The sampler against its definition."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.core import Batch, Sampling, Scheduled, Sequence
from executor_svc.processors import History, edit
from executor_svc.sampler import answer, philox, sample, uniform

COUNT = 10_000


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


def row_of(sampling: Sampling, completion: tuple[int, ...] = (), **fields: Any) -> Sequence:
    """A sequence behind whose tokens the next is chosen."""
    return Sequence(0, 0, [*PROMPT, *completion], len(PROMPT), 99, sampling, **fields)


def by_definition(logits: list[float], sequence: Sequence) -> list[float]:
    """The probabilities of the next token: every step as it is defined, for one row, token by token."""
    sampling, completion = sequence.sampling, sequence.token_ids[sequence.prompt_len :]
    scores = [logit + dict(sampling.logit_bias).get(token, 0.0) for token, logit in enumerate(logits)]
    for *beginning, token in sampling.bad_words:
        if not beginning or sequence.token_ids[-len(beginning) :] == beginning:
            scores[token] = -math.inf
    if len(completion) < sequence.min_tokens:
        for token in sequence.eos_ids | sequence.stop_ids:
            scores[token] = -math.inf
    for token in range(len(scores)):
        if token in sequence.token_ids:
            penalty = sampling.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if token in completion:
            scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * completion.count(token)
    weights = [math.exp(score / sampling.temperature) for score in scores]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if sampling.top_k:
        order = [token for token in order if weights[token] >= weights[order[: sampling.top_k][-1]]]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if mass >= sampling.top_p * total and weights[token] < weights[kept[-1]]:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[order[0]]]
    scale = sum(weights[token] for token in kept)
    return [weights[token] / scale if token in kept else 0.0 for token in range(len(weights))]


PROMPT = [2, 2, 4]
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": -0.3}


@pytest.mark.parametrize(
    "sequence",
    [
        row_of(Sampling()),
        row_of(Sampling(0.5)),
        row_of(Sampling(1.7)),
        row_of(Sampling(top_k=3)),
        row_of(Sampling(1.0, 1)),
        row_of(Sampling(top_p=0.6)),
        row_of(Sampling(0.8, 5, 0.7)),
        row_of(Sampling(min_p=0.1)),
        row_of(Sampling(1.5, min_p=0.35)),
        row_of(Sampling(1.2, 6, 0.93, min_p=0.2)),
        row_of(Sampling(repetition_penalty=1.8), (0, 7)),
        row_of(Sampling(repetition_penalty=0.7), (0, 7)),
        row_of(Sampling(presence_penalty=0.9), (0, 0, 7)),
        row_of(Sampling(frequency_penalty=0.5), (0, 0, 0, 7)),
        row_of(Sampling(logit_bias=((1, 2.0), (2, -1.5), (5, 100.0)))),
        row_of(Sampling(logit_bias=((1, 2.0), (2, -3.0)))),
        row_of(Sampling(bad_words=((2,), (4, 7), (2, 4, 0), (4, 4, 1)))),
        row_of(Sampling(), (3,), min_tokens=2 * COUNT, eos_ids=frozenset({2}), stop_ids=frozenset({7, 4})),
        row_of(Sampling(), (3, 3), min_tokens=2, eos_ids=frozenset({2}), stop_ids=frozenset({7, 4})),
        row_of(Sampling(0.8, **PENALTIES), (0, 0, 7)),
        row_of(Sampling(0.9, 6, 0.9, min_p=0.05, logit_bias=((1, 2.5),), bad_words=((0, 7),), **PENALTIES), (1, 7, 0)),
    ],
    ids=lambda sequence: str(sequence.sampling).split("(", 1)[1],
)
def test_frequencies_are_the_distributions(sequence: Sequence) -> None:
    """Chi-square: the statistic of a right sampler is below the bound with probability 0.9999."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -2.5, 0.7, 1.6])
    wanted = by_definition(logits.tolist(), sequence)
    first = len(sequence.token_ids)
    tokens = sample(logits.expand(COUNT, -1), [sequence] * COUNT, list(range(first, first + COUNT))).token_ids
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


sampled_tokens = st.integers(0, 49)
samplings = st.builds(
    Sampling,
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 4, 1000]),
    st.sampled_from([0.1, 0.9, 1.0]),
    st.integers(0, 2**64 - 1),
    st.sampled_from([0.0, 0.0, 0.2, 1.0]),
    st.sampled_from([1.0, 1.0, 0.5, 1.5]),
    st.sampled_from([0.0, 0.0, -1.0, 2.0]),
    st.sampled_from([0.0, 0.0, 0.5]),
    st.dictionaries(sampled_tokens, st.floats(-100, 100, width=32), max_size=3).map(lambda bias: tuple(bias.items())),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=2).map(tuple), max_size=3).map(tuple),
)
sequences = st.builds(
    lambda sampling, completion, min_tokens, logprobs, candidates: row_of(
        sampling,
        tuple(completion),
        min_tokens=min_tokens,
        eos_ids=frozenset({1}),
        stop_ids=frozenset({30}),
        logprobs=logprobs,
        candidates=candidates,
    ),
    samplings,
    st.lists(st.integers(0, 5), max_size=5),
    st.sampled_from([0, 0, 3]),
    st.sampled_from([None, None, 0, 4, 20]),
    st.sampled_from([0, 0, 0, 3]),
)


@settings(max_examples=100, deadline=None)
@given(drawn=st.lists(sequences, min_size=1, max_size=6), key=st.integers(0, 999))
def test_a_row_does_not_depend_on_its_batch(drawn: list[Sequence], key: int) -> None:
    torch.manual_seed(key)
    logits = torch.randn(len(drawn), 50).bfloat16().float()  # coarse, so that there are ties
    before = logits.clone()
    positions = [len(sequence.token_ids) for sequence in drawn]
    together = sample(logits, drawn, positions)
    assert torch.equal(logits, before), "others read them, too"
    for row, sequence in enumerate(drawn):
        alone = sample(logits[row : row + 1], [replace(sequence, edits=None)], positions[row : row + 1])
        assert (together.token_ids[row], together.logprobs.get(row)) == (alone.token_ids[0], alone.logprobs.get(0))
        if sequence.plain:
            assert together.token_ids[row] == int(logits[row].argmax()) and row not in together.logprobs


WIDE = 20_000  # tokens: a set may be found among the 256 or the 4096 most probable ones, or needs them all sorted


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.2, top_p=0.9),
        Sampling(0.6, top_p=0.7),
        Sampling(2.0, top_p=0.98),
        Sampling(1.0, 100, 0.5),
        Sampling(1.0, 1000, 0.8),
        Sampling(3.0, 10_000, 0.9, min_p=0.01),
        Sampling(1e-30),
    ],
    ids=str,
)
def test_wide_vocabularies(sampling: Sampling) -> None:
    """Against the definition with one sort in float64: the same token for every number, together and alone."""
    torch.manual_seed(5)
    logits = torch.randn(12, WIDE) * 2.5
    rows = [row_of(replace(sampling, seed=seed)) for seed in range(12)]
    numbers = uniform(list(range(12)), [3] * 12)
    tokens = sample(logits, rows, [3] * 12).token_ids
    for row, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
        exact = logits[row].double().numpy()
        weights = np.exp((exact - exact.max()) / sampling.temperature)
        ordered = np.sort(weights)[::-1][: sampling.top_k or None]
        needed = int((np.cumsum(ordered) < sampling.top_p * ordered.sum()).sum())
        bound = ordered[min(needed, len(ordered) - 1)] if sampling.limited else 0.0
        weights[weights < max(bound, sampling.min_p)] = 0
        mass = weights.cumsum()
        assert token == int(np.searchsorted(mass, number * mass[-1], side="right"))
        assert sample(logits[row : row + 1], [rows[row]], [3]).token_ids == [token]


def test_extreme_logits_stay_within_the_vocabulary() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")], [1e30, -1e30, 0.0]])
    assert sample(logits, [row_of(Sampling(seed=1)), row_of(Sampling(seed=2))], [0, 0]).token_ids == [1, 0]
    nothing_left = torch.tensor([[float("nan")] * 3, [float("-inf")] * 3, [0.0, 1.0, 2.0]])
    everything_bad = row_of(Sampling(0.7, 2, 0.5, bad_words=((0,), (1,), (2,))))
    found = sample(nothing_left, [row_of(Sampling(top_p=0.5)), row_of(Sampling(top_k=2)), everything_bad], [3] * 3)
    assert all(0 <= token < 3 for token in found.token_ids)


def test_log_probabilities_are_the_models_own() -> None:
    """Before bias, penalties and temperature; those of a beam's candidates are behind its edits."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.1, -2.5, 0.7, 1.6]]).repeat(3, 1)
    bias = Sampling(0.0, logit_bias=((3, 50.0), (1, -100.0)))
    rows = [row_of(bias, logprobs=2), row_of(Sampling(0.0)), row_of(bias, candidates=2)]
    found = sample(logits, rows, [3] * 3)
    scores = torch.log_softmax(logits[0].double(), -1)
    assert found.token_ids == [3, 2, 3] and set(found.logprobs) == {0, 2}
    own, candidates = found.logprobs[0], found.logprobs[2]
    assert (own.top, own.top_token_ids) == (2, [2, 7])
    assert own.logprobs == pytest.approx([float(scores[3])])
    assert own.top_logprobs == pytest.approx([float(scores[2]), float(scores[7])])
    assert (candidates.logprobs, candidates.top_token_ids) == ([], [3, 2])
    assert candidates.top_logprobs == pytest.approx([float(scores[3]) + 50, float(scores[2])])


def test_a_history_catches_up_with_what_is_new() -> None:
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(0, 300, 40).tolist()
    history = History(tokens[:25])
    for _ in range(30):
        history.catch_up(tokens)
        counts = dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))
        assert counts == {token: float(tokens[25:].count(token)) for token in tokens}
        tokens += numbers.integers(0, 300, int(numbers.integers(0, 9))).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_edits_equal_transformers_processors(seed: int) -> None:
    """Repetition penalty, bad words, bias, minimum length and the warpers, on the same logits, for rows of mixed settings."""
    torch.manual_seed(seed)
    vocab, numbers = 60, np.random.default_rng(seed)
    sequences, wanted = [], []
    logits = torch.randn(8, vocab) * 3
    for row in range(8):
        prompt, completion = numbers.integers(2, vocab, 9).tolist(), numbers.integers(2, vocab, row).tolist()
        everything = prompt + completion
        bias = {int(token): float(numbers.normal()) for token in numbers.choice(vocab, 4, replace=False)}
        words = [[5], [*everything[-2:], 7], [*everything[-1:], 8], [3, 4, 9]]
        sampling = Sampling(
            0.8,
            12,
            0.9,
            row,
            min_p=0.05,
            repetition_penalty=1.3,
            logit_bias=tuple(bias.items()),
            bad_words=tuple(map(tuple, words)),
        )
        least = 10_000 * (row % 2)
        sequences.append(
            Sequence(0, 0, everything, len(prompt), 50, sampling, eos_ids=frozenset({0, 1}), min_tokens=least)
        )
        ids, scores = torch.tensor([everything]), logits[row : row + 1].clone()
        for processor in (
            transformers.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
            transformers.NoBadWordsLogitsProcessor(words),
            transformers.MinNewTokensLengthLogitsProcessor(len(prompt), least, [0, 1]),
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
        ):
            scores = processor(ids, scores)
        wanted.append(scores)
    edited = logits.clone()
    edit(edited, sequences, [len(sequence.token_ids) for sequence in sequences])
    assert torch.allclose(edited, torch.cat(wanted), rtol=1e-6)
    for row, scores in enumerate(wanted):
        for warper in (
            transformers.TemperatureLogitsWarper(0.8),
            transformers.TopKLogitsWarper(12),
            transformers.TopPLogitsWarper(0.9),
            transformers.MinPLogitsWarper(0.05),
        ):
            scores = warper(None, scores)
        kept = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
        sequence = sequences[row]
        positions = list(range(len(sequence.token_ids), 1000))
        drawn = sample(logits[row].expand(len(positions), -1), [sequence] * len(positions), positions).token_ids
        assert set(drawn) <= kept
        probable = torch.softmax(scores[0], -1) > 0.01
        assert set(probable.nonzero().flatten().tolist()) <= set(drawn)


def test_a_tiny_repetition_penalty_leads_to_no_infinity() -> None:
    sampling = Sampling(temperature=1.0, seed=3, repetition_penalty=1e-45)
    row = Sequence(client=1, handle=1, token_ids=[1, 2], prompt_len=2, max_tokens=9, sampling=sampling)
    assert sample(torch.arange(8.0)[None], [row], [2]).token_ids[0] in (1, 2)


def test_bans_that_leave_nothing_are_not_kept() -> None:
    """Longer words are checked as they come: a vocabulary of 4, all of which are banned behind token 3."""
    words = tuple((3, token) for token in range(4))
    sequence = Sequence(0, 0, [0, 3], 2, 4, Sampling(0.0, bad_words=words))
    batch = Batch(1, (Scheduled(sequence, 0, 2, True),))
    assert answer(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), batch).token_ids == [2]
