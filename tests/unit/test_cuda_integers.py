"""The kernels for int4 and int8 against the references, by Triton's interpreter, and programs; `tests/gpu` has the device's.

In float16: the interpreter knows no products of bfloat16.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from quantized_writers import save_quantized
from test_cuda_fp8 import rotated
from test_fp8 import GPU, make
from test_quantized import CASES, no_head
from torch import Tensor

from engine.directory import DirectoryStore
from engine.ops import REFERENCE, Step, quantize_int8
from engine.opset import FLOATS
from engine.program import Program, TensorType
from executor_svc.core import Sampling, Sequence
from executor_svc.kernel_archive import unpack
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from tests.conftest import save_checkpoint
from tests.running import load_into_main_memory, run_ahead, shortfall

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
cuda = pytest.importorskip("executor_svc.kernels.gpu")
tactics = pytest.importorskip("executor_svc.kernels.tactics")

MODELS = Path(__file__).parents[2] / "bench" / "models"


def close(found: Tensor, wanted: Tensor) -> None:
    """By relative L2 error, of which rounding to float16 is a fifth."""
    assert found.dtype == torch.float16 and found.shape == wanted.shape
    assert (found.float() - wanted).norm() <= 1e-3 * wanted.norm()


def telling(found: list[Any]) -> list[Any]:
    """Of the candidates those that differ for the interpreter, which has no stages: of each kernel and width a few splits."""
    splits = {"tiles": (2, 8), "bulk": (1, 4)}
    return [how for how in found if how.kernel == "library" or how.form.splits in splits[how.kernel]]


def multiply_int4(
    rows: int, outputs: int, columns: int, group: int, zeros: bool, chosen: Callable[[list[Any]], list[Any]]
) -> None:
    torch.manual_seed(rows)
    groups = -(-columns // group)
    weight = torch.randint(0, 256, (outputs, columns // 2), dtype=torch.uint8)
    scales, bias = torch.rand(outputs, groups).bfloat16(), torch.randn(outputs).half()
    points = torch.randint(0, 16, (outputs, groups), dtype=torch.uint8) if zeros else None
    x = torch.randn(rows, columns).half() / 10
    wanted = REFERENCE["linear_int4"](x.float(), weight, scales, points, bias.float(), group_size=group)
    packed = cuda.Packed(weight, scales, points, group)
    assert cuda.takes(packed, x)
    shape = tactics.Product(tactics.power(rows), outputs, columns, packed.kind)
    for tactic in [None, *chosen(tactics.candidates(shape))]:
        table = {shape: tactic} if tactic else {}
        close(cuda.linear_int4(x, weight, scales, points, bias, group_size=group, table=table), wanted)
    assert not tactics.products.counters(x.device).any()


ROWS = pytest.mark.parametrize("rows", [1, 3, 5, 70])
INT4 = [(70, 256, 128, False), (24, 2184, 128, True), (37, 200, 32, True), (33, 136, 1024, False), (20, 264, 192, True)]


@ROWS
@pytest.mark.parametrize(("outputs", "columns", "group", "zeros"), INT4)
def test_products_of_int4(rows: int, outputs: int, columns: int, group: int, zeros: bool) -> None:
    """On sizes that are no multiples of a tile's, and groups that end short. Split sums leave counters at 0."""
    multiply_int4(rows, outputs, columns, group, zeros, telling)


@pytest.mark.drill
@ROWS
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("outputs", "columns", "group"), [case[:3] for case in INT4])
def test_products_of_int4_by_every_tactic(rows: int, outputs: int, columns: int, group: int, zeros: bool) -> None:
    multiply_int4(rows, outputs, columns, group, zeros, list)


@ROWS
@pytest.mark.parametrize(("outputs", "columns"), [(70, 256), (37, 200)])
def test_products_of_int8(rows: int, outputs: int, columns: int) -> None:
    torch.manual_seed(rows)
    weight, scales = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8), torch.rand(outputs) / 30
    x, bias = torch.randn(rows, 2 * columns).half()[:, columns:], torch.randn(outputs).half()
    wanted = REFERENCE["linear_int8"](x.float(), weight, scales, bias.float())
    shape = tactics.Product(tactics.power(rows), outputs, columns, "int8")
    for tactic in [None, *telling(tactics.candidates(shape))]:
        close(cuda.linear_int8(x, weight, scales, bias, table={shape: tactic} if tactic else {}), wanted)
    assert cuda.linear_int8(x[:0], weight, scales).shape == (0, outputs)


