"""Every operator that CUDA has a kernel for, on the device, against its reference in float32.

    python -m pytest -s tests/gpu/test_gpu_kernels.py

Shapes, page tables, lengths, windows and caps are random. What a kernel is compiled for (dtype, heads, form) takes seconds each,
so those are chosen: each value with several of the others, not all with all. With -s each case prints its time and worst error.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import REFERENCE, Step
from tests.running import random_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOUND = {BF16: 2e-2, FP16: 4e-3, FP32: 2e-5}  # of a row's error, relative to the row


@pytest.fixture(autouse=True)
def progress(request: pytest.FixtureRequest) -> Any:
    began = time.perf_counter()
    yield
    print(f"{request.node.name}: {time.perf_counter() - began:.1f} s", flush=True)


def close(found: Tensor, wanted: Tensor, bound: float | None = None) -> None:
    """No row farther from the reference's than rounding explains."""
    torch.cuda.synchronize()
    assert found.shape == wanted.shape and torch.isfinite(found).all()
    bound = BOUND[found.dtype] if bound is None else bound
    error = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1).clamp(min=1e-3)
    assert error.max() < bound, f"{error.max():.2e} in row {int(error.argmax())} of {len(found)}"


def wide(values: list[Any]) -> list[Any]:
    return [value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in values]


def check(op: str, inputs: list[Any], **attrs: Any) -> None:
    from executor_svc.kernels import gpu

    found, wanted = getattr(gpu, op)(*inputs, **attrs), REFERENCE[op](*wide(inputs), **attrs)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for ours, theirs in pairs:
        assert ours.dtype == inputs[0].dtype
        close(ours, theirs)


def normal(*shape: int, dtype: torch.dtype, over: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") / over).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_lookups(dtype: torch.dtype) -> None:
    """Exactly: of whole tables, and of a shard, whose neighbours' rows are 0."""
    from executor_svc.kernels import gpu

    table, ids = normal(1000, 2050, dtype=dtype), torch.randint(0, 1000, (77,), device="cuda", dtype=torch.int32)
    assert torch.equal(gpu.embedding(ids, table), table[ids]) and torch.equal(gpu.gather(table, ids.long()), table[ids])
    first = torch.tensor([0, 400], device="cuda", dtype=torch.int32)[1:]  # at an address that is no multiple of 16
    assert torch.equal(
        gpu.embedding_shard(ids, table[:500], first), REFERENCE["embedding_shard"](ids, table[:500], first)
    )


def test_angles_of_far_positions() -> None:
    from executor_svc.kernels import gpu

    positions = torch.randint(0, 2_000_000, (99,), device="cuda", dtype=torch.int32)
    frequencies = 1 / 10_000 ** (torch.arange(0, 80, 2, device="cuda") / 80)
    for ours, theirs in zip(
        *(f(positions, frequencies, scale=1.3) for f in (gpu.rope_table, REFERENCE["rope_table"])), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_norms_and_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, size in ((1, 4096), (7, 896), (300, 4096), (33, 100)):
        x, residual, weight = (
            normal(rows, size, dtype=dtype),
            normal(rows, size, dtype=dtype),
            normal(size, dtype=dtype),
        )
        check("add_rms_norm", [x, residual, weight], eps=1e-5)
        check("add_rms_norm", [x, residual, weight.float()], eps=1e-5)
        check("rms_norm", [normal(rows, 2 * size, dtype=dtype)[:, size:], weight], eps=1e-5)
        check("silu_mul", [normal(rows, 2 * size, dtype=dtype) * 3])


@pytest.mark.parametrize(
    ("dtype", "rows", "outputs", "columns"),
    [
        (BF16, [1, 2, 3, 4, 9, 30, 64, 65, 300], 777, 896),
        (FP16, [1, 4, 16, 33], 4096, 4104),
        (BF16, [8, 40], 16384, 4096),  # large, and taller than wide
    ],
)
def test_linear(dtype: torch.dtype, rows: list[int], outputs: int, columns: int) -> None:
    torch.manual_seed(1)
    weight, bias = normal(outputs, columns, dtype=dtype, over=columns**0.5), normal(outputs, dtype=dtype)
    for count in rows:
        x = normal(count, columns + 8, dtype=dtype)[:, 8:]
        check("linear", [x, weight, bias if outputs == 777 else None])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "half", "interleaved"),
    [(BF16, 64, 32, False), (FP16, 80, 16, True), (BF16, 96, 48, False), (FP16, 128, 64, False), (BF16, 256, 32, True)],
)
def test_rope(dtype: torch.dtype, head_dim: int, half: int, interleaved: bool) -> None:
    torch.manual_seed(2)
    for tokens in (1, 50):
        heads = normal(tokens, 11 * head_dim + 8, dtype=dtype)[:, 8:]
        angles = torch.rand(tokens, half, device="cuda") * 6
        check("rope", [heads, angles.cos(), angles.sin()], head_dim=head_dim, interleaved=interleaved)


@pytest.mark.parametrize(
    ("dtype", "tokens", "hidden", "inner"), [(BF16, [1, 5, 33], 2048, 1408), (FP16, [1100], 1024, 96)], ids=str
)
def test_experts(dtype: torch.dtype, tokens: list[int], hidden: int, inner: int) -> None:
    torch.manual_seed(3)
    gate_up = normal(16, 2 * inner, hidden, dtype=dtype, over=hidden**0.5)
    down = normal(16, hidden, inner, dtype=dtype, over=inner**0.5)
    for count in tokens:
        logits = normal(count, 16, dtype=dtype) * 2
        logits[:, 5] = -60.0  # nobody's
        check("experts", [normal(count, hidden, dtype=dtype), logits, gate_up, down], top_k=4, normalize=count % 2 == 1)


