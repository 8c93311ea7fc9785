"""Engines of several ranks on several GPUs: sums inside graphs, and tokens that are drawn on every rank alike."""

import json
import os
from pathlib import Path

import pytest
import torch

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from enginehouse import GenerationExecutor, SamplingParams
from executor_svc.core import Sequence
from tests.gpu.test_torch_runner import DEMO, prompts
from tests.running import make_engine, shortfall
from tests.unit.peers_harness import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

# All of them take the most probable token: in the graph, by drawing one of one, on the host, and until one of many comes.
WAYS = (
    SamplingParams(max_tokens=48, ignore_eos=True),
    SamplingParams(max_tokens=48, ignore_eos=True, temperature=1.0, top_k=1, seed=3),
    SamplingParams(max_tokens=48, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=48, ignore_eos=True, stop_token_ids=list(range(0, 500, 20))),
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_give_the_tokens_of_one(tp: int, pp: int, dtype: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < tp * pp:
        pytest.skip(f"needs {tp * pp} GPUs")
    limits = {"max_seq_len": 512, "max_num_tokens": 200, "max_batch_size": 12}
    one = make_engine(DEMO, tmp_path / "store", "cuda", prepared=False, dtype=dtype, **limits)
    options = BuildConfig(device="cuda", dtype=dtype, tp_size=tp, pp_size=pp, **limits)
    several = build(DEMO, options, store=DirectoryStore(tmp_path / "store"))
    work = [(list(prompt), params) for prompt in prompts()[:8] for params in WAYS]
    with GenerationExecutor(several) as executor:
        results = [executor.generate_async(prompt, params) for prompt, params in work]
        tokens = [result.result().outputs[0].token_ids for result in results]
    assert len({len(found) for found in tokens[len(WAYS) - 1 :: len(WAYS)]}) > 2  # they end one by one
    for (prompt, params), found in zip(work, tokens, strict=True):
        assert len(found) == 48 or params is WAYS[-1]
        sequence = Sequence(0, 0, [*prompt, *found], len(prompt), len(found))
        assert shortfall(one, sequence).max() <= 0.02


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_equal_the_references(ranks: int) -> None:
    """By the kernel alone, and in a graph that is replayed."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    told = run_ranks(ranks, ["tests.unit.peers_harness", "cuda", "60"])
    assert told == ["the same\n"] * ranks


def test_both_ways_to_sum_give_the_tokens_of_one(tmp_path: Path) -> None:
    """Ranks' own kernel sums all that is small, in graphs and outside of them; or NCCL does."""
    limits = {"max_seq_len": 512, "max_num_tokens": 200, "max_batch_size": 12}
    one = make_engine(DEMO, tmp_path / "store", "cuda", prepared=False, dtype="bfloat16", **limits)
    options = BuildConfig(device="cuda", dtype="bfloat16", tp_size=2, **limits)
    engine_id = build(DEMO, options, store=DirectoryStore(tmp_path / "store")).manifest.engine_id
    for most in (1 << 20, 0):
        os.environ["ENGINEHOUSE_ALL_REDUCE_BYTES"] = str(most)
        try:
            told, _ = run_ranks(2, ["tests.gpu.sum_harness", str(tmp_path / "store"), engine_id])
        finally:
            del os.environ["ENGINEHOUSE_ALL_REDUCE_BYTES"]
        found = json.loads(told)
        ours = found["kernels"].get("_reduce", 0)
        theirs = sum(count for name, count in found["kernels"].items() if "AllReduce" in name)
        taken, left = (ours, theirs) if most else (theirs, ours)
        assert found["graphs"] and taken > 47 * (2 * len(one.program.caches) + 1) and not left
        for prompt, tokens in zip(prompts(), found["tokens"], strict=True):
            assert tokens[: len(prompt)] == prompt and len(tokens) == len(prompt) + 48
            assert shortfall(one, Sequence(0, 0, tokens, len(prompt), 48)).max() <= 0.02
