"""Each family's operators in CUDA graphs, a batch ahead: the plain runner's tokens, in float32 on the same device."""

from pathlib import Path

import pytest
import test_cuda_families
import torch

from executor_svc.scheduler import Scheduler
from executor_svc.worker import scheduler_config
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine, run_ahead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("case", test_cuda_families.CASES)
def test_gives_the_plain_runners_tokens(case: str, tmp_path: Path) -> None:
    from executor_svc.cuda_runner import CudaRunner

    family, changes = test_cuda_families.CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **{"num_hidden_layers": 3, **changes})
    options = {"max_seq_len": 64, "max_batch_size": 2, "max_num_tokens": 24}
    loaded = make_engine(checkpoint, tmp_path / "store", "cuda", dtype="float32", **options)
    expected, found = test_cuda_families.work(16), test_cuda_families.work(16)
    Engine(loaded).run(expected)
    runner = CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits)
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), found)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
