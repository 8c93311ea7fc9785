"""int4 and int8 on the device at a model's sizes: kernels against the references in float32, and the runner's tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import REFERENCE, quantize_int8
from engine.opset import FLOATS
from executor_svc.core import Sampling, Sequence
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.running import make_engine, run_ahead, shortfall

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DTYPES = [torch.bfloat16, torch.float16]
MODELS = Path(__file__).parents[2] / "bench" / "models"
ROWS = [1, 3, 8, 17, 64, 65, 300]


def close(found: Tensor, wanted: Tensor) -> None:
    """By relative L2 error: 1e-3, beside what rounding the result takes, and the matrix where it is made."""
    bound = 4e-3 if found.dtype is torch.bfloat16 else 1e-3
    error = (found.float() - wanted).norm() / wanted.norm()
    assert torch.isfinite(found.float()).all() and error <= bound, error


def telling(found: list[Any]) -> list[Any]:
    """Of the candidates those that are compiled otherwise: with one part and with more."""
    return [tactic for tactic in found if tactic.form.splits in (1, 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, 1 << 20])
@pytest.mark.parametrize("zeros", [False, True])
def test_products_of_int4(zeros: bool, group: int, dtype: torch.dtype) -> None:
    """Sums in parts leave their counters at 0."""
    from executor_svc.kernels import gpu as cuda
    from executor_svc.kernels import integers, products, tactics

    torch.manual_seed(group)
    for outputs, columns in ((6144, 4096), (4096, 14336), (1000, 904), (77, 200)):
        groups = -(-columns // group)
        weight = torch.randint(0, 256, (outputs, columns // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(outputs, groups, device="cuda").to(dtype) / 8 / columns**0.5
        points = torch.randint(0, 16, (outputs, groups), dtype=torch.uint8, device="cuda") if zeros else None
        bias = torch.randn(outputs, device="cuda", dtype=dtype)
        for rows in ROWS:
            x = torch.randn(rows, columns, device="cuda", dtype=dtype)
            wanted = REFERENCE["linear_int4"](x.float(), weight, scales, points, bias.float(), group_size=group)
            kind = integers.Packed(weight, scales, points, group).kind
            shape = tactics.Product(tactics.power(rows), outputs, columns, kind)
            for tactic in [None, *telling(tactics.candidates(shape))]:
                table = {shape: tactic} if tactic else {}
                close(cuda.linear_int4(x, weight, scales, points, bias, group_size=group, table=table), wanted)
    assert not products.counters(x.device).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_int8(dtype: torch.dtype) -> None:
    """With activations as they are and rounded."""
    from executor_svc.kernels import gpu as cuda
    from executor_svc.kernels import tactics

    torch.manual_seed(0)
    for outputs, columns in ((6144, 4096), (4096, 14336), (1000, 904), (77, 200)):
        weight = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8, device="cuda")
        scales = torch.rand(outputs, device="cuda") / 100 / columns**0.5
        bias = torch.randn(outputs, device="cuda", dtype=dtype)
        for rows in ROWS:
            x = torch.randn(rows, columns, device="cuda", dtype=dtype)
            wanted = REFERENCE["linear_int8"](x.float(), weight, scales, bias.float())
            shape = tactics.Product(tactics.power(rows), outputs, columns, "int8")
            for tactic in [None, *telling(tactics.candidates(shape))]:
                close(cuda.linear_int8(x, weight, scales, bias, table={shape: tactic} if tactic else {}), wanted)
            q, of_rows = quantize_int8(x)
            ours, our_scales = cuda.quantize_int8(x)
            assert (q.int() - ours.int()).abs().max() <= 1 and torch.allclose(of_rows, our_scales)
            exact = (q.double() @ weight.double().T * of_rows * scales + bias).float()
            shape = shape._replace(kind="w8a8")
            for tactic in [None, *tactics.candidates(shape)]:
                table, attrs = {shape: tactic} if tactic else {}, {"dtype": FLOATS.index("float32")}
                found = cuda.product_int8(q, of_rows.contiguous(), weight, scales, bias, table=table, **attrs)
                torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_random_weights_and_the_runner(form: str, tmp_path: Path) -> None:
    """Two of the 8B's layers, with a small vocabulary. Tokens are the references' in the sense of docs/architecture.md."""
    from executor_svc.cuda_runner import CudaRunner

    config = json.loads((MODELS / f"llama-3.1-8b-{form}" / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"dummy_weights": True, "max_seq_len": 1024, "max_batch_size": 64, "max_num_tokens": 1024}
    loaded = make_engine(tmp_path, tmp_path / "store", "cuda", prepared=False, **options)
    assert CudaRunner.takes(loaded.program)
    loaded = replace(loaded, weights={name: weight.cuda() for name, weight in loaded.weights.items()})
    runner = CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=1 << 28)
    generator = torch.Generator().manual_seed(0)
    work = []
    for row, length in enumerate([1, 5, 64, 300, *[20] * 20]):
        prompt = torch.randint(2, 1024, (length,), generator=generator).tolist()
        work.append(Sequence(0, row, prompt, length, 8, Sampling(0.0)))
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), work)
    assert torch.cat([shortfall(loaded, sequence) for sequence in work]).max() <= 0.02
