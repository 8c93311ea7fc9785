"""The runner with graphs, a batch ahead, against the plain one on the device and transformers."""

from pathlib import Path

import pytest
import torch

from executor_svc.core import Sampling, Sequence
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.gpu.test_torch_runner import DEMO, prompts
from tests.running import Engine, make_engine, run_ahead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def work(count: int, temperature: float = 0.0) -> list[Sequence]:
    made = []
    for number in range(count):
        prompt = list(prompts()[number % 8])
        sampling = Sampling(temperature if number % 3 == 1 else 0.0, seed=number)
        made.append(Sequence(0, number, prompt, len(prompt), 40 + number % 7, sampling, salt=b"%d" % (number % 2)))
    return made


@pytest.mark.parametrize(("temperature", "blocks"), [(0.0, None), (0.7, None), (0.0, 70)])
def test_gives_the_plain_runners_tokens(tmp_path: Path, temperature: float, blocks: int | None) -> None:
    from executor_svc.cuda_runner import CudaRunner

    loaded = make_engine(
        DEMO, tmp_path, "cuda", dtype="float32", max_seq_len=512, max_num_tokens=200, max_batch_size=20
    )
    expected = work(33, temperature)
    Engine(loaded).run(expected)
    memory = blocks and (blocks + 1) * 16 * loaded.manifest.model.kv_bytes_per_token
    runner = CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=memory)
    scheduler, found = Scheduler(scheduler_config(runner, loaded.manifest)), work(33, temperature)
    run_ahead(runner, scheduler, found)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert blocks is None or scheduler.num_preemptions
