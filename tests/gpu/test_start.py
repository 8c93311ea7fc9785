"""A start on the device: weights arrive while graphs are captured, and kernels that travel are all that is launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.trust import Trust
from executor_svc.loader import begin_load, load_engine
from executor_svc.node import this_node
from tests.conftest import save_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# Prompts that begin and go on, with and without their log-probabilities, decodes alone and beside them, a batch ahead.
RUN = """
import sys
import tempfile
from pathlib import Path
from engine import blobs
from engine.directory import DirectoryStore
from engine.trust import Trust
from executor_svc.core import Sampling, Sequence
from executor_svc.kernel_archive import adopt_from, unpack
from executor_svc.loader import begin_load
from executor_svc.scheduler import Scheduler
from executor_svc.loop import scheduler_config
from executor_svc.node import this_node
from tests.running import run_ahead

store, engine, trusted = DirectoryStore(Path(sys.argv[1])), sys.argv[2], Trust(native=sys.argv[3] == "trusted")
node = this_node("cuda")
loaded = begin_load(store, engine, node)
with loaded.arriving:
    adopt_from(store, loaded.manifest, trusted, node.compute_capability)
    from executor_svc.cuda_runner import CudaRunner
    with tempfile.TemporaryDirectory() as place:  # the same tactics for both
        _, table = unpack(blobs.read(store, loaded.manifest.ranks[0].kernels[0]), Path(place))
    runner = CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits, table=table)
assert table
scheduler = Scheduler(scheduler_config(runner, loaded.manifest))
work = []
for number in range(40):
    prompt = [(7 * number + 3 * at) % 60 for at in range(1 + 11 * (number % 17))]
    sampling = Sampling(0.7 if number % 3 == 1 else 0.0, seed=number)
    one = Sequence(0, number, prompt, len(prompt), 20 + number % 7, sampling, salt=b"%d" % (number % 2))
    one.prompt_logprobs = 0 if number % 5 == 0 and len(prompt) > 1 else None
    work.append(one)
for first, last in ((0, 3), (3, 5), (5, 40)):
    run_ahead(runner, scheduler, work[first:last])
print([one.token_ids for one in work])
"""


def engine(tmp_path: Path) -> tuple[DirectoryStore, str]:
    sizes = {
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
    }
    checkpoint = save_checkpoint(tmp_path / "model", **sizes)
    store = DirectoryStore(tmp_path / "store")
    capability = this_node("cuda").compute_capability
    options = BuildConfig(
        device="cuda", dtype="bfloat16", compute_capability=capability, max_batch_size=24, max_num_tokens=300
    )
    return store, build(checkpoint, options, store=store).manifest.engine_id


def test_a_start_compiles_nothing_and_gives_the_same_tokens(tmp_path: Path) -> None:
    store, engine_id = engine(tmp_path)
    texts = []
    for trust in ("trusted", "untrusted"):
        cache = tmp_path / trust
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(store.root), engine_id, trust],
            env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        texts.append(done.stdout)
        compiled = [path.name for ending in ("cubin", "so") for path in cache.glob(f"*/*.{ending}")]
        assert bool(compiled) == (trust == "untrusted"), compiled
    assert texts[0] == texts[1]


def test_every_byte_reaches_the_device(tmp_path: Path) -> None:
    """While other streams compute: what is read through pinned memory is what a plain load reads."""
    store, engine_id = engine(tmp_path)
    loaded = begin_load(store, engine_id, this_node("cuda"), trust=Trust(native=True))
    with loaded.arriving:
        square = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            square @= square.T / 2048
    again = load_engine(store, engine_id, this_node("cuda"))
    for name, tensor in loaded.weights.items():
        assert tensor.is_cuda and torch.equal(tensor, again.weights[name])
    assert all(bool(tensor.float().isfinite().all()) and bool(tensor.any()) for tensor in loaded.weights.values())
