"""The Triton kernels on the device against the references in float32: random shapes, page tables, windows, groups, head sizes."""

import pytest
import torch

from engine.ops import REFERENCE, Step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
    assert torch.isfinite(found).all() and error < (1e-5 if dtype is torch.float32 else 1e-2), error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype) -> None:
    from executor_svc.kernels import gpu as cuda

    torch.manual_seed(0)
    for rows, size in ((1, 4096), (7, 896), (300, 5120), (33, 100)):
        x, residual = (torch.randn(rows, size, device="cuda", dtype=dtype) for _ in range(2))
        weight = torch.randn(size, device="cuda", dtype=dtype)
        ours, wanted = (
            cuda.add_rms_norm(x, residual, weight, eps=1e-5),
            REFERENCE["add_rms_norm"](x, residual, weight, eps=1e-5),
        )
        for one, other in zip(ours, wanted, strict=True):
            close(one, other, dtype)
        wide = torch.randn(rows, 2 * size, device="cuda", dtype=dtype)
        close(cuda.silu_mul(wide), REFERENCE["silu_mul"](wide), dtype)
        matrix, bias = (
            torch.randn(777, size, device="cuda", dtype=dtype) / 64,
            torch.randn(777, device="cuda", dtype=dtype),
        )
        for count in (1, 2, 4, rows):
            part = torch.randn(count, size, device="cuda", dtype=dtype)
            close(cuda.linear(part, matrix, bias), part.float() @ matrix.float().T + bias.float(), torch.bfloat16)
    for head_dim, half in ((64, 32), (80, 16), (96, 48), (128, 64), (256, 128)):
        fused = torch.randn(50, 6 * head_dim + 8, device="cuda", dtype=dtype)[:, 8:]
        angles = torch.randn(50, half, device="cuda")
        for interleaved in (False, True):
            turn = {"head_dim": head_dim, "interleaved": interleaved}
            close(
                cuda.rope(fused, angles.cos(), angles.sin(), **turn),
                REFERENCE["rope"](fused, angles.cos(), angles.sin(), **turn),
                dtype,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("ratio", [1, 4, 7])
def test_attention(dtype: torch.dtype, head_dim: int, ratio: int) -> None:
    from executor_svc.kernels import gpu as cuda

    torch.manual_seed(head_dim + ratio)
    groups = 2
    for window, cap, slopes in ((0, 0.0, False), (100, 0.0, False), (0, 20.0, False), (0, 0.0, True)):
        for lens in ([(1, 0), (1, 17), (1, 700), (1, 64)], [(130, 0), (1, 50), (64, 300), (1, 0), (77, 3)]):
            counts = [-(-sum(pair) // 16) for pair in lens]
            order = torch.randperm(sum(counts) + 3).int()
            table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
            slots, done = [], 0
            for row, (new, old) in enumerate(lens):
                blocks = order[done : done + counts[row]]
                done += counts[row]
                table[row, : counts[row]] = blocks
                slots += [int(blocks[at // 16]) * 16 + at % 16 for at in range(old, old + new)]
            caches = [torch.randn(len(order), 16, groups, head_dim, device="cuda", dtype=dtype) for _ in range(2)]
            tokens = sum(new for new, _ in lens)
            fused = torch.randn(tokens, (ratio + 2) * groups * head_dim, device="cuda", dtype=dtype)
            parts = torch.split(fused, [ratio * groups * head_dim, groups * head_dim, groups * head_dim], -1)
            alibi = torch.rand(ratio * groups, device="cuda") if slopes else None
            attrs = {"cache": 0, "head_dim": head_dim, "scale": head_dim**-0.5, "window": window, "soft_cap": cap}
            results = []
            for function, exact in ((cuda.attention, False), (REFERENCE["attention"], True)):
                kept = [cache.clone().float() if exact else cache.clone() for cache in caches]
                step = Step(
                    [new for new, _ in lens],
                    [sum(pair) for pair in lens],
                    table.cuda(),
                    torch.tensor(slots, device="cuda"),
                    [kept[0]],
                    [kept[1]],
                )
                results.append(
                    function(*(part.float() if exact else part for part in parts), alibi, step=step, **attrs)
                )
            close(*results, dtype)