@dataclass(frozen=True)
class Case:
    """What attention is compiled for. rotate: with `rope` in the same operator."""

    dtype: torch.dtype
    head_dim: int
    groups: int
    ratio: int
    window: bool = False
    cap: bool = False
    alibi: bool = False
    rotate: bool = True

    def __str__(self) -> str:
        kinds = [name for name in ("window", "cap", "alibi", "rotate") if getattr(self, name)]
        return f"{str(self.dtype)[6:]}-{self.head_dim}-{self.groups}x{self.ratio}-{'-'.join(kinds)}"


CASES = [
    Case(BF16, 64, 2, 7, window=True), Case(FP16, 64, 4, 1, alibi=True, rotate=False), Case(BF16, 64, 1, 71),
    Case(FP16, 80, 4, 1), Case(BF16, 80, 2, 4, window=True), Case(BF16, 96, 4, 1, cap=True), Case(FP16, 96, 2, 3, window=True),
    Case(BF16, 128, 8, 4), Case(FP16, 128, 2, 8, cap=True), Case(BF16, 128, 4, 5, alibi=True, rotate=False),
    Case(BF16, 256, 4, 2, window=True, cap=True), Case(FP16, 256, 1, 8), Case(FP32, 256, 2, 3),
    Case(FP32, 128, 2, 1, window=True),
]  # fmt: skip


def run_attention(case: Case, lens: list[tuple[int, int]], draw: random.Random) -> None:
    """lens: of each sequence, decodes first: tokens of the step, and tokens that the cache has already."""
    from executor_svc.kernels import gpu

    heads, tokens = case.groups * case.ratio, sum(new for new, _ in lens)
    step = random_step(lens, case.groups, case.head_dim, case.dtype, draw, "cuda")
    fused = normal(tokens, (heads + 2 * case.groups) * case.head_dim, dtype=case.dtype)
    parts = list(fused.split([size * case.head_dim for size in (heads, case.groups, case.groups)], -1))
    half = case.head_dim // 2 if draw.random() < 0.7 else case.head_dim // 4
    angles = torch.rand(tokens, half, device="cuda") * 6
    turn = [angles.cos(), angles.sin()]
    alibi = torch.rand(heads, device="cuda") if case.alibi else None
    attrs: dict[str, Any] = {
        "cache": 0, "head_dim": case.head_dim, "scale": case.head_dim**-0.5,
        "window": draw.choice([3, 57, 130, 501]) if case.window else 0, "soft_cap": draw.choice([5.0, 30.0]) if case.cap else 0.0,
    }  # fmt: skip
    exact = Step(**{**vars(step), "k_caches": wide(step.k_caches), "v_caches": wide(step.v_caches)})
    queries, keys, values = wide(parts)
    if case.rotate:
        how = {"head_dim": case.head_dim, "interleaved": False}
        queries, keys = (REFERENCE["rope"](part, *turn, **how) for part in (queries, keys))
        found = gpu.rope_attention(*parts, *turn, alibi, step=step, interleaved=False, **attrs)
    else:
        found = gpu.attention(*parts, alibi, step=step, **attrs)
    close(found, REFERENCE["attention"](queries, keys, values, alibi, step=exact, **attrs))
    written = step.k_caches[0].view(-1, case.groups * case.head_dim)[step.slots]
    close(written, keys, 1e-2 if case.dtype is not FP32 else 1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    """Decodes alone, and decodes beside prompts of which some begin and some go on: three draws of each."""
    torch.manual_seed(case.head_dim)
    draw = random.Random(str(case))
    for _ in range(3):
        decodes = [(1, draw.choice([0, 15, 16, 63, draw.randrange(1, 3000)])) for _ in range(5)]
        chunks = [(draw.randrange(2, 400), draw.choice([0, 0, 5, 16, draw.randrange(1, 1500)])) for _ in range(4)]
        run_attention(case, decodes, draw)
        run_attention(case, [*decodes, *chunks, (1, 0), (1, 77), (128, 0), (129, 128)], draw)


def test_decodes_of_many_sequences() -> None:
    """So many that the context is not split."""
    draw = random.Random(5)
    case = Case(BF16, 128, 8, 4)
    run_attention(case, [(1, draw.randrange(0, 700)) for _ in range(200)], draw)


@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 64), (BF16, 128), (FP16, 128)], ids=str)
def test_prompts_that_begin(dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where their keys are made, beside cached ones and decodes, at the sizes of real steps."""
    from executor_svc.kernels import gpu

    taken: list[int] = []
    ours: Callable[..., None] = gpu.prompt.prompt
    monkeypatch.setattr(gpu.prompt, "prompt", lambda *a, **b: taken.append(len(a[4][0])) or ours(*a, **b))
    draw = random.Random(head_dim)
    case = Case(dtype, head_dim, 8, 4)
    for fresh in ([2000, 127, 128, 129, 1], [4096], [draw.randrange(2, 700) for _ in range(16)], [128] * 16):
        decodes = [(1, draw.randrange(1, 900)) for _ in range(20)]
        cached = [(300, 1000), (2, 500), (700, 16)]
        run_attention(case, [*decodes, *cached, *((count, 0) for count in fresh)], draw)
        assert taken.pop() == sum(-(-count // 128) for count in fresh)
