"""Tokens drawn by the Triton kernels, in its interpreter, against draw.py with the sampler's numbers; and in the runner."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.token_table import TokenTable
from executor_svc.core import Sampling, Scheduled, Sequence
from executor_svc.draw import draw
from executor_svc.guides import Guides
from executor_svc.loader import LoadedEngine
from executor_svc.loop import scheduler_config
from executor_svc.sampler import answer, uniform
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.guided import guided
from tests.running import Engine, make_engine, run_ahead

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
cuda_runner = pytest.importorskip("executor_svc.cuda_runner")
layout = pytest.importorskip("executor_svc.cuda_layout")
kernels = pytest.importorskip("executor_svc.kernels.sample")

CHUNK = 256


def drawn(logits: torch.Tensor, samplings: list[Sampling], position: int) -> list[int]:
    """By the kernels, whose chunks are small."""
    items = [Scheduled(Sequence(0, 0, [0], 1, 9, sampling), position - 1, 1, True) for sampling in samplings]
    columns = torch.from_numpy(layout.draws(items, np.arange(len(items), dtype=np.int32)))
    tokens, before = logits.argmax(-1).int(), logits.clone()
    limited = any(sampling.limited for sampling in samplings)
    kernels.sample(logits, tokens, columns[: -len(items)], limited=limited, chunk=CHUNK)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return tokens.tolist()


def defined(logits: torch.Tensor, samplings: list[Sampling], position: int) -> list[int]:
    tokens = logits.argmax(-1)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    chosen = [samplings[row] for row in rows]
    numbers = uniform([sampling.seed for sampling in chosen], [position] * len(rows))
    tokens[rows] = draw(logits[rows].float(), chosen, torch.from_numpy(numbers))
    return tokens.tolist()


NORMAL = torch.randn(700, generator=torch.Generator().manual_seed(0))
ROWS = {
    "peaked": 8 * NORMAL,
    "in one bracket, more than a chunk": NORMAL / 50,
    "equal": torch.zeros(700),
    "one above equals": torch.zeros(700).index_fill(0, torch.tensor([500]), 0.7),
    "banned": (3 * NORMAL).masked_fill(NORMAL > 0.5, float("-inf")),
    "one left": torch.full((700,), float("-inf")).index_fill(0, torch.tensor([577]), 3.0),
    "rounded": (4 * NORMAL).bfloat16(),
}
SAMPLINGS = [
    Sampling(seed=2**64 - 1),
    Sampling(1e-30, seed=1),
    Sampling(2.0, 1, seed=2),
    Sampling(1.0, 300, 0.9, seed=3),
    Sampling(0.7, 40, 0.8, 4, 0.05),
    Sampling(1.0, 0, 1e-6, 5),
    Sampling(1.0, 0, 0.95, 6),
    Sampling(1.0, 0, 1.0, 7, 1.0),
    Sampling(1.3, 0, 0.999, 8, 0.3),
    Sampling(1.0, 2**32 - 1, 1.0, 9),
    Sampling(1.0, 2, 0.6, 10),
    Sampling(0.0, 5),
]


@pytest.mark.parametrize("logits", ROWS.values(), ids=list(ROWS))
def test_equals_the_definition(logits: torch.Tensor) -> None:
    rows = logits.repeat(len(SAMPLINGS), 1)
    assert drawn(rows, SAMPLINGS, 3) == defined(rows, SAMPLINGS, 3)


samplings = st.builds(
    Sampling,
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0, 0, 1, 20, 600]),
    st.sampled_from([0.2, 0.9, 0.99, 1.0]),
    st.integers(0, 2**64 - 1),
    st.sampled_from([0.0, 0.0, 0.1]),
)


@settings(max_examples=6, deadline=None)
@given(
    chosen=st.lists(samplings, min_size=1, max_size=3),
    key=st.integers(0, 99),
    vocab=st.sampled_from([40, 512, 513, 1000]),
    scale=st.sampled_from([0.2, 3.0]),
    position=st.integers(1, 2**31 - 1),
)
def test_equals_the_definition_in_any_batch(
    chosen: list[Sampling], key: int, vocab: int, scale: float, position: int
) -> None:
    chosen = [*chosen, Sampling(seed=key)]
    logits = torch.randn(len(chosen), vocab, generator=torch.Generator().manual_seed(key)) * scale
    assert drawn(logits, chosen, position) == defined(logits, chosen, position)


def test_a_row_that_says_nothing_keeps_its_token() -> None:
    logits = torch.full((2, 300), float("nan"))
    logits[1] = float("-inf")
    with np.errstate(invalid="ignore"):
        tokens = drawn(logits, [Sampling(1.0, 3, 0.5), Sampling()], 1)
    assert all(0 <= token < 300 for token in tokens)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)
    options = {"max_seq_len": 64, "max_batch_size": 4, "max_num_tokens": 24}
    return make_engine(checkpoint, tmp_path_factory.mktemp("store"), prepared=False, **options)


def run(engine: LoadedEngine, work: list[Sequence], monkeypatch: pytest.MonkeyPatch) -> list[list[Sequence]]:
    """By both runners, a batch ahead where that is possible; the sequences of each batch that went to the host's sampler."""
    monkeypatch.setattr(
        "executor_svc.kernels.decodes.SPLITS_FOR", 8
    )  # fewer programs, each of which takes its time here
    asked: list[list[Sequence]] = []

    def asking(logits: torch.Tensor, batch: Any) -> Any:
        asked.append([item.sequence for item in batch.items])
        return answer(logits, batch)

    monkeypatch.setattr(cuda_runner, "answer", asking)
    expected = [replace(one, token_ids=list(one.token_ids)) for one in work]
    Engine(engine).run(expected)
    runner = cuda_runner.CudaRunner(engine.program, engine.weights, engine.manifest.limits, device="cpu")
    run_ahead(runner, Scheduler(scheduler_config(runner, engine.manifest)), work)
    assert [one.token_ids for one in work] == [one.token_ids for one in expected]
    return asked


