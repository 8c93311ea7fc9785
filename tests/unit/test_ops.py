"""Every implementation of an operator against its reference, on random shapes; and the table against the references."""

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.ops import REFERENCE, Step, attention
from engine.opset import OPERATORS
from engine.program import Op, Program, TensorType, Value
from executor_svc import kernels
from executor_svc.kernels import native

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


Implementation = Callable[..., Any]
IMPLEMENTATIONS: dict[tuple[str, str], dict[str, Implementation]] = {
    ("torch", op): kernels.own("cpu") for op in kernels.own("cpu")
}
NATIVE = native.operators(REFERENCE) if native.available else {}
IMPLEMENTATIONS |= {("native", op): NATIVE for op in NATIVE}
needs_native = pytest.mark.skipif(
    not native.available, reason="compiled without a C compiler: torch's operators are used"
)


def attention_case(draw: st.DrawFn, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], list[Step]]:
    """Two steps of the same sequences: what they have cached, then new tokens."""
    head_dim, groups, per_group = (
        draw(st.sampled_from([8, 20, 64])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 7, 60])),
    )
    lens = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 200)), min_size=1, max_size=4))
    counts = [-(-(new + old) // BLOCK_SIZE) for new, old in lens]
    order = torch.randperm(sum(counts) + 2).tolist()
    tables, blocks_of = torch.zeros(len(lens), max(counts), dtype=torch.int32), []
    for row, count in enumerate(counts):
        blocks, order = order[:count], order[count:]
        blocks_of.append(blocks)
        tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
    shape = (sum(counts) + 2, BLOCK_SIZE, groups, head_dim)
    caches = [torch.zeros(shape, dtype=dtype)], [torch.zeros(shape, dtype=dtype)]
    steps = []
    for spans in ([(0, old) for _, old in lens], [(old, old + new) for new, old in lens]):
        rows = [row for row, (begin, end) in enumerate(spans) if end > begin]
        slots = [
            blocks_of[row][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for row in rows for at in range(*spans[row])
        ]
        lengths, ends = [spans[row][1] - spans[row][0] for row in rows], [spans[row][1] for row in rows]
        steps.append(Step(lengths, ends, tables[rows].contiguous(), torch.tensor(slots, dtype=torch.int64), *caches))
    steps = [step for step in steps if step.query_lens]
    heads = 2 * groups + groups * per_group  # as a fused product gives them: rows that lie apart
    fused = torch.randn(sum(sum(step.query_lens) for step in steps), heads * head_dim, dtype=dtype)
    sizes = [groups * per_group * head_dim, groups * head_dim, groups * head_dim]
    settings_ = {"cache": 0, "head_dim": head_dim, "scale": 0.3, "window": draw(st.sampled_from([0, 0, 1, 5, 64, 150]))}
    return list(torch.split(fused, sizes, -1)), settings_, steps


def attend(operator: Implementation, tensors: list[Tensor], attrs: dict[str, Any], steps: list[Step]) -> Tensor:
    """All steps one after another on caches of its own: how they lie in them is the implementation's affair."""
    caches = [torch.zeros_like(steps[0].k_caches[0])], [torch.zeros_like(steps[0].v_caches[0])]
    done, outputs = 0, []
    for step in steps:
        part = [tensor[done : done + sum(step.query_lens)] for tensor in tensors]
        outputs.append(operator(*part, **attrs, step=replace(step, k_caches=caches[0], v_caches=caches[1])))
        done += sum(step.query_lens)
    return torch.cat(outputs)


@st.composite
def cases(draw: st.DrawFn, op: str) -> tuple[list[Tensor], dict[str, Any]]:
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    rows, size, outputs = draw(st.integers(op == "rope", 40)), draw(st.integers(1, 70)), draw(st.integers(1, 140))
    x, y, weight = (
        torch.randn(rows, size, dtype=dtype),
        torch.randn(rows, size, dtype=dtype),
        torch.randn(size, dtype=dtype),
    )
    matrix, bias = torch.randn(outputs, size, dtype=dtype), torch.randn(outputs, dtype=dtype)
    half, rest, heads = draw(st.integers(1, 9)), draw(st.sampled_from([0, 4])), draw(st.integers(1, 3))
    angles = torch.randn(rows, half)
    wide = torch.randn(rows, heads * (2 * half + rest) + 3, dtype=dtype)[:, 3:]
    turn = {"head_dim": 2 * half + rest, "interleaved": draw(st.booleans())}
    made: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "embedding": ([torch.randint(0, outputs, (rows,), dtype=torch.int32), matrix], {}),
        "linear": ([x, matrix, draw(st.sampled_from([None, bias]))], {}),
        "rms_norm": ([x, weight], {"eps": 1e-5}),
        "add_rms_norm": ([x, y, weight], {"eps": 1e-5}),
        "rope": ([wide, angles.cos(), angles.sin()], turn),
        "silu_mul": ([torch.cat((x * 5, y), -1)], {}),
    }
    return made[op]


def compare(wanted: Any, got: Any) -> None:
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (wanted, got)), strict=True)
    for want, have in pairs:
        assert have.dtype == want.dtype and have.shape == want.shape
        assert (have.float() - want.float()).norm() <= TOLERANCE[want.dtype] * want.float().norm() + 1e-6


