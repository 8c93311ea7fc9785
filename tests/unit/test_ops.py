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
from executor_svc.interpreter import Interpreter
from executor_svc.kernels import native
from executor_svc.kernels.expand import expand
from executor_svc.kernels.packed import Words

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
    settings_["soft_cap"] = draw(st.sampled_from([0.0, 0.0, 0.5, 30.0]))
    alibi = draw(st.sampled_from([[], [], [torch.rand(groups * per_group)]]))
    return [*torch.split(fused, sizes, -1), *alibi], settings_, steps


def attend(operator: Implementation, tensors: list[Tensor], attrs: dict[str, Any], steps: list[Step]) -> Tensor:
    """All steps one after another on caches of its own: how they lie in them is the implementation's affair."""
    caches = [torch.zeros_like(steps[0].k_caches[0])], [torch.zeros_like(steps[0].v_caches[0])]
    done, outputs = 0, []
    for step in steps:
        part = [tensor[done : done + sum(step.query_lens)] for tensor in tensors[:3]] + tensors[3:]
        outputs.append(operator(*part, **attrs, step=replace(step, k_caches=caches[0], v_caches=caches[1])))
        done += sum(step.query_lens)
    return torch.cat(outputs)


def int4_case(
    draw: st.DrawFn, rows: int, size: int, outputs: int, dtype: torch.dtype
) -> tuple[list[Any], dict[str, Any]]:
    """Groups of all sizes that stay packed; the last may be short, or the only one."""
    columns, group = 2 * size, draw(st.sampled_from([8, 32, 64, 128, 200]))
    shape = (outputs, -(-columns // group))
    scales = torch.rand(shape).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    zeros = draw(st.sampled_from([None, torch.randint(0, 16, shape, dtype=torch.uint8)]))
    weight = torch.randint(0, 256, (outputs, size), dtype=torch.uint8)
    bias = draw(st.sampled_from([None, torch.randn(outputs, dtype=dtype)]))
    return [torch.randn(rows, columns, dtype=dtype), weight, scales, zeros, bias], {"group_size": group}


def int8_case(draw: st.DrawFn, x: Tensor, outputs: int) -> tuple[list[Any], dict[str, Any]]:
    """Activations as they are, by token, or by a scale that cuts some off."""
    weight = torch.randint(-128, 128, (outputs, x.shape[1]), dtype=torch.int8)
    scales = torch.rand(outputs).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    bias = draw(st.sampled_from([None, torch.randn(outputs, dtype=x.dtype)]))
    kind = draw(st.sampled_from(["weights", "token", "tensor"]))
    tensors = [x, weight, scales, bias, *([torch.tensor([0.02])] if kind == "tensor" else [])]
    return tensors, {"per_token": kind == "token"}


def rope_case(draw: st.DrawFn, rows: int, heads: int, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """Heads of which all or a part is turned, in rows that lie apart."""
    half, rest = draw(st.integers(1, 9)), draw(st.sampled_from([0, 4]))
    angles, head_dim = torch.randn(rows, half), 2 * half + rest
    wide = torch.randn(rows, heads * head_dim + 3, dtype=dtype)[:, 3:]
    return [wide, angles.cos(), angles.sin()], {"head_dim": head_dim, "interleaved": draw(st.booleans())}


def experts_case(draw: st.DrawFn, rows: int, hidden: int, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """hidden: not a few: a sum over experts of a single element may be nearly 0, with all of the terms' rounding."""
    count, inner = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    shapes = (rows, hidden), (rows, count), (count, 2 * inner, hidden), (count, hidden, inner)
    x, logits, gate_up, down = (torch.randn(shape, dtype=dtype) for shape in shapes)
    choice = {"top_k": draw(st.integers(1, count)), "normalize": draw(st.booleans())}
    return [x, logits * 2, gate_up / hidden**0.5, down], choice


@st.composite
def cases(draw: st.DrawFn, op: str) -> tuple[list[Tensor], dict[str, Any]]:
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    rows, size, outputs = (
        draw(st.integers(op in ("rope", "head_rms_norm"), 40)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 140)),
    )
    outputs = max(outputs, 4 // max(rows, 1))  # a single sum may be nearly 0, with all of its terms' rounding
    x, y, weight = (torch.randn(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,)))
    precise = draw(st.sampled_from([dtype, torch.float32]))  # a norm's weight may have more than its activations
    heads, eps = draw(st.integers(1, 3)), {"eps": 1e-5}

    def matrix() -> Tensor:
        return torch.randn(outputs, size, dtype=dtype)

    def norm() -> list[Any]:
        return [weight.to(precise), draw(st.sampled_from([None, torch.randn(size).to(precise)]))]

    def tanh() -> dict[str, Any]:
        return {"tanh": draw(st.booleans())}

    made: dict[str, Callable[[], tuple[list[Any], dict[str, Any]]]] = {
        "embedding": lambda: ([torch.randint(0, outputs, (rows,), dtype=torch.int32), matrix()], {}),
        "embedding_shard": lambda: (
            [torch.randint(0, 2 * outputs, (rows,), dtype=torch.int32), matrix(), torch.tensor([outputs // 2]).int()],
            {},
        ),
        "gather": lambda: ([matrix(), torch.randint(0, outputs, (rows,), dtype=torch.int32)], {}),
        "rope_table": lambda: (
            [torch.randint(0, 200_000, (rows,), dtype=torch.int32), 1 / torch.randint(1, 10**6, (size,))],
            {"scale": draw(st.floats(0.5, 2))},
        ),
        "linear": lambda: ([x, matrix(), draw(st.sampled_from([None, torch.randn(outputs, dtype=dtype)]))], {}),
        "linear_int4": lambda: int4_case(draw, rows, size, outputs, dtype),
        "linear_int8": lambda: int8_case(draw, x, outputs),
        "rms_norm": lambda: ([x, weight.to(precise)], eps),
        "add_rms_norm": lambda: ([x, y, weight.to(precise)], eps),
        "layer_norm": lambda: ([x + 3, *norm()], eps),
        "add_layer_norm": lambda: ([x, y, *norm()], eps),
        "head_rms_norm": lambda: ([torch.randn(rows, heads * size + 3, dtype=dtype)[:, 3:], weight.to(precise)], eps),
        "rope": lambda: rope_case(draw, rows, heads, dtype),
        "silu_mul": lambda: ([torch.cat((x * 5, y), -1)], {}),
        "gelu": lambda: ([x * 3], tanh()),
        "gelu_mul": lambda: ([torch.cat((x * 3, y), -1)], tanh()),
        "scale": lambda: ([x], {"factor": draw(st.floats(-3, 3))}),
        "experts": lambda: experts_case(draw, rows, size + 8, dtype),
    }
    return made[op]()


def compare(wanted: Any, got: Any) -> None:
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (wanted, got)), strict=True)
    for want, have in pairs:
        assert have.dtype == want.dtype and have.shape == want.shape
        assert (have.float() - want.float()).norm() <= TOLERANCE[want.dtype] * want.float().norm() + 1e-6


def agrees(kind: str, op: str, examples: int = 60) -> None:
    """Whether an implementation agrees with the reference."""

    @settings(max_examples=examples, deadline=None)
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
        if kind == "native":
            packed = {"linear": [1], "embedding": [1], "experts": [2, 3]}.get(op, [])
            tensors = [native.Packed(part.clone()) if at in packed else part for at, part in enumerate(tensors)]
            if op in ("linear_int4", "linear_int8"):
                scaled = tensors[2:4] if op == "linear_int4" else tensors[2:3]
                tensors[1] = Words(tensors[1].clone(), *scaled, group_size=attrs.get("group_size", 0))
        compare(wanted, implementation(*tensors, **attrs))

    agree()


@pytest.mark.parametrize(("kind", "op"), IMPLEMENTATIONS)
def test_implementation_agrees_with_the_reference(kind: str, op: str) -> None:
    agrees(kind, op)


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_of_a_native_product_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    linear = NATIVE["linear"]
    weight, x = native.Packed(torch.randn(80, 50, dtype=dtype)), torch.randn(40, 50, dtype=dtype)
    together = linear(x, weight)
    for rows in (1, 2, 7, 13, 40):
        assert torch.equal(linear(x[:rows], weight), together[:rows])


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("op", "attrs"), [("linear_int4", {"group_size": 32}), ("linear_int8", {}), ("linear_int8", {"per_token": True})]
)
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(
    op: str, attrs: dict[str, Any], dtype: torch.dtype
) -> None:
    """Few rows are computed in registers, many on panels that are unpacked; integers of many inputs are exact in either."""
    weight, scales, x = torch.randint(0, 256, (80, 2100), dtype=torch.uint8), torch.rand(80, 1), torch.randn(40, 2100)
    if op == "linear_int4":
        weight, scales = weight[:, :1050].contiguous(), torch.rand(80, 66)
    zeros = [torch.randint(0, 16, (80, 66), dtype=torch.uint8)] if op == "linear_int4" else []
    words = Words(weight if zeros else weight.view(torch.int8), scales, *zeros, group_size=attrs.get("group_size", 0))
    others = [None] * (1 + len(zeros))
    together = NATIVE[op](x.to(dtype), words, *others, **attrs)
    for rows in (1, 2, 5, 7, 13, 40):
        assert torch.equal(NATIVE[op](x[:rows].to(dtype), words, *others, **attrs), together[:rows])


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_goes_through_native_experts_as_it_would_alone(dtype: torch.dtype) -> None:
    """Many tokens are computed in several turns; experts that nobody chooses are not read."""
    tokens, count, hidden, inner = 300, 4, 48, 40
    x, logits = torch.randn(tokens, hidden, dtype=dtype), torch.randn(tokens, count, dtype=dtype)
    logits[:, 3] = -100
    gate_up, down = (
        torch.randn(count, 2 * inner, hidden, dtype=dtype) / 7,
        torch.randn(count, hidden, inner, dtype=dtype),
    )
    gate_up[3], down[3] = torch.nan, torch.nan
    attrs = {"top_k": 2, "normalize": True}
    wanted = REFERENCE["experts"](x, logits, gate_up, down, **attrs)
    packed = native.Packed(gate_up), native.Packed(down)
    together = NATIVE["experts"](x, logits, *packed, **attrs)
    compare(wanted, together)
    for rows in (1, 2, 7, 13, 190, 299):
        assert torch.equal(NATIVE["experts"](x[:rows], logits[:rows], *packed, **attrs), together[:rows])


@needs_native
@pytest.mark.parametrize("tanh", [False, True])
def test_native_gelu_is_exact_in_both_tails(tanh: bool) -> None:
    x = torch.linspace(-9, 9, 4001).view(1, -1)
    wide = x.double()
    inner = 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    wanted = wide * (inner.sigmoid() if tanh else torch.special.erfc(-wide / 2**0.5) / 2)
    difference = (NATIVE["gelu"](x, tanh=tanh) - wanted).abs()
    # In the far tail, the exponent is rounded: to an accuracy relative to its own size.
    assert (difference <= 1e-6 * wanted.abs() * (wide.square() / 4).clamp(min=1) + 1e-37).all()


def _experts_program(dtype: str) -> Program:
    """A router, its experts, and a last product with the router's weight: what a mixture of experts has."""
    types = {"router": (6, 8), "gate_up": (6, 32, 8), "down": (6, 8, 16)}

    def value(name: str, *shape: int | str) -> Value:
        return Value(name, TensorType(dtype, shape))

    return Program(
        dims={"num_tokens": 64},
        inputs={"x": TensorType(dtype, ("num_tokens", 8))},
        weights={name: TensorType(dtype, shape) for name, shape in types.items()},
        caches=(),
        ops=(
            Op("linear", ("x", "router", ""), (value("logits", "num_tokens", 6),)),
            Op(
                "experts",
                ("x", "logits", "gate_up", "down"),
                (value("y", "num_tokens", 8),),
                {"top_k": 3, "normalize": False},
            ),
        ),
        outputs=("y",),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_experts_of_a_program_run_on_prepared_weights(dtype: str) -> None:
    program = _experts_program(dtype)
    program.validate()
    weights = {name: torch.randn(kind.shape).to(getattr(torch, dtype)) for name, kind in program.weights.items()}
    x = torch.randn(5, 8, dtype=getattr(torch, dtype))
    step = Step([], [], torch.zeros(0, 0), torch.zeros(0), [], [])
    wanted = Interpreter(program, weights, REFERENCE).run({"x": x}, step)
    prepared = kernels.prepare("cpu", program, {name: weight.clone() for name, weight in weights.items()})
    packed = native.available and dtype != "float16"
    assert [isinstance(weight, native.Packed) for weight in prepared.values()] == [packed] * 3
    got = Interpreter(program, prepared, kernels.implementations("cpu")).run({"x": x}, step)
    assert (got[0].float() - wanted[0].float()).norm() <= 2e-2 * wanted[0].float().norm()


@needs_native
def test_experts_weights_that_others_take_too_are_left_as_they_are() -> None:
    program = _experts_program("float32")
    program = msgspec.structs.replace(program, outputs=("y", "down"))
    weights = {name: torch.randn(kind.shape) for name, kind in program.weights.items()}
    prepared = kernels.prepare("cpu", program, weights)
    assert [name for name, weight in prepared.items() if isinstance(weight, native.Packed)] == ["router"]


@needs_native
@pytest.mark.parametrize("level", ["avx2", pytest.param("plain", marks=pytest.mark.drill)])
def test_native_operators_of_lesser_processors_agree_too(level: str) -> None:
    """The level is chosen once in a process: it has its own, without pytest and what that brings along."""
    program = "import test_ops\nfor op in test_ops.NATIVE:\n    test_ops.agrees('native', op, 30)\n    print(op)"
    environment = {**os.environ, "ENGINEHOUSE_CPU": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.split() == list(NATIVE), run.stderr[-3000:]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here: torch's operators are used")
def test_the_native_operators_are_there_where_there_is_a_compiler() -> None:
    assert native.available
    chosen = kernels.implementations("cpu")
    for op in ("linear", "attention", "rope", "silu_mul", "layer_norm", "head_rms_norm", "gelu", "gelu_mul", "experts"):
        assert chosen[op] is not REFERENCE[op]


def test_without_the_native_operators_torch_serves() -> None:
    program = (
        "from executor_svc.kernels import implementations, native\n"
        "print(native.available, implementations('cpu')['attention'])"
    )
    environment = {**os.environ, "ENGINEHOUSE_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("False <function attention at "), run.stderr


WORDS = (
    {
        4: Words(torch.zeros(3, 16, dtype=torch.uint8), torch.ones(3, 1), group_size=32),
        8: Words(torch.zeros(3, 32, dtype=torch.int8), torch.ones(3)),
    }
    if native.available
    else {}
)


def bad_experts(top_k: int = 2, **changed: Any) -> None:
    given = {"x": torch.ones(2, 32), "logits": torch.ones(2, 4), "gate_up": None, "down": None} | changed
    if given["gate_up"] is None:
        given["gate_up"] = native.Packed(torch.ones(4, 16, 32))
    if given["down"] is None:
        given["down"] = native.Packed(torch.ones(4, 32, 8))
    NATIVE["experts"](*given.values(), top_k=top_k, normalize=False)


def bad_attention(alibi: Tensor) -> None:
    caches = [torch.zeros(1, BLOCK_SIZE, 1, 8)], [torch.zeros(1, BLOCK_SIZE, 1, 8)]
    step = Step([1], [1], torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0]), *caches)
    q, k = torch.ones(1, 16), torch.ones(1, 8)
    NATIVE["attention"](q, k, k, alibi, step=step, cache=0, head_dim=8, scale=1.0, window=0)


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
        lambda packed: NATIVE["rms_norm"](torch.ones(2, 8, 0), torch.ones(8), eps=1e-6),
        lambda packed: NATIVE["layer_norm"](torch.ones(2, 8), torch.ones(8), torch.ones(4), eps=1e-6),
        lambda packed: NATIVE["layer_norm"](torch.ones(2, 8), torch.ones(4), eps=1e-6),
        lambda packed: NATIVE["add_layer_norm"](torch.ones(2, 8), torch.ones(2, 4), torch.ones(8), eps=1e-6),
        lambda packed: NATIVE["head_rms_norm"](torch.ones(2, 8), torch.ones(3), eps=1e-6),
        lambda packed: NATIVE["head_rms_norm"](torch.ones(2, 8), torch.ones(0), eps=1e-6),
        lambda packed: NATIVE["head_rms_norm"](torch.ones(2, 8), torch.ones(16), eps=1e-6),
        lambda packed: NATIVE["gelu"](torch.ones(8), tanh=True),
        lambda packed: NATIVE["gelu_mul"](torch.ones(2, 7), tanh=False),
        lambda packed: NATIVE["silu_mul"](torch.ones(2, 7)),
        lambda packed: NATIVE["linear_int4"](torch.ones(2, 32), WORDS[8], None, group_size=32),
        lambda packed: NATIVE["linear_int4"](torch.ones(2, 24), WORDS[4], None, group_size=32),
        lambda packed: NATIVE["linear_int4"](torch.ones(2, 32), WORDS[4], None, None, torch.ones(2), group_size=32),
        lambda packed: NATIVE["linear_int8"](torch.ones(32), WORDS[8], None),
        lambda packed: NATIVE["linear_int8"](torch.ones(2, 32), WORDS[4], None),
        lambda packed: bad_experts(x=torch.ones(2, 16)),
        lambda packed: bad_experts(x=torch.ones(2, 32, dtype=torch.float16)),
        lambda packed: bad_experts(logits=torch.ones(2, 5)),
        lambda packed: bad_experts(logits=torch.ones(1, 4)),
        lambda packed: bad_experts(top_k=5),
        lambda packed: bad_experts(top_k=0),
        lambda packed: bad_experts(down=native.Packed(torch.ones(4, 32, 9))),
        lambda packed: bad_experts(down=native.Packed(torch.ones(3, 32, 8))),
        lambda packed: bad_experts(down=native.Packed(torch.ones(4, 32, 8, dtype=torch.bfloat16))),
        lambda packed: bad_experts(down=torch.ones(4, 32, 8)),
        lambda packed: bad_experts(gate_up=packed),
        lambda packed: bad_attention(torch.ones(3)),
        lambda packed: bad_attention(torch.ones(1)),
        lambda packed: bad_attention(torch.ones(2, dtype=torch.bfloat16)),
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
        assert keywords - {"step", "group"} == set(operator.attrs)
        assert ("step" in keywords, "group" in keywords) == (operator.uses_step, operator.uses_group)


PACKED_CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "linear_int4": ({"group_size": 32}, (5, 80)),  # the last group is short
    "linear_int8": ({}, (5, 33)),
    # Blocks at the ends are short, and there are more rows than are expanded at once.
    "linear_fp8": ({"block_rows": 128, "block_columns": 48}, (1300, 80)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", PACKED_CASES)
def test_packed_products_by_their_formulas_in_float64(op: str, dtype: torch.dtype) -> None:
    """The reference, the CPU's product over packed words, and the linear over a matrix that it makes at load of what has none."""
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
    if native.available and op != "linear_fp8":  # it stays, and is multiplied with where its words lie
        assert kernels.unpack("cpu", program, held) == (program, held)
        prepared = kernels.prepare("cpu", program, {name: tensor.clone() for name, tensor in held.items()})
        step = Step([], [], torch.zeros(0, 0), torch.zeros(0), [], [])
        (found,) = Interpreter(program, prepared, kernels.implementations("cpu")).run({"x": x}, step)
        assert isinstance(prepared["weight"], Words)
        close = x.double() @ exact.T + bias.double()
        assert (found.double() - close).norm() <= (1e-6 if dtype is torch.float32 else 2.5e-3) * close.norm()
    plain, dense = expand(program, held, set())
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


def test_norm_references_by_torch_in_float64() -> None:
    x, residual, weight, bias = torch.randn(5, 24) + 2, torch.randn(5, 24), torch.randn(24), torch.randn(24)
    wanted = torch.nn.functional.layer_norm(x.double(), [24], weight.double(), bias.double(), 1e-5)
    assert torch.allclose(REFERENCE["layer_norm"](x, weight, bias, eps=1e-5).double(), wanted, atol=1e-5)
    normed, total = REFERENCE["add_layer_norm"](x, residual, weight, eps=1e-5)
    wanted = torch.nn.functional.layer_norm((x + residual).double(), [24], weight.double(), None, 1e-5)
    assert torch.equal(total, x + residual) and torch.allclose(normed.double(), wanted, atol=1e-5)
    heads, weights = x.double().view(5, 3, 8), weight.double().view(3, 8)
    wanted = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[0]
    assert torch.allclose(REFERENCE["head_rms_norm"](x, weight[:8], eps=1e-5).double(), wanted.view(5, 24), atol=1e-5)
    wanted = torch.nn.functional.layer_norm(heads, [8], None, None, 1e-5) * weights
    got = REFERENCE["head_layer_norm"](x, weight.view(3, 8), eps=1e-5)
    assert torch.allclose(got.double(), wanted.view(5, 24), atol=1e-5)


def test_a_norm_in_bfloat16_keeps_a_float32_weights_precision() -> None:
    x, weight = torch.randn(4, 32, dtype=torch.bfloat16), 1 + torch.randn(32) / 1000
    wide = x.double()
    wanted = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).to(torch.bfloat16)
    for op in [REFERENCE, *([NATIVE] if NATIVE else [])]:
        assert (
            op["rms_norm"](x, weight, eps=1e-6) == wanted
        ).float().mean() > 0.98  # but for sums that fall between two


def test_activation_references_by_their_formulas_in_float64() -> None:
    x, gate = torch.linspace(-4, 4, 24).view(3, 8), torch.randn(3, 1)
    wide = x.double()
    exact = wide * (1 + torch.erf(wide / 2**0.5)) / 2
    by_tanh = wide / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    for tanh, wanted in ((False, exact), (True, by_tanh)):
        assert torch.allclose(REFERENCE["gelu"](x, tanh=tanh).double(), wanted, atol=1e-6)
        got = REFERENCE["gelu_mul"](torch.cat((x, x + 1), -1), tanh=tanh)
        assert torch.allclose(got.double(), wanted * (wide + 1), atol=1e-5)
    wanted = wide / (1 + torch.exp(-gate.double()))
    assert torch.allclose(REFERENCE["sigmoid_mul"](x, gate).double(), wanted, atol=1e-6)
    assert torch.allclose(REFERENCE["soft_cap"](x, cap=2.5).double(), 2.5 * torch.tanh(wide / 2.5), atol=1e-6)
    assert torch.equal(REFERENCE["add"](x, x), 2 * x) and torch.equal(REFERENCE["scale"](x, factor=0.5), x / 2)
    half = x.to(torch.bfloat16)
    assert torch.equal(REFERENCE["scale"](half, factor=0.1), half * torch.tensor(0.1, dtype=torch.bfloat16))


@pytest.mark.parametrize("normalize", [False, True])
def test_experts_reference_by_a_dense_loop_in_float64(normalize: bool) -> None:
    tokens, count, top_k, hidden, inner = 9, 6, 3, 16, 12
    x, logits = torch.randn(tokens, hidden), torch.randn(tokens, count)
    gate_up, down = torch.randn(count, 2 * inner, hidden), torch.randn(count, hidden, inner)
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        shares = [float(share) for share in torch.exp(logits[token].double())]
        chosen = sorted(range(count), key=lambda expert: -shares[expert])[:top_k]
        whole = sum(shares[expert] for expert in (chosen if normalize else range(count)))
        for expert in chosen:
            both = gate_up[expert].double() @ x[token].double()
            gate, up = both[:inner], both[inner:]
            made = down[expert].double() @ (gate / (1 + torch.exp(-gate)) * up)
            wanted[token] += shares[expert] / whole * made
    got = REFERENCE["experts"](x, logits, gate_up, down, top_k=top_k, normalize=normalize)
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["reference", "native"])
def test_alibi_and_soft_cap_by_hand(kind: str) -> None:
    """Two heads of one key head, three positions; the last query's weights from its scores."""
    if kind == "native" and not NATIVE:
        pytest.skip("compiled without a C compiler")
    caches = [torch.zeros(1, BLOCK_SIZE, 1, 1)], [torch.zeros(1, BLOCK_SIZE, 1, 1)]
    step = Step([3], [3], torch.zeros(1, 1, dtype=torch.int32), torch.arange(3), *caches)
    q, k, v = torch.ones(3, 2), torch.tensor([[1.0], [-2.0], [3.0]]), torch.tensor([[1.0], [10.0], [100.0]])
    operator = {"reference": attention, "native": NATIVE.get("attention")}[kind]
    slopes, capped = [0.5, 0.25], 2 * torch.tanh(k.flatten().double() / 2)
    out = operator(q, k, v, torch.tensor(slopes), step=step, cache=0, head_dim=1, scale=1.0, window=0, soft_cap=2.0)
    for head, slope in enumerate(slopes):
        weights = (capped + slope * torch.tensor([-2.0, -1.0, 0.0])).softmax(-1)
        assert float(out[2, head]) == pytest.approx(float(weights @ v.flatten().double()), rel=1e-5)


def test_rope_tables_by_length_are_tables_of_other_frequencies() -> None:
    positions, lengths = torch.tensor([0, 7, 90], dtype=torch.int32), torch.tensor([64, 65, 100], dtype=torch.int32)
    short, long = torch.tensor([1.0, 0.1]), torch.tensor([0.5, 0.02])
    table, attrs = REFERENCE["rope_table"], {"original": 64, "scale": 1.2}
    got = REFERENCE["long_rope_table"](positions, lengths, short, long, **attrs)
    for at, frequencies in enumerate((short, long, long)):
        for have, want in zip(got, table(positions[at : at + 1], frequencies, scale=1.2), strict=True):
            assert torch.allclose(have[at], want[0], atol=1e-6)
    got = REFERENCE["dynamic_rope_table"](positions, lengths, rotary_dim=8, theta=1000.0, factor=2.0, original=64)
    for at, length in enumerate(lengths.tolist()):
        base = 1000.0 * (2.0 * max(length, 64) / 64 - 1) ** (8 / 6)
        frequencies = torch.tensor([base ** (-pair / 4) for pair in range(4)])
        for have, want in zip(got, table(positions[at : at + 1], frequencies, scale=1.0), strict=True):
            assert torch.allclose(have[at], want[0], atol=1e-5)