def request(number: int, sampling: Sampling, **fields: Any) -> Sequence:
    prompt = [(7 * number + 3 * at) % 60 for at in range(5 + 9 * number)]
    return Sequence(0, number, prompt, len(prompt), 4 + number, sampling, salt=b"%d" % number, **fields)


def test_the_runner_waits_for_nothing(engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [Sampling(0.0), Sampling(0.9, 20, 0.9, 1), Sampling(1.0, seed=2**63), Sampling(1.4, 0, 0.95, 3, 0.02)]
    assert not run(engine, [request(number, sampling) for number, sampling in enumerate(mixed)], monkeypatch)


def test_guided_rows_go_to_the_host_and_wait_for_their_tokens(
    engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch ahead, tokens are those of the runner that is never ahead."""
    size = engine.manifest.model.vocab_size
    guides = Guides(TokenTable((*(bytes([97 + token % 26]) for token in range(size - 1)), b"</s>"), (size - 1,)))
    monkeypatch.setattr("executor_svc.kernels.decodes.SPLITS_FOR", 8)
    try:
        free = request(0, Sampling(1.0, 30, seed=6))
        held, same = (
            guided(request(0, Sampling(0.9, seed=5), eos_ids=frozenset({size - 1})), guides, regex="(ab|c)*d?")
            for _ in range(2)
        )
        Engine(engine).run([same])
        runner = cuda_runner.CudaRunner(engine.program, engine.weights, engine.manifest.limits, device="cpu")
        run_ahead(runner, Scheduler(scheduler_config(runner, engine.manifest)), [free, held])
        assert held.token_ids == same.token_ids
        alone = request(0, Sampling(1.0, 30, seed=6))
        Engine(engine).run([alone])
        assert free.token_ids == alone.token_ids
    finally:
        guides.close()


def test_only_what_is_edited_or_told_goes_to_the_host(engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    least = request(0, Sampling(0.8, seed=5), min_tokens=2, eos_ids=frozenset({1}))
    work = [request(1, Sampling(1.0, 30, seed=6)), least]
    asked = run(engine, work, monkeypatch)
    assert len(asked) == 2 and all(least in batch for batch in asked)
    told = request(0, Sampling(0.8, seed=5), logprobs=0)
    asked = run(engine, [told], monkeypatch)
    assert len(asked) == told.num_completion
