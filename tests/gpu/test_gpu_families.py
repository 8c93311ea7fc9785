"""Each family's operators in CUDA graphs, a batch ahead, in 16 bits: the plain runner's tokens, up to near ties."""

from pathlib import Path
from typing import Any

import pytest
import test_cuda_families
import test_quantized
import torch
from families_harness import watch
from quantized_writers import save_quantized

from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine, run_ahead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# Rounding turns near ties of routers around, and then everything differs: there a token goes through all experts.
ALL_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 5}


@pytest.mark.parametrize("case", test_cuda_families.CASES)
def test_gives_the_plain_runners_tokens(case: str, tmp_path: Path) -> None:
    family, changes = test_cuda_families.CASES[case]
    experts = ALL_EXPERTS if family in ("mixtral", "qwen2_moe") else {}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **{"num_hidden_layers": 3, **changes, **experts})
    check(checkpoint, tmp_path / "store")


@pytest.mark.parametrize("case", ["awq", "gptq-8-row", "float"])
def test_packed_weights_run_in_graphs(case: str, tmp_path: Path) -> None:
    """Four bits, eight, and fp8: references that make each matrix at every step."""
    plain = save_checkpoint(tmp_path / "plain", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    chosen = test_quantized.CASES[case]
    save_quantized(plain, tmp_path / "packed", chosen.config, test_quantized.no_head(chosen.writer))
    check(tmp_path / "packed", tmp_path / "store")


def check(checkpoint: Path, store: Path) -> None:
    from executor_svc.cuda_runner import CudaRunner

    options = {"max_seq_len": 64, "max_batch_size": 2, "max_num_tokens": 24}
    loaded = make_engine(checkpoint, store, "cuda", dtype="float16", **options)
    assert CudaRunner.takes(loaded.program)
    expected, found = test_cuda_families.work(16), test_cuda_families.work(16)
    plain = Engine(loaded)
    rows = watch(plain)
    plain.run(expected)
    runner = CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits)
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), found)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.token_ids) == len(theirs.token_ids)
        pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=True))
        at = next((at for at, (one, other) in pairs if one != other), None)
        if at is not None:  # behind it they are two texts
            logits = rows[ours.handle, at - 1]
            assert logits[ours.token_ids[at]] >= logits.max() - 0.02 * logits.abs().max(), f"token {at}"
