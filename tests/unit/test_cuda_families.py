"""Families on the runner of CUDA, by Triton's interpreter: each operator beside LLaMA's, and the plain runner's tokens."""

import os
from pathlib import Path

import pytest
import test_families
import test_families_experts
import test_families_gpt
import test_families_wide
import torch

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import blobs
from engine.directory import DirectoryStore
from engine.program import Program
from executor_svc.core import Sampling, Sequence
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine, run_ahead

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
cuda_runner = pytest.importorskip("executor_svc.cuda_runner")

GPT, WIDE, EXPERTS = test_families_gpt.CASES, test_families_wide.CASES, test_families_experts.CASES
# layer norms and gelu, learned positions; part of a head rotated, in pairs; alibi; norms of heads in two kinds; caps, windows and
# norms in float32; scaled residuals; layers without rotation; heads of 256; frequencies by length, of both kinds; experts
CASES = {
    **{name: GPT[name] for name in ("gpt2", "gptj", "falcon-rw")},
    **{name: WIDE[name] for name in ("stablelm-parallel-norms", "gemma2-caps", "gemma3", "granite", "smollm3")},
    "falcon3": ("llama", {**test_families.CASES["falcon3"][1], "num_hidden_layers": 1}),
    "phi3-longrope-partial-tied": test_families.CASES["phi3-longrope-partial-tied"],
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0}},
    ),
    **{name: EXPERTS[name] for name in ("mixtral", "qwen2-moe")},
}  # fmt: skip


QUICK = ("gemma3", "phi3-longrope-partial-tied", "falcon-rw", "gpt2", "qwen2-moe")
"""The kinds of norm, rope, attention and feed-forward; the others in drills."""


def work(count: int = 5) -> list[Sequence]:
    """A prompt that one step takes, and one in chunks that others decode beside; past 40 tokens, where LongRoPE begins again."""
    torch.manual_seed(1)
    prompts = [torch.randint(2, 320, (length,)).tolist() for length in (6, 37)]
    return [Sequence(0, row, prompt, len(prompt), count, Sampling(0.0)) for row, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.drill) for case in CASES]
)
def test_gives_the_plain_runners_tokens(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "executor_svc.kernels.decodes.SPLITS_FOR", 2
    )  # fewer programs, each of which takes its time here
    family, changes = CASES[case]
    layers = {"num_hidden_layers": len(changes.get("layer_types", [0, 0]))}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **{**layers, **changes})
    options = {"max_seq_len": 48, "max_batch_size": 2, "max_num_tokens": 24}
    loaded = make_engine(checkpoint, tmp_path / "store", prepared=False, dtype="float32", **options)
    half = build(
        checkpoint, BuildConfig(dtype="bfloat16", **options), store=DirectoryStore(tmp_path / "store")
    ).manifest
    program = Program.from_json(blobs.read(DirectoryStore(tmp_path / "store"), half.ranks[0].program))
    assert cuda_runner.CudaRunner.takes(program) and not cuda_runner.CudaRunner.takes(loaded.program)
    expected, found = work(), work()
    Engine(loaded).run(expected)
    runner = cuda_runner.CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits, device="cpu")
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), found)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
