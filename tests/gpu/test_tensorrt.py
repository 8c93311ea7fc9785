"""Plans of TensorRT for RTX on the GPU that is here, against the references on the same device. Nobody has run this yet."""

from pathlib import Path
from typing import Any

import pytest
import torch

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import tensorrt
from engine.directory import DirectoryStore
from engine.trust import Trust
from executor_svc.core import Sampling, Sequence
from executor_svc.group import ALONE
from executor_svc.loader import load_engine
from executor_svc.loop import scheduler_config
from executor_svc.node import this_node
from executor_svc.runners import make_plan_runner
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.gpu.test_torch_runner import DEMO, prompts
from tests.running import make_engine, run_ahead, shortfall

HERE = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else ""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(HERE not in tensorrt.CAPABILITIES, reason="needs a GPU that TensorRT for RTX runs on"),
    pytest.mark.skipif("tensorrt_rtx" not in tensorrt.installed(), reason="needs the extra tensorrt-rtx"),
]
LIMITS: dict[str, Any] = {"max_seq_len": 512, "max_num_tokens": 96, "max_batch_size": 8, "dtype": "float16"}
WINDOW: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "sliding_window": 24, "max_position_embeddings": 512}


@pytest.mark.parametrize("family", ["", "mistral", "gemma2"])
def test_tokens_are_near_the_references_best(family: str, tmp_path: Path) -> None:
    """The demo model, one with windows, one with soft caps: teacher-forced, as docs/architecture.md says what "equal" means."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **WINDOW) if family else DEMO
    store = DirectoryStore(tmp_path / "store")
    chosen = BuildConfig(backend="tensorrt_rtx", compute_capability=HERE, **LIMITS)
    built = build(checkpoint, chosen, store=store)
    loaded = load_engine(store, built.engine_id, this_node("cuda"), trust=Trust(native=True))
    assert loaded.plan is not None
    limits = loaded.manifest.limits
    runner = make_plan_runner(
        loaded.program, loaded.plan, "tensorrt_rtx", limits, group=ALONE, kv_memory=None, kv_share=None
    )
    vocabulary = loaded.manifest.model.vocab_size
    work = [
        Sequence(0, number, [token % vocabulary for token in prompt], len(prompt), 48, Sampling(0.0))
        for number, prompt in enumerate(prompts())
    ]
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), work)
    plain = make_engine(checkpoint, tmp_path / "plain", "cuda", prepared=False, **LIMITS)
    assert max(float(shortfall(plain, sequence).max()) for sequence in work) <= 0.02
