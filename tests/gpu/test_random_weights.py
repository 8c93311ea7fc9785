"""Dummy weights on CUDA: made there, as large as real ones, and the same each time."""

import gc
import time
from pathlib import Path

import pytest
import torch

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from executor_svc.core import Sampling, Sequence
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from tests.running import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

LARGE = Path(__file__).parents[2] / "bench" / "models" / "llama-3.1-8b"


def test_eight_billion_parameters(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    began = time.perf_counter()
    options = BuildConfig(device="cuda", max_seq_len=256, max_batch_size=4, dummy_weights=True)
    engine = build(LARGE, options, store=store).manifest.engine_id
    built = time.perf_counter()
    gc.collect()  # what earlier tests have left
    before = torch.cuda.memory_allocated()
    loaded = load_engine(store, engine, this_node("cuda"))
    torch.cuda.synchronize()
    print(f"built in {built - began:.1f} s, loaded in {time.perf_counter() - built:.1f} s")
    size = torch.cuda.memory_allocated() - before
    assert 0 <= size - 2 * 8_030_261_248 < 2**20  # bfloat16; frequencies are constants, in a file
    assert {weight.device.type for name, weight in loaded.weights.items() if "inv_freq" not in name} == {"cuda"}
    first = {name: weight.clone() for name, weight in loaded.weights.items() if name.startswith("layers.7.")}
    weights = {name: weight.cuda() for name, weight in loaded.weights.items()}
    sequences = [Sequence(0, row, [5 + row, 9], 2, 16, Sampling(0.0)) for row in range(3)]
    loaded.weights.clear()
    loaded.weights.update(weights)
    Engine(loaded).run(sequences)
    assert len({tuple(sequence.token_ids) for sequence in sequences}) == 3
    del weights
    loaded.weights.clear()
    again = load_engine(store, engine, this_node("cuda")).weights
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
