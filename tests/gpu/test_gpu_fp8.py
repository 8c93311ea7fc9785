"""FP8 on the device at a model's sizes: kernels against the references in float32, and the runner's tokens against theirs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.ops import REFERENCE, Step, quantize_fp8, quantize_int8, to_fp8
from executor_svc.core import Sampling, Sequence
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.running import make_engine, run_ahead, shortfall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs CUDA, and 9.0"
    ),
]
F8, DTYPES = torch.float8_e4m3fn, [torch.bfloat16, torch.float16]
LARGE = Path(__file__).parents[2] / "bench" / "models" / "llama-3.1-8b-fp8"


def close(found: Tensor, wanted: Tensor, bound: float = 1e-2) -> None:
    """By relative L2 error."""
    error = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
    assert torch.isfinite(found.float()).all() and error <= bound, error


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype, static: bool) -> None:
    from executor_svc.kernels import gpu as cuda

    torch.manual_seed(0)
    by = torch.tensor([0.02], device="cuda") if static else None
    for rows, size in ((1, 4096), (7, 896), (300, 14336), (33, 100)):
        x, residual = (torch.randn(rows, size, device="cuda", dtype=dtype) * 3 for _ in range(2))
        x[1:2], residual[1:2] = 0, 0
        weight = torch.randn(size, device="cuda", dtype=dtype)
        for name, inputs, attrs in (
            ("rms_norm", (x, weight), {"eps": 1e-5}),
            ("add_rms_norm", (x, residual, weight), {"eps": 1e-5}),
            ("silu_mul", (torch.cat((x, residual), 1),), {}),
        ):
            wanted = REFERENCE[name](*inputs, **attrs)
            y, *sums = wanted if isinstance(wanted, tuple) else (wanted,)
            q, scales, *found = getattr(cuda, f"{name}_fp8")(*inputs, by, **attrs)
            exact, of_rows = quantize_fp8(y, by)
            torch.testing.assert_close(scales, of_rows.contiguous(), rtol=2e-2, atol=1e-12)
            close(q.float() * scales, exact.float() * of_rows, 2e-2)  # where rounding turns around
            for one, other in zip(found, sums, strict=True):
                assert torch.equal(one, other)
        q, scales = cuda.quantize_fp8(torch.cat((residual, x), 1)[:, size:], by)
        exact, of_rows = quantize_fp8(x, by)
        close(q.float() * scales, exact.float() * of_rows, 5e-3)  # a quotient that is rounded otherwise
        assert ((q.float() - exact.float()).abs() <= exact.float().abs() / 8 + 2**-9).all()


@pytest.mark.parametrize("small", [F8, torch.int8], ids=str)
def test_quotients_are_the_nearest(small: torch.dtype) -> None:
    """Beside what lies between two numbers of 8 bits, where any other rounding shows."""
    from executor_svc.kernels import fp8

    numbers = torch.arange(-127, 128) if small is torch.int8 else torch.arange(127).to(torch.uint8).view(F8).float()
    between = (numbers[1:].double() + numbers[:-1].double()) / 2
    for by in (0.0137, 0.731, 3e-5):
        scale = torch.tensor([by], device="cuda")
        x = (between * scale.double().cpu()).float().cuda()
        for _ in range(4):
            x = torch.cat((x, x.nextafter(torch.full_like(x, 1e9)), x.nextafter(torch.full_like(x, -1e9)))).unique()
        exact, _ = (quantize_int8 if small is torch.int8 else quantize_fp8)(x[None], scale)
        assert torch.equal(fp8.quantize(x[None], scale, small)[0].float(), exact.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 17, 64, 65, 256, 1000])
def test_products(rows: int, dtype: torch.dtype) -> None:
    from engine.opset import FLOATS
    from executor_svc.kernels import gpu as cuda
    from executor_svc.kernels import tactics

    torch.manual_seed(rows)
    attrs = {"dtype": FLOATS.index(str(dtype).removeprefix("torch."))}
    for outputs, columns in ((6144, 4096), (4096, 14336), (1000, 904), (77, 100), (77, 2128)):
        x = torch.randn(rows, columns, device="cuda", dtype=dtype)
        weight = (torch.randn(outputs, columns, device="cuda") * 50).to(F8)
        scales = torch.rand(outputs, 1, device="cuda") / 50 / columns**0.5
        bias = torch.randn(outputs, device="cuda", dtype=dtype) if outputs <= 1000 else None
        blocks = {"block_rows": 1, "block_columns": columns, "per_token": True}
        wanted = REFERENCE["linear_fp8"](x.float(), weight, scales, bias, **blocks)
        close(cuda.product_fp8(*cuda.quantize_fp8(x), weight, scales, bias, **attrs), wanted)
        if columns < 5000:
            q, of_rows = quantize_fp8(x)
            exact = ((q.double() @ weight.double().T) * of_rows * scales.T + (0 if bias is None else bias)).float()
            shape = tactics.Product(tactics.power(rows), outputs, columns, "fp8")
            for tactic in tactics.candidates(shape):
                if tactic.kernel != "library":  # which rounds before it adds the bias
                    found = cuda.product_fp8(
                        q, of_rows.contiguous(), weight, scales, bias, table={shape: tactic}, **attrs
                    )
                    close(found, exact, 4e-3)


def rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, step: Step, **attrs: float) -> Tensor:
    """The references, one after another, in float32 from the rotated queries and keys on, which are rounded."""
    turn = {"head_dim": attrs["head_dim"], "interleaved": attrs.pop("interleaved")}
    q, k = (REFERENCE["rope"](x, cos, sin, **turn) for x in (q, k))
    found: Tensor = REFERENCE["attention"](q.float(), k, v, step=step, **attrs)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize("alone", [False, True])
def test_attention(alone: bool, dtype: torch.dtype, head_dim: int, ratio: int) -> None:
    """Decodes alone, or with cached prefixes and prompts that begin, in one step, over a cache of 8 bits."""
    from executor_svc.kernels import gpu as cuda

    torch.manual_seed(head_dim + ratio)
    groups, lens = 2, [(1, 0), (1, 17), (1, 700), *([] if alone else [(130, 0), (64, 300), (77, 3), (5, 0)])]
    counts = [-(-sum(pair) // 16) for pair in lens]
    order = torch.randperm(sum(counts) + 3).int()
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    slots, done = [], 0
    for row, (new, old) in enumerate(lens):
        blocks = order[done : done + counts[row]]
        done += counts[row]
        table[row, : counts[row]] = blocks
        slots += [int(blocks[at // 16]) * 16 + at % 16 for at in range(old, old + new)]
    scales = {"k_scale": 0.03, "v_scale": 0.01}
    cached = [to_fp8(torch.randn(len(order), 16, groups, head_dim, device="cuda"), scale) for scale in scales.values()]
    tokens = sum(new for new, _ in lens)
    fused = torch.randn(tokens, (ratio + 2) * groups * head_dim, device="cuda", dtype=dtype)
    parts = torch.split(fused, [ratio * groups * head_dim, groups * head_dim, groups * head_dim], -1)
    angles = torch.randn(tokens, head_dim // 2, device="cuda")
    attrs = {"cache": 0, "head_dim": head_dim, "scale": head_dim**-0.5, "window": 0, "interleaved": False, **scales}
    found = []
    for function in (cuda.rope_attention, rotated):
        caches = [cache.clone() for cache in cached]
        step = Step(
            [new for new, _ in lens],
            [sum(pair) for pair in lens],
            table.cuda(),
            torch.tensor(slots, device="cuda"),
            [caches[0]],
            [caches[1]],
        )
        found.append((function(*parts, angles.cos(), angles.sin(), step=step, **attrs), *caches))
    for one, other in zip(*found, strict=True):
        close(one, other)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_random_weights_and_the_runner(cache: str, tmp_path: Path) -> None:
    """Two of the 8B's layers, with a small vocabulary. Tokens are the references' in the sense of docs/architecture.md."""
    from executor_svc.cuda_runner import CudaRunner

    config = json.loads((LARGE / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"dummy_weights": True, "max_seq_len": 1024, "max_batch_size": 64, "max_num_tokens": 1024}
    loaded = make_engine(tmp_path, tmp_path / "store", "cuda", prepared=False, kv_cache_dtype=cache, **options)
    assert CudaRunner.takes(loaded.program)
    loaded = replace(loaded, weights={name: weight.cuda() for name, weight in loaded.weights.items()})
    runner = CudaRunner(loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=1 << 28)
    generator = torch.Generator().manual_seed(0)
    work = []
    for row, length in enumerate([1, 5, 64, 300, *[20] * 20]):
        prompt = torch.randint(2, 1024, (length,), generator=generator).tolist()
        work.append(Sequence(0, row, prompt, length, 8, Sampling(0.0)))
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), work)
    missed = torch.cat([shortfall(loaded, sequence) for sequence in work])
    assert missed.max() <= 0.15 and missed.mean() <= 0.02
