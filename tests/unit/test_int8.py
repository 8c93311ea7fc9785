"""Operator set 5: products that round their input to int8, and KV caches of int8; by their formulas, and as programs say them."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from test_ops import attend
from torch import Tensor, nn

from builder_svc.lower.program import lower
from builder_svc.models.layers import Linear
from builder_svc.models.operators import op
from builder_svc.models.packed import Int8
from engine.errors import InvalidArgument
from engine.ops import REFERENCE, Step, quantize_int8, to_int8
from engine.program import Op, Program, TensorType, Value
from executor_svc import kernels
from executor_svc.interpreter import Interpreter

NO_STEP = Step([], [], torch.empty(0), torch.empty(0), [], [])


def test_numbers_are_rounded_to_the_nearest_even_and_never_beyond_127() -> None:
    numbers = torch.tensor([0.0, 0.5, 0.6, 1.5, 2.5, 126.4, 127.6, 1e6])
    assert to_int8(torch.cat((numbers, -numbers)) * 2, 2.0).tolist() == [
        *(0, 0, 1, 2, 2, 126, 127, 127),
        *(0, 0, -1, -2, -2, -126, -127, -127),
    ]


def test_a_row_is_quantized_by_its_own_largest_number_or_by_the_one_that_is_given() -> None:
    x = torch.tensor([[1.0, -2.54, 0.3], [0.0, 0.0, 0.0]])
    q, scales = quantize_int8(x)
    assert q.tolist() == [[50, -127, 15], [0, 0, 0]] and float(scales[0]) == pytest.approx(0.02)
    q, scales = quantize_int8(x, torch.tensor([0.01]))
    assert q.tolist() == [[100, -127, 30], [0, 0, 0]] and scales.flatten().tolist() == pytest.approx([0.01, 0.01])


def program_of(x: Tensor, held: dict[str, Tensor], attrs: dict[str, Any]) -> Program:
    """One linear_int8 of x [T, in] with these weights."""

    def kind(tensor: Tensor, *shape: int | str) -> TensorType:
        return TensorType(str(tensor.dtype).removeprefix("torch."), shape or tuple(tensor.shape))  # type: ignore[arg-type]

    inputs = tuple(name if name in held else "" for name in ("weight", "scales", "bias", "input_scale"))
    product = Op("linear_int8", ("x", *inputs), (Value("y", kind(x, "t", len(held["weight"]))),), attrs)
    types = {name: kind(tensor) for name, tensor in held.items()}
    return Program({"t": 999}, {"x": kind(x, "t", x.shape[1])}, types, (), (product,), ("y",))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_quantized_activations_by_its_formula_in_integers(static: bool, dtype: torch.dtype) -> None:
    """By the interpreter, on what the CPU makes of the weights."""
    torch.manual_seed(0)
    x, bias = torch.randn(5, 81, dtype=dtype) * torch.tensor([1, 30, 0, 1e-3, 1])[:, None], torch.randn(67, dtype=dtype)
    x = x.to(dtype)
    held = {
        "weight": torch.randint(-128, 128, (67, 81), dtype=torch.int8),
        "scales": torch.rand(67).half(),
        "bias": bias,
    }
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    if static:  # which cuts off the second row
        held["input_scale"], scale = torch.tensor([0.02]), torch.full((5, 1), 0.02)
    kept = (x.float() / scale).round().clamp(-127, 127).long()
    sums = (kept[:, None, :] * held["weight"].long()).sum(-1)
    wanted = sums.double() * scale.double() * held["scales"].double() + bias.double()
    program = program_of(x, held, {} if static else {"per_token": True})
    program.validate()
    counted = program.parameters()
    assert counted["weight"] == 67 * 81 and counted["scales"] == counted.get("input_scale", 0) == 0
    with pytest.raises(InvalidArgument, match="used as in operator set 5, the program says 4"):
        msgspec.structs.replace(program, opset_version=4).validate()
    for device in ("reference", "cpu"):
        unpacked, weights = kernels.unpack(device, program, held)
        weights = kernels.prepare(device, unpacked, dict(weights))
        implementations = REFERENCE if device == "reference" else kernels.implementations("cpu")
        (found,) = Interpreter(unpacked, weights, implementations).run({"x": x}, NO_STEP)
        assert found.dtype == dtype
        close = {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(found.double(), wanted, **close)


def test_sums_of_integers_are_exact_where_float32_is_not() -> None:
    """Beyond 2^24 on the way to a small one."""
    x = torch.tensor([[127.0] * 2049 + [1.0] + [-127.0] * 2049])
    y = REFERENCE["linear_int8"](x, torch.full((1, 4099), 127, dtype=torch.int8), torch.ones(1), None, torch.ones(1))
    assert float(y) == 127.0


@pytest.mark.parametrize("kind", ["reference", "cpu"])
def test_a_cache_of_int8_is_one_of_rounded_keys_and_values(kind: str) -> None:
    torch.manual_seed(0)
    table = torch.tensor([[1, 2]], dtype=torch.int32)
    caches = [torch.zeros(3, 16, 2, 8, dtype=torch.int8) for _ in range(2)]
    spans = [range(18), range(18, 21)]
    steps = [
        Step([len(part)], [part[-1] + 1], table, torch.tensor([16 + at for at in part]), *([cache] for cache in caches))
        for part in spans
    ]
    q, k, v = (torch.randn(21, heads * 8) * size for heads, size in ((4, 1), (2, 8), (2, 60)))
    attrs = {"cache": 0, "head_dim": 8, "scale": 0.1, "window": 0}
    function = REFERENCE["attention"] if kind == "reference" else kernels.implementations("cpu")["attention"]
    found = attend(function, [q, k, v], {**attrs, "k_scale": 0.25, "v_scale": 1.0, "kv_int8": True}, steps)
    plain = [replace(step, k_caches=[torch.zeros(3, 16, 2, 8)], v_caches=[torch.zeros(3, 16, 2, 8)]) for step in steps]
    rounded = [to_int8(part, scale).float() * scale for part, scale in ((k, 0.25), (v, 1.0))]
    assert rounded[1].abs().max() == 127 < v.abs().max()
    torch.testing.assert_close(found, attend(REFERENCE["attention"], [q, *rounded], attrs, plain), rtol=1e-5, atol=1e-4)


class Attending(nn.Module):
    """A product, and attention of it; with a cache of int8 if it has scales."""

    def __init__(self, activations: str, scale: float, kv_int8: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(11, 8, device="meta"))
        self.product = Linear(8, 24, bias=False)
        self.product.pack(Int8("float32", activations))
        self.settings = (0, 8, 1.0, 0, 0.0, scale, scale, kv_int8)

    def forward(self, token_ids: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        del positions
        q, k, v = op.split(self.product(op.embedding(token_ids, self.embedding)), [8, 8, 8])
        return op.gather(op.attention(q, k, v, None, *self.settings), logit_indices)


@pytest.mark.parametrize(
    ("activations", "scale", "kv_int8", "version"),
    [("", 0.0, False, 2), ("", 0.5, False, 3), ("token", 0.5, True, 5), ("tensor", 0.0, False, 5)],
)
def test_programs_say_what_they_use_and_no_more(activations: str, scale: float, kv_int8: bool, version: int) -> None:
    """One that uses nothing of operator set 5 is, byte for byte, what it was before."""
    program = lower(Attending(activations, scale, kv_int8).to("meta"), max_num_tokens=9)
    product, attention = (
        next(made for made in program.ops if made.op == name) for name in ("linear_int8", "attention")
    )
    assert program.opset_version == version
    assert product.attrs == ({"per_token": True} if activations == "token" else {})
    assert len(product.inputs) == (5 if activations == "tensor" else 4)
    assert ("kv_int8" in attention.attrs) == kv_int8
    assert program.caches[0].dtype == ("int8" if kv_int8 else "float8_e4m3fn" if scale else "float32")
    assert Program.from_json(program.to_json()) == program
    wrong = tuple(msgspec.structs.replace(cache, dtype="int8") for cache in program.caches)
    if not kv_int8:
        with pytest.raises(InvalidArgument, match="for a cache of int8"):
            msgspec.structs.replace(program, caches=wrong, opset_version=5).validate()