@pytest.mark.parametrize(("kind", "op"), IMPLEMENTATIONS)
def test_implementation_agrees_with_the_reference(kind: str, op: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def agree(data: st.DataObject) -> None:
        implementation = IMPLEMENTATIONS[kind, op][op]
        if op == "attention":
            dtype = data.draw(st.sampled_from(list(TOLERANCE)))
            torch.manual_seed(data.draw(st.integers(0, 10_000)))
            tensors, attrs, steps = attention_case(data.draw, dtype)
            compare(attend(REFERENCE[op], tensors, attrs, steps), attend(implementation, tensors, attrs, steps))
            return
        tensors, attrs = data.draw(cases(op))
        wanted = REFERENCE[op](*tensors, **attrs)
        if kind == "native" and op in ("linear", "embedding"):
            tensors[1] = native.Packed(tensors[1].clone())
        compare(wanted, implementation(*tensors, **attrs))

    agree()


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_of_a_native_product_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    linear = NATIVE["linear"]
    weight, x = native.Packed(torch.randn(80, 50, dtype=dtype)), torch.randn(40, 50, dtype=dtype)
    together = linear(x, weight)
    for rows in (1, 2, 7, 13, 40):
        assert torch.equal(linear(x[:rows], weight), together[:rows])


@needs_native
@pytest.mark.parametrize("level", ["avx2", "plain"])
def test_native_operators_of_lesser_processors_agree_too(level: str) -> None:
    """The level is chosen once in a process."""
    names = " or ".join(f"native-{op}" for kind, op in IMPLEMENTATIONS if kind == "native")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        f"({names}) and reference",
    ]
    run = subprocess.run(command, env={**os.environ, "ENGINEHOUSE_CPU": level}, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("." * 7), run.stdout[-3000:]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here: torch's operators are used")
def test_the_native_operators_are_there_where_there_is_a_compiler() -> None:
    assert native.available
    chosen = kernels.implementations("cpu")
    assert all(chosen[op] is not REFERENCE[op] for op in ("linear", "attention", "rope", "silu_mul"))


def test_without_the_native_operators_torch_serves() -> None:
    program = (
        "from executor_svc.kernels import implementations, native\n"
        "print(native.available, implementations('cpu')['attention'])"
    )
    environment = {**os.environ, "ENGINEHOUSE_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("False <function attention at "), run.stderr


@needs_native
@pytest.mark.parametrize(
    "call",
    [
        lambda packed: packed.rows(torch.tensor([64], dtype=torch.int32)),
        lambda packed: packed.rows(torch.tensor([-1], dtype=torch.int32)),
        lambda packed: NATIVE["linear"](torch.ones(2, 8), packed),
        lambda packed: NATIVE["linear"](torch.ones(2, 32), packed, torch.ones(8)),
        lambda packed: NATIVE["rms_norm"](torch.ones(2, 8), torch.ones(4), eps=1e-6),
        lambda packed: NATIVE["add_rms_norm"](torch.ones(2, 8), torch.ones(1, 8), torch.ones(8), eps=1e-6),
        lambda packed: NATIVE["rope"](
            torch.ones(2, 8), torch.ones(1, 4), torch.ones(1, 4), head_dim=8, interleaved=False
        ),
        lambda packed: NATIVE["rope"](
            torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8), head_dim=8, interleaved=False
        ),
    ],
)
def test_native_operators_touch_no_memory_but_their_tensors(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        call(native.Packed(torch.randn(64, 32)))


def test_the_table_and_the_references_have_the_same_signatures() -> None:
    assert set(OPERATORS) == set(REFERENCE)
    for name, operator in OPERATORS.items():
        parameters = inspect.signature(REFERENCE[name]).parameters
        keywords = {key for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
        assert tuple(key for key in parameters if key not in keywords) == tuple(
            slot.rstrip("?") for slot in operator.inputs
        )
        assert keywords - {"step"} == set(operator.attrs)


PACKED_CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "linear_int4": ({"group_size": 32}, (5, 80)),  # the last group is short
    "linear_int8": ({}, (5, 33)),
    # Blocks at the ends are short, and there are more rows than are expanded at once.
    "linear_fp8": ({"block_rows": 128, "block_columns": 48}, (1300, 80)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", PACKED_CASES)
def test_packed_products_by_their_formulas_in_float64(op: str, dtype: torch.dtype) -> None:
    """The reference, and the linear over the matrix that the CPU makes of it at load."""
    torch.manual_seed(0)
    attrs, (rows, columns) = PACKED_CASES[op]
    rows_of, columns_of = torch.arange(rows), torch.arange(columns)
    zeros: list[Any] = []
    if op == "linear_int4":
        codes, zero = torch.randint(0, 16, (rows, columns)), torch.randint(0, 16, (rows, 3))
        weight = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
        scales, zeros = torch.rand(rows, 3).half(), [zero.to(torch.uint8)]
        exact = (codes - zero[:, columns_of // 32]).double() * scales.double()[:, columns_of // 32]
    elif op == "linear_int8":
        weight, scales = torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows).bfloat16()
        exact = weight.double() * scales.double()[:, None]
    else:
        weight, scales = (torch.randn(rows, columns) * 50).to(torch.float8_e4m3fn), torch.rand(11, 2)
        exact = weight.double() * scales.double()[rows_of // 128][:, columns_of // 48]
    x, bias = torch.randn(3, columns, dtype=dtype), torch.randn(rows, dtype=dtype)
    wanted = x.double() @ exact.to(dtype).double().T + bias.double()
    tensors = [weight, scales, *zeros]
    compare(wanted.to(dtype), REFERENCE[op](x, *tensors, bias, **attrs))
    without = torch.nn.functional.linear(x.double(), exact.to(dtype).double())
    compare(without.to(dtype), REFERENCE[op](x, *tensors, None, **attrs))

    names = ["weight", "scales", "zeros"][: len(tensors)]
    held = dict(zip([*names, "bias", "kept"], [*tensors, bias, torch.ones(2)], strict=True))
    kinds = {
        name: TensorType(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))  # type: ignore[arg-type]
        for name, tensor in held.items()
    }
    kind = TensorType(str(dtype).removeprefix("torch."), ("t", rows))  # type: ignore[arg-type]
    ops = (Op(op, ("x", *names, "bias"), (Value("y", kind),), attrs),)
    program = Program({"t": 9}, {"x": msgspec.structs.replace(kind, shape=("t", columns))}, kinds, (), ops, ("y",))
    program.validate()
    assert program.parameters() == {"weight": rows * columns, "bias": rows, "kept": 2} | dict.fromkeys(names[1:], 0)
    assert kernels.unpack("cuda", program, held) == (program, held)
    plain, dense = kernels.unpack("cpu", program, held)
    plain.validate()
    assert [op.op for op in plain.ops] == ["linear"] and set(dense) == set(plain.weights) == {"weight", "bias"}
    assert torch.equal(dense["weight"], exact.float().to(dtype)) and plain.weights["weight"].dtype == kind.dtype


def test_attention_reference_by_hand() -> None:
    """One head, one dimension, keys 0: the mean of the values that a window of two lets a query see."""
    caches = [torch.zeros(2, 2, 1, 1)], [torch.zeros(2, 2, 1, 1)]
    step = Step([3], [3], torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([2, 3, 0]), *caches)
    zero, values = torch.zeros(3, 1), torch.tensor([[1.0], [3.0], [5.0]])
    out = attention(zero, zero, values, step=step, cache=0, head_dim=1, scale=1.0, window=2)
    assert out.flatten().tolist() == [1.0, 2.0, 4.0]
    assert step.v_caches[0].flatten().tolist() == [5.0, 0.0, 1.0, 3.0]


def test_rope_reference_interleaved_is_the_other_order_of_the_same_rotation() -> None:
    x = torch.randn(5, 2 * 12)
    positions, inv_freq = torch.arange(5, dtype=torch.int32), torch.tensor([1.0, 0.5, 0.1, 0.01])
    cos, sin = REFERENCE["rope_table"](positions, inv_freq, scale=1.0)
    order = torch.tensor(
        [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11]
    )  # pairs (2i, 2i+1) -> (i, i+4); 4 dimensions are not turned
    flat = REFERENCE["rope"](x, cos, sin, head_dim=12, interleaved=True).view(5, 2, 12)[..., order]
    halves = REFERENCE["rope"](x.view(5, 2, 12)[..., order].reshape(5, 24), cos, sin, head_dim=12, interleaved=False)
    assert torch.allclose(flat.reshape(5, 24), halves, atol=1e-6)
    assert torch.allclose(halves.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
