"""Every configuration of every family on CUDA, as the unit tests hold it on the CPU; packed weights beside dense ones."""

from pathlib import Path

import pytest
import test_families
import test_families_experts
import test_families_gpt
import test_families_wide
import test_quantized
import torch
from families_harness import check_family, reference_of
from quantized_writers import save_quantized

from executor_svc.core import Sampling, Sequence
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

CASES = {
    name: case
    for module in (test_families, test_families_gpt, test_families_wide, test_families_experts)
    for name, case in module.CASES.items()
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **changes)
    attention = "sdpa" if changes.get("alibi") else "eager"
    reference = reference_of(checkpoint, attention).cuda()  # type: ignore[attr-defined]
    if "longrope" in case:  # releases of transformers differ in when they compute keys again; without a cache, always
        reference.generation_config.use_cache = False
    check_family(checkpoint, reference, tmp_path, device="cuda", dtype="float32")


# Activations of the others are quantized on a GPU, too: `test_gpu_fp8.py`.
WEIGHTS_ALONE = sorted(test_quantized.CASES.keys() - {"fp8-tensor", "fbgemm", "modelopt", "modelopt-channel"})


@pytest.mark.parametrize("case", WEIGHTS_ALONE)
def test_packed_weights_give_the_text_that_they_give_on_the_cpu(case: str, tmp_path: Path) -> None:
    plain = save_checkpoint(tmp_path / "plain", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    chosen = test_quantized.CASES[case]
    save_quantized(plain, tmp_path / "packed", chosen.config, test_quantized.no_head(chosen.writer))
    texts = []
    for device in ("cpu", "cuda"):
        loaded = make_engine(tmp_path / "packed", tmp_path / "store", device, dtype="float32")
        sequence = Sequence(0, 0, list(range(2, 42)), 40, 24, Sampling(0.0))
        Engine(loaded).run([sequence])
        texts.append(sequence.token_ids)
    assert texts[0] == texts[1]