def execute(assembly: str, inputs: list[Tensor], outputs: int) -> list[Tensor]:
    """What instructions of PTX make of words, in the order of their operands: those that the kernels have."""
    inside = dict(zip((f"${at}" for at in range(outputs, outputs + len(inputs))), inputs, strict=True))

    def value(name: str) -> Tensor:
        return torch.tensor(int(name, 0)) if name[0].isdigit() else inside[name]

    def numbers(words: Tensor, dtype: torch.dtype) -> Tensor:
        """Both of each word, as float64, in which products and sums of them are exact."""
        return torch.stack((words & 0xFFFF, words >> 16)).to(torch.uint16).view(dtype).double()

    for line in assembly.strip("{}\n").split(";")[:-1]:
        name, *given = line.replace(",", " ").split()
        if name == ".reg":
            continue
        target, (one, *others) = given[0], [value(operand) for operand in given[1:]]
        match name.split("."):
            case "mov", _:
                made = one
            case "shr", _:
                made = one >> others[0]
            case "shl", _:
                made = one << others[0] & 0xFFFFFFFF
            case "mul", _, _:
                made = one * others[0] & 0xFFFFFFFF
            case "xor", _:
                made = one ^ others[0]
            case "prmt", _:
                both = one | others[0] << 32
                picked = [int(others[1]) >> 4 * at & 15 for at in range(4)]
                assert max(picked) < 8  # no signs
                made = sum((both >> 8 * byte & 255) << 8 * at for at, byte in enumerate(picked))
            case "lop3", _:
                assert others[2] == 0xEA
                made = one & others[0] | others[1]
            case "fma", "rn", kind:
                dtype = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}[kind]
                one, by, plus = (numbers(words.expand(inputs[0].shape), dtype) for words in (one, *others))
                low, high = (one * by + plus).to(dtype).view(torch.uint16).long()
                made = low | high << 16
            case _:
                raise AssertionError(line)
        inside[target] = made
    return [inside[f"${at}"] for at in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "many"), [(4, 1), (4, 4), (8, 1), (8, 2)])
def test_assembly_takes_codes_apart_exactly(bits: int, many: int, dtype: torch.dtype) -> None:
    """Every pair of codes, with every zero, at every place of a word: the interpreter runs no assembly."""
    size = 1 << 2 * bits
    codes = torch.stack([(torch.arange(size) * 7 + 11 * at) % size for at in range(many)])
    words = sum(part << 2 * bits * at for at, part in enumerate(codes))
    integers = tactics.integers
    assembly = integers._assembly(bits, dtype, many)
    pairs = torch.stack((codes % (1 << bits), codes >> bits))
    if bits == 4:
        found = torch.stack(execute(integers._assembly(bits, dtype, many, above=True), [words], many))
        low, high = (
            part.to(dtype).view(torch.uint16).long() for part in pairs + (16 if dtype == torch.bfloat16 else 64)
        )
        assert torch.equal(found, low | high << 16)
    for zero in range(16 if bits == 4 else 1):
        leading = integers.LESS_BF16 if dtype == torch.bfloat16 else integers.LESS_FP16
        less = torch.tensor(leading.value + zero * 0x10001)
        found = torch.stack(execute(assembly, [words, *([less & 0xFFFFFFFF] * many if bits == 4 else [])], many))
        wanted = pairs - zero if bits == 4 else pairs - 256 * (pairs > 127)
        low, high = (part.to(dtype).view(torch.uint16).long() for part in wanted)
        assert torch.equal(found, low | high << 16)


