"""Tokens drawn by the Triton kernels on the device, at real sizes, against draw.py there; and a runner that waits for nothing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executor_svc.core import Batch, Sampling, Scheduled, Sequence
from executor_svc.draw import draw
from executor_svc.loop import scheduler_config
from executor_svc.sampler import uniform
from executor_svc.scheduler import Scheduler
from tests.gpu.test_torch_runner import DEMO, prompts
from tests.running import Engine, make_engine, run_ahead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

NEAR = 1e-5
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 20_000, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 1e-6},
]


@contextmanager
def waiting_refused() -> Iterator[None]:
    """What waits for the device raises RuntimeError."""
    with warnings.catch_warnings(action="ignore"):  # that not all that waits is found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def borders(logits: torch.Tensor, sampling: Sampling, number: float) -> list[tuple[int, int]]:
    """[first, last] tokens that a number within NEAR may find, for each of the sets that shares within NEAR leave; in float64."""
    scaled = (logits.float() - logits.float().amax()) / torch.tensor(sampling.temperature, device=logits.device)
    weights = scaled.double().exp()
    ordered, ids = weights.sort(descending=True)
    top_k = min(sampling.top_k or len(weights), len(weights))
    mass = ordered[:top_k].cumsum(0)
    found = []
    for side in (-NEAR, 0, NEAR):
        least = scaled[ids[top_k - 1]]
        if sampling.top_p < 1:
            needed = int((mass < (sampling.top_p + side) * mass[-1]).sum())
            least = scaled[ids[min(needed, top_k - 1)]]
        for ratio in {sampling.min_p * (1 - NEAR), sampling.min_p * (1 + NEAR)}:
            cumulative = weights.where((scaled >= least) & (weights >= ratio), 0).cumsum(0)
            targets = torch.tensor([number - NEAR, number + NEAR], device=logits.device).double() * cumulative[-1]
            first, last = torch.searchsorted(cumulative, targets.clamp(min=0), right=True).tolist()
            found.append((first, last))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [128256, 151936])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equals_the_definition(dtype: torch.dtype, vocab: int, scale: float) -> None:
    from executor_svc.cuda_layout import draws
    from executor_svc.kernels.sample import sample

    torch.manual_seed(int(scale))
    total = differing = 0
    for rows in (1, 2, 9, 64, 256):
        logits = (torch.randn(rows, vocab, device="cuda") * scale).to(dtype)
        samplings = [Sampling(**SETTINGS[(row + rows) % len(SETTINGS)], seed=row * 2**55 + rows) for row in range(rows)]
        items = [Scheduled(Sequence(0, 0, [0], 1, 9, sampling), row, 1, True) for row, sampling in enumerate(samplings)]
        columns = draws(items, np.zeros(rows, dtype=np.int32))
        wanted = logits.argmax(-1)
        tokens = wanted.int()
        chosen = [row for row in range(rows) if samplings[row].temperature > 0]
        numbers = uniform([samplings[row].seed for row in chosen], [row + 1 for row in chosen])
        wanted[chosen] = draw(
            logits[chosen].float(), [samplings[row] for row in chosen], torch.from_numpy(numbers).cuda()
        )
        if len(columns):
            settings = torch.from_numpy(columns[:-rows]).cuda()
            with waiting_refused():
                sample(logits, tokens, settings, limited=True)
        for row in (tokens != wanted).nonzero().flatten().tolist():
            number, token = numbers[chosen.index(row)], int(tokens[row])
            allowed = borders(logits[row], samplings[row], number)
            assert any(first <= token <= last for first, last in allowed), (rows, row, samplings[row], token, allowed)
            differing += 1
        total += rows
    print(f"{differing} of {total} rows differ, all at a border")
    assert differing <= total // 20


def test_the_same_whatever_the_chunks_and_the_rows_beside() -> None:
    from executor_svc.cuda_layout import draws
    from executor_svc.kernels.sample import sample

    torch.manual_seed(3)
    logits = torch.randn(18, 128256, device="cuda") * 2
    items = [
        Scheduled(Sequence(0, 0, [0], 1, 9, Sampling(**SETTINGS[row % 9], seed=row)), 7, 1, True) for row in range(18)
    ]
    settings = torch.from_numpy(draws(items, np.zeros(18, dtype=np.int32))[:-18]).cuda()
    found = []
    for chunk in (1024, 2048, 4096):
        tokens = logits.argmax(-1).int()
        sample(logits, tokens, settings, limited=True, chunk=chunk)
        found.append(tokens)
    alone = logits.argmax(-1).int()
    for row in range(18):
        sample(logits[row : row + 1], alone[row : row + 1], settings[8 * row : 8 * row + 8], limited=True)
    assert all(torch.equal(tokens, alone) for tokens in found)


def test_the_runner_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from executor_svc import cuda_runner

    def work() -> list[Sequence]:
        made = []
        for number in range(24):
            prompt, sampling = list(prompts()[number % 8]), Sampling(**SETTINGS[number % 5], seed=number)
            made.append(Sequence(0, number, prompt, len(prompt), 30 + number % 7, sampling, salt=b"%d" % (number % 2)))
        return made

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a batch of rows that nothing edits went through the host")

    loaded = make_engine(
        DEMO, tmp_path, "cuda", dtype="float32", max_seq_len=512, max_num_tokens=200, max_batch_size=20
    )
    expected, found = work(), work()
    Engine(loaded).run(expected)
    monkeypatch.setattr(cuda_runner, "answer", refuse)
    runner = cuda_runner.CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits)
    start = runner.start

    def watched(batch: Batch) -> None:
        with waiting_refused():
            start(batch)

    monkeypatch.setattr(runner, "start", watched)
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), found)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
