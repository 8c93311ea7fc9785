"""The FP8 kernels against the references, by Triton's interpreter, and programs that use them; `tests/gpu` has the device's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_writers import floats, save_quantized
from test_fp8 import CONFIGS, GPU, SCALES, make
from test_quantized import no_head
from torch import Tensor

from engine.directory import DirectoryStore
from engine.ops import REFERENCE, Step, quantize_fp8, quantize_int8
from executor_svc.core import Sampling, Sequence
from executor_svc.kernel_archive import unpack
from executor_svc.loader import LoadedEngine
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.running import load_into_main_memory, run_ahead, shortfall

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
cuda = pytest.importorskip("executor_svc.kernels.gpu")
fp8 = pytest.importorskip("executor_svc.kernels.fp8")
fuse = pytest.importorskip("executor_svc.kernels.fuse")
cuda_runner = pytest.importorskip("executor_svc.cuda_runner")

F8 = torch.float8_e4m3fn
LARGE = Path(__file__).parents[2] / "bench" / "models" / "llama-3.1-8b-fp8"


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts numbers off where it makes 8 bits of them; the device rounds to the nearest, as torch does."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, kind: Any, wanted: Any, mode: Any) -> Any:
        if wanted.name != "fp8e4nv":
            return convert(data, kind, wanted, mode)
        assert kind.name == "fp32"
        return torch.from_numpy(np.ascontiguousarray(data)).to(F8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def close(found: Tensor, wanted: Tensor, bound: float = 1e-2) -> None:
    """By relative L2 error: where rounding turns around by a bit, single numbers differ by more."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert (found.float() - wanted.float()).norm() <= bound * wanted.float().norm()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", [40, 300, 2100])
def test_rows_are_quantized_where_they_are_made(static: bool, size: int) -> None:
    torch.manual_seed(size)
    x, residual = (torch.randn(5, size).half() * 3 for _ in range(2))
    x[2] = residual[2] = 0
    weight, by = torch.randn(size).half(), torch.tensor([0.01]) if static else None
    for name, inputs, attrs in (
        ("rms_norm", (x, weight), {"eps": 1e-5}),
        ("rms_norm", (x, weight.float()), {"eps": 1e-5}),
        ("add_rms_norm", (x, residual, weight), {"eps": 1e-5}),
        ("add_rms_norm", (x, residual, weight.float()), {"eps": 1e-5}),
        ("silu_mul", (torch.cat((x, residual), 1),), {}),
        ("silu_mul", (torch.cat((x, residual), 1).repeat(14, 1),), {}),
    ):
        wanted = REFERENCE[name](*inputs, **attrs)
        y, *others = wanted if isinstance(wanted, tuple) else (wanted,)
        q, scales, *sums = getattr(cuda, f"{name}_fp8")(*inputs, by, **attrs)
        assert all(torch.equal(one, other) for one, other in zip(sums, others, strict=True))
        exact, of_rows = quantize_fp8(y, by)
        torch.testing.assert_close(scales, of_rows, rtol=1e-2, atol=1e-12)
        close(q.float() * scales, exact.float() * of_rows, 2e-2)
    q, scales = cuda.quantize_fp8(torch.cat((residual, x), 1)[:, size:], by)
    exact, of_rows = quantize_fp8(x, by)
    assert torch.equal(q.float(), exact.float())
    torch.testing.assert_close(scales, of_rows.contiguous())


def test_what_is_too_large_or_no_number() -> None:
    inf, by = float("inf"), torch.tensor([0.01])
    x = torch.tensor([[inf, -inf, float("nan"), 60000, -60000, 4.481, 4.479, 2e-5, 0]]).half()
    found, wanted = cuda.quantize_fp8(x, by)[0].float(), quantize_fp8(x, by)[0].float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found[0, :2].tolist() == [448, -448] and found[0, 2].isnan()
    assert torch.equal(cuda.quantize_int8(x[:, 3:], by)[0], quantize_int8(x[:, 3:], by)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 20, 70, 71])
def test_products(rows: int, bias: bool) -> None:
    """Sizes that are no multiples of a tile's."""
    torch.manual_seed(rows)
    columns, outputs = {1: (2128, 7), 2: (2100, 7), 70: (304, 150), 71: (300, 70)}.get(rows, (300, 70))
    q, weight = ((torch.randn(count, columns) * 40).to(F8) for count in (rows, outputs))
    q_scales, scales, added = torch.rand(rows, 1) / 100, torch.rand(outputs, 1), torch.randn(outputs).half() * 10
    wanted = (q.float() * q_scales) @ (weight.float() * scales).T + (added.float() if bias else 0)
    shape = cuda.tactics.shape_of(q, weight, "fp8")
    candidates = cuda.tactics.candidates(shape)
    assert any(tactic.kernel == "gemv" for tactic in candidates) == (rows == 1)
    for tactic in [None, *candidates]:
        dtype, bound = ("float32", 1e-5) if tactic is None else ("float16", 1e-3)
        attrs = {"dtype": fuse.FLOATS.index(dtype), "table": {shape: tactic} if tactic else {}}
        found = cuda.product_fp8(q, q_scales, weight, scales, added if bias else None, **attrs)
        close(found, wanted.to(getattr(torch, dtype)), bound)


def rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, **attrs: Any) -> Tensor:
    """The references, one after another."""
    turn = {"head_dim": attrs["head_dim"], "interleaved": attrs.pop("interleaved")}
    found: Tensor = REFERENCE["attention"](*(REFERENCE["rope"](x, cos, sin, **turn) for x in (q, k)), v, **attrs)
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_attention_over_a_cache_of_8_bits(head_dim: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode, a prompt with a cached prefix, and one that begins, which may read its keys where they are rotated."""
    torch.manual_seed(head_dim)
    taken: list[int] = []
    ours = cuda.prompt.prompt
    monkeypatch.setattr(cuda.prompt, "prompt", lambda *a, **b: taken.append(1) or ours(*a, **b))
    table = torch.tensor([[1, 0], [2, 3], [4, 0]], dtype=torch.int32)
    slots = torch.tensor([16 + 8, *range(48, 53), *range(64, 71)])
    cached = [(torch.randn(5, 16, 2, head_dim) * 30).to(F8) for _ in range(2)]
    parts = torch.split(torch.randn(13, 8 * head_dim).half(), [4 * head_dim, 2 * head_dim, 2 * head_dim], 1)
    angles = torch.randn(13, head_dim // 2)
    attrs: dict[str, Any] = {
        "cache": 0,
        "head_dim": head_dim,
        "scale": 0.1,
        "window": 0,
        "k_scale": 0.03,
        "v_scale": 0.01,
    }
    if fused:
        attrs["interleaved"], parts = False, (*parts, angles.cos(), angles.sin())
    found = []
    for function in (cuda.rope_attention, rotated) if fused else (cuda.attention, REFERENCE["attention"]):
        caches = [cache.clone() for cache in cached]
        step = Step([1, 5, 7], [9, 21, 7], table, slots, [caches[0]], [caches[1]])
        found.append((function(*parts, step=step, **attrs), *caches))
    for one, other in zip(*found, strict=True):
        close(one.float(), other.float())
    assert len(taken) == (fused and head_dim == 64)


@pytest.mark.drill
def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """At an 8B's sizes: the interpreter takes what the compiler does not, and more shared memory than there is."""
    config = json.loads((LARGE / "config.json").read_text()) | {"num_hidden_layers": 1, "vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": 0, "eos_token_id": 1}))
    limits = {"max_seq_len": 256, "max_batch_size": 3, "max_num_tokens": 256}
    _, program = make(tmp_path, tmp_path / "store", dummy_weights=True, kv_cache_dtype="fp8", **limits)
    (tmp_path / "program.json").write_bytes(program.to_json())
    told = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "executor_svc.compile", str(tmp_path / "program.json")]
    command += ["--limits", json.dumps(limits), "--out", str(tmp_path / "kernels"), "--compute-capability", "9.0"]
    done = subprocess.run(command, capture_output=True, text=True, env=told, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "does not compile" not in done.stderr, done.stderr[-2000:]
    unpack((tmp_path / "kernels").read_bytes(), tmp_path)
    found = {path.stem for path in tmp_path.rglob("*.cubin")}
    wanted = "_norm _silu_mul _silu_mul_rounded _quantize _gemv _gemv_fp8 _tiles _rope_write _decode _prefill"
    assert found >= set(wanted.split()), found


# --- programs


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", **size, num_key_value_heads=1)


def load(plain: Path, path: Path, name: str, **options: Any) -> LoadedEngine:
    config, shape, _ = CONFIGS[name]
    save_quantized(plain, path / "checkpoint", config, no_head(floats(None, shape)), **SCALES)
    sizes = {"max_seq_len": 64, "max_batch_size": 4, "max_num_tokens": 24}
    manifest, _ = make(path / "checkpoint", path / "store", dtype="float16", **sizes, **options)
    return load_into_main_memory(DirectoryStore(path / "store"), manifest.engine_id, GPU)


def test_what_is_fused(plain: Path, tmp_path: Path) -> None:
    loaded = load(plain, tmp_path, "by token")
    assert cuda_runner.CudaRunner.takes(loaded.program)
    assert [op.op for op in fuse.fuse(loaded.program).ops] == [
        *("rope_table", "embedding", "rms_norm_fp8", "product_fp8", "split", "rope_attention", "quantize_fp8", "product_fp8"),
        *("add_rms_norm_fp8", "product_fp8", "silu_mul_fp8", "product_fp8", "gather", "gather", "add_rms_norm", "linear"),
    ]  # fmt: skip


def test_the_runner_takes_8_bits_on_hopper_alone(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(plain, tmp_path, "by token", kv_cache_dtype="fp8")
    _, half = make(plain, tmp_path / "store", dtype="float16")
    _, cache = make(plain, tmp_path / "store", dtype="float16", kv_cache_dtype="fp8")
    monkeypatch.setattr(fp8, "able", lambda: False)
    assert [cuda_runner.CudaRunner.takes(program) for program in (half, cache, loaded.program)] == [True, False, False]


CASES = [("by token", "auto", 2), ("by tensor", "fp8", 1), ("by group", "auto", 1)]


@pytest.mark.parametrize(("name", "cache", "count"), CASES)
def test_gives_the_references_tokens(
    name: str, cache: str, count: int, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sense of docs/architecture.md. By group, products run on their references."""
    monkeypatch.setattr("executor_svc.kernels.decodes.SPLITS_FOR", 8)
    loaded = load(plain, tmp_path, name, kv_cache_dtype=cache)
    runner = cuda_runner.CudaRunner(
        loaded.program, loaded.weights, loaded.manifest.limits, kv_memory=1 << 20, device="cpu"
    )
    work = [Sequence(0, row, [(7 * row + 3 * at) % 60 for at in range(5 + 12 * row)], 5 + 12 * row, 3, Sampling(0.0))
            for row in range(count)]  # fmt: skip
    run_ahead(runner, Scheduler(scheduler_config(runner, loaded.manifest)), work)
    for sequence in work:
        assert len(sequence.token_ids) == sequence.prompt_len + 3
        assert shortfall(loaded, sequence).max() <= 0.15
