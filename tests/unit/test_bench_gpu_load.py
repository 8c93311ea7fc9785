"""The random load of bench/gpu_load.py for some seconds, on the runner of CUDA by Triton's interpreter."""

import os
from pathlib import Path

import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from tests.conftest import save_checkpoint

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="bench.gpu_load runs on the device")


@pytest.mark.drill
def test_random_load_gives_all_blocks_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import gpu_load
    from bench.serving import load

    monkeypatch.setattr(
        "executor_svc.kernels.decodes.SPLITS_FOR", 2
    )  # fewer programs, each of which takes its time here
    checkpoint = save_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    config = BuildConfig(device="cpu", dtype="float32", max_seq_len=64, max_batch_size=4, max_num_tokens=20)
    engine = build(checkpoint, config, store=DirectoryStore(tmp_path / "store")).manifest.engine_id
    found = gpu_load.measure(load(tmp_path / "store", engine, kv_blocks=9, cuda_runner=True), 6, sample=4)
    assert found["problems"] == [] and found["finished"] >= 2 and found["tokens"] > 8
    assert found["sample_equal"] == found["sample"] >= 2  # in float32