def test_what_the_kernels_do_not_take_is_the_references() -> None:
    """Groups that no tile divides, and rows of no whole words."""
    for columns, group in ((96, 48), (100, 32)):
        weight, scales = (
            torch.randint(0, 256, (7, columns // 2), dtype=torch.uint8),
            torch.rand(7, -(-columns // group)),
        )
        x = torch.randn(3, columns).half()
        assert not cuda.takes(cuda.Packed(weight, scales, None, group), x)
        wanted = REFERENCE["linear_int4"](x, weight, scales, group_size=group)
        assert torch.equal(cuda.linear_int4(x, weight, scales, group_size=group), wanted)


def rounding(program: Program, how: str, products: int) -> Program:
    """With a cache of int8, and so many of its products in int8 that round their input."""
    types, ops = dict(program.weights), []
    for op in program.ops:
        if op.op == "linear_int8" and products:
            products -= 1
            name = op.inputs[1].replace("weight", "input_scale")
            if how == "tensor":
                types[name] = TensorType("float32", (1,))
                op = msgspec.structs.replace(op, inputs=(*op.inputs, name))
            else:
                op = msgspec.structs.replace(op, attrs={"per_token": True})
        elif op.op == "attention":
            scales: dict[str, Any] = {"k_scale": 0.05, "v_scale": 0.05, "kv_int8": True}
            op = msgspec.structs.replace(op, attrs={**op.attrs, **scales})
        ops.append(op)
    caches = tuple(msgspec.structs.replace(cache, dtype="int8") for cache in program.caches)
    program = msgspec.structs.replace(program, ops=tuple(ops), weights=types, caches=caches, opset_version=5)
    program.validate()
    return program


@pytest.mark.drill
def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """At an 8B's sizes: the interpreter takes what the compiler does not, and runs no assembly."""
    config = json.loads((MODELS / "llama-3.1-8b-int4" / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    layers = config["quantization_config"]["config_groups"]
    layers["group_0"]["targets"] = ["re:.*mlp.*"]
    whole = json.loads((MODELS / "llama-3.1-8b-int8" / "config.json").read_text())["quantization_config"]
    layers["group_1"] = whole["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    limits = {"max_seq_len": 256, "max_batch_size": 2, "max_num_tokens": 128}
    _, program = make(tmp_path, tmp_path / "store", dummy_weights=True, **limits)
    assert [op.op for op in program.ops if op.op.startswith("linear_")] == ["linear_int8"] * 2 + ["linear_int4"] * 2
    program = rounding(program, "token", 1)
    (tmp_path / "program.json").write_bytes(program.to_json())
    told = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told |= {"TRITON_KERNEL_DUMP": "1", "TRITON_DUMP_DIR": str(tmp_path / "dump")}
    command = [sys.executable, "-m", "executor_svc.compile", str(tmp_path / "program.json")]
    command += ["--limits", json.dumps(limits), "--out", str(tmp_path / "kernels"), "--compute-capability", "9.0"]
    done = subprocess.run(command, capture_output=True, text=True, env=told, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "does not compile" not in done.stderr, done.stderr[-2000:]
    unpack((tmp_path / "kernels").read_bytes(), tmp_path)
    found = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert found >= {"_tiles", "_expand", "_gemv", "_norm", "_bulk", "_rope_write", "_decode"}, found
    # A product of a warpgroup whose tall side is in registers has ended before the next tile is loaded into them.
    dumped = [path.read_text() for path in tmp_path.rglob("_tiles.ttgir")]
    by_registers = [text for text in dumped if re.search(r"warp_group_dot .*: tensor<.* \* !ttg.memdesc", text)]
    assert {re.search(r"%weight: !tt.ptr<(\w+)>", text)[1] for text in by_registers} == {
        "i8",
        "i16",
    }  # of 4 bits, and of 8
    for text in by_registers:
        assert set(re.findall(r"pendings = (\d+)", text)) == {"0"}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", [40, 2100])
def test_rows_are_rounded_to_int8_where_they_are_made(size: int, static: bool) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, size).half() * 3, torch.randn(5, size).half(), torch.randn(size).half()
    x[2] = residual[2] = 0
    by = torch.tensor([0.02]) if static else None
    for name, inputs, attrs in (
        ("rms_norm", (x, weight), {"eps": 1e-5}),
        ("add_rms_norm", (x, residual, weight), {"eps": 1e-5}),
        ("add_rms_norm", (x, residual, weight.float()), {"eps": 1e-5}),
        ("silu_mul", (torch.cat((x, residual), 1),), {}),
        ("silu_mul", (torch.cat((x, residual), 1).repeat(14, 1),), {}),
    ):
        wanted = REFERENCE[name](*inputs, **attrs)
        y, *others = wanted if isinstance(wanted, tuple) else (wanted,)
        q, scales, *sums = getattr(cuda, f"{name}_int8")(*inputs, by, **attrs)
        assert all(torch.equal(one, other) for one, other in zip(sums, others, strict=True))
        exact, of_rows = quantize_int8(y, by)
        torch.testing.assert_close(scales, of_rows.contiguous(), rtol=1e-2, atol=1e-12)
        assert (q.int() - exact.int()).abs().max() <= 1  # where y has been rounded otherwise
    q, scales = cuda.quantize_int8(x, by)
    exact, of_rows = quantize_int8(x, by)
    assert torch.equal(q, exact) and torch.equal(scales, of_rows.contiguous())


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 300, 70), (20, 300, 70), (70, 304, 150)])
def test_products_of_integers_are_exact(rows: int, columns: int, outputs: int) -> None:
    """Sums beyond 2^24, which float32 would round."""
    torch.manual_seed(rows)
    q, weight = (torch.randint(90, 128, (count, columns), dtype=torch.int8) for count in (rows, outputs))
    q[:, ::7], weight[:, ::5] = -127, -128
    of_rows, scales, bias = torch.rand(rows, 1), torch.rand(outputs), torch.randn(outputs).half()
    wanted = (q.double() @ weight.double().T * of_rows * scales + bias).float()
    shape = cuda.tactics.shape_of(q, weight, "w8a8")
    for tactic in [None, *cuda.tactics.candidates(shape)]:
        table = {shape: tactic} if tactic else {}
        found = cuda.product_int8(q, of_rows, weight, scales, bias, dtype=FLOATS.index("float32"), table=table)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_attention_over_a_cache_of_int8(head_dim: int, fused: bool) -> None:
    """A decode, a prompt with a cached prefix, and one that begins, which may read its keys where they are rotated."""
    torch.manual_seed(head_dim)
    table = torch.tensor([[1, 0], [2, 3], [4, 0]], dtype=torch.int32)
    slots = torch.tensor([16 + 8, *range(48, 53), *range(64, 71)])
    cached = [torch.randint(-127, 128, (5, 16, 2, head_dim), dtype=torch.int8) for _ in range(2)]
    parts = torch.split(torch.randn(13, 8 * head_dim).half(), [4 * head_dim, 2 * head_dim, 2 * head_dim], 1)
    angles = torch.randn(13, head_dim // 2)
    attrs: dict[str, Any] = {"cache": 0, "head_dim": head_dim, "scale": 0.1, "window": 0}
    attrs |= {"k_scale": 0.03, "v_scale": 0.02, "kv_int8": True}
    if fused:
        attrs["interleaved"], parts = False, (*parts, angles.cos(), angles.sin())
    found = []
    for function in (cuda.rope_attention, rotated) if fused else (cuda.attention, REFERENCE["attention"]):
        caches = [cache.clone() for cache in cached]
        step = Step([1, 5, 7], [9, 21, 7], table, slots, [caches[0]], [caches[1]])
        found.append((function(*parts, step=step, **attrs), *caches))
    ours, theirs = found
    assert (ours[0].float() - theirs[0].float()).norm() <= 1e-2 * theirs[0].float().norm()
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one.int() - other.int()).abs().max() <= 1  # where a rotated key is rounded otherwise


# --- programs


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", **size, num_key_value_heads=1)


@pytest.mark.parametrize(("name", "rounds"), [("awq", ""), ("int", ""), ("int", "tensor")])
def test_gives_the_references_tokens(
    name: str, rounds: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sense of docs/architecture.md; where activations are rounded, with a KV cache of int8, too."""
    monkeypatch.setattr("executor_svc.kernels.decodes.SPLITS_FOR", 8)
    cuda_runner = pytest.importorskip("executor_svc.cuda_runner")
    case = CASES[name]
    save_quantized(plain, tmp_path / "checkpoint", case.config, no_head(case.writer))
    sizes: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 4, "max_num_tokens": 24}
    manifest, _ = make(tmp_path / "checkpoint", tmp_path / "store", dtype="float16", **sizes)
    loaded = load_into_main_memory(DirectoryStore(tmp_path / "store"), manifest.engine_id, GPU)
    if rounds:
        program = rounding(loaded.program, rounds, 4)
        scales = {name: torch.tensor([0.05]) for name in program.weights.keys() - loaded.program.weights.keys()}
        loaded = replace(loaded, program=program, weights={**loaded.weights, **scales})
    assert cuda_runner.CudaRunner.takes(loaded.program)
    kinds = Counter(op.op.rpartition("_")[2] for op in cuda_runner.fuse(loaded.program).ops)
    assert kinds["int8"] == (8 if rounds else 4 if name == "int" else 0)
    runner = cuda_runner.CudaRunner(loaded.program, loaded.weights, manifest.limits, kv_memory=1 << 20, device="cpu")
    work = [Sequence(0, row, [(7 * row + 3 * at) % 60 for at in range(5 + 12 * row)], 5 + 12 * row, 3, Sampling(0.0))
            for row in range(2)]  # fmt: skip
    run_ahead(runner, Scheduler(scheduler_config(runner, manifest)), work)
    for sequence in work:
        assert len(sequence.token_ids) == sequence.prompt_len + 3
        assert shortfall(loaded, sequence).max() <= (0.15 if rounds else 0.02)
