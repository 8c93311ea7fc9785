"""Forms of weights as TensorRT networks: what they compute, and which targets refuse which, before anything is built."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_writers import awq, floats, gptq, packed_ints, save_quantized
from torch import Tensor

from builder_svc.build_config import BuildConfig
from builder_svc.lower.tensorrt.attention import Padded
from builder_svc.lower.tensorrt.build import build as build_plan
from builder_svc.lower.tensorrt.lower import HANDLERS, lower
from builder_svc.lower.tensorrt.targets import ABSENT, LEAST, Target, check
from builder_svc.pipeline import build
from engine import tensorrt
from engine.errors import InvalidArgument, Unimplemented
from engine.manifest import Limits
from engine.ops import REFERENCE
from engine.opset import OPERATORS
from engine.program import KVCache, Op, Program, TensorType, Value
from tests.conftest import save_checkpoint
from tests.running import make_engine, reference_logits
from tests.trt_engine import PADDED, evaluated
from tests.trt_evaluator import Evaluator

IN, OUT, TOKENS = 256, 48, 12
LIMITS = Limits(4, 64, 64)
SM80, SM75 = Target("tensorrt_rtx", "8.0"), Target("tensorrt_rtx", "7.5")


def one(op: str, dtype: str, inputs: Sequence[str], attrs: dict[str, Any], weights: dict[str, Tensor]) -> Program:
    """Embeds tokens and applies one operator to them."""
    given = {"token_ids": ("num_tokens",), "positions": ("num_tokens",), "logit_indices": ("num_logits",)}
    return Program(
        {"num_tokens": 64, "num_logits": 64},
        {name: TensorType("int32", dims) for name, dims in given.items()},
        {
            name: TensorType(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))  # type: ignore[arg-type]
            for name, tensor in weights.items()
        },
        (),
        (
            Op("embedding", ("token_ids", "embedding"), (_value("x", dtype, "num_tokens", IN),)),
            Op(op, ("x", *inputs), (_value("y", dtype, "num_tokens", OUT),), attrs),
            Op("gather", ("y", "logit_indices"), (_value("z", dtype, "num_logits", OUT),)),
        ),
        ("z",),
    )


def _value(name: str, dtype: Any, rows: str, columns: int) -> Value:
    return Value(name, TensorType(dtype, (rows, columns)))


def computed(op: str, dtype: str, inputs: Sequence[str], attrs: dict[str, Any], weights: dict[str, Tensor]) -> Tensor:
    """What the network of one operator makes of the first rows of the embedding, float32."""
    trt = tensorrt.load("tensorrt_rtx")
    lowered = lower(one(op, dtype, inputs, attrs, weights), weights, trt, PADDED, LIMITS)
    ids, none = torch.arange(TOKENS).int(), torch.zeros(1).int()
    row = ids[None]
    given = {"token_ids": row, "positions": row, "logit_indices": ids, "write_index": none, "kv_lengths": none}
    return Evaluator(lowered, trt, wide=torch.float64).run(given)["logits"]


def tensors(dtype: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "embedding": torch.randn(64, IN).to(getattr(torch, dtype)),
        "bias": torch.randn(OUT).to(getattr(torch, dtype)),
    }


def int4(group: int, *, zeros: bool) -> dict[str, Tensor]:
    groups = (OUT, IN // group)
    found = {"w": torch.randint(0, 256, (OUT, IN // 2)).to(torch.uint8), "s": (torch.rand(groups) * 0.02).half()}
    return found | ({"z": torch.randint(0, 16, groups).to(torch.uint8)} if zeros else {})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("group", "zeros"), [(16, False), (32, True), (128, True), (256, False)])
def test_int4_groups_are_what_the_operator_says(group: int, zeros: bool, dtype: str) -> None:
    """A group of 256 becomes two of 128."""
    weights = tensors(dtype) | int4(group, zeros=zeros)
    inputs = ("w", "s", "z" if zeros else "", "bias")
    found = computed("linear_int4", dtype, inputs, {"group_size": group}, weights)
    given = [weights[name].float() if name in ("s", "bias") else weights.get(name) for name in inputs]
    wanted = REFERENCE["linear_int4"](weights["embedding"][:TOKENS].float(), *given, group_size=group)
    bound = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def fp8(rows: int, columns: int) -> dict[str, Tensor]:
    scales = torch.rand(-(-OUT // rows), -(-IN // columns)) * 0.01
    return {"w": torch.randn(OUT, IN).to(torch.float8_e4m3fn), "s": scales, "i": torch.tensor([0.01])}


@pytest.mark.parametrize("rows", [1, 16, OUT])
@pytest.mark.parametrize("activations", ["", "tensor", "token"])
def test_fp8_is_what_the_operator_says(rows: int, activations: str) -> None:
    """In float32, where nothing else is rounded: codes of a near tie may differ by one."""
    weights = tensors("float32") | fp8(rows, IN)
    inputs = ["w", "s", "bias", *(["i"] if activations == "tensor" else [])]
    attrs = {"block_rows": rows, "block_columns": IN, "per_token": activations == "token"}
    found = computed("linear_fp8", "float32", inputs, attrs, weights)
    wanted = REFERENCE["linear_fp8"](weights["embedding"][:TOKENS], *(weights[name] for name in inputs), **attrs)
    assert (found - wanted).abs().max() <= (3e-3 if activations else 1e-5) * wanted.abs().max()
    assert (found - wanted).abs().mean() <= 3e-4 * wanted.abs().max()


@pytest.mark.parametrize("activations", ["", "tensor", "token"])
def test_int8_is_what_the_operator_says(activations: str) -> None:
    """SmoothQuant's products: codes times codes, then both scales."""
    weights = tensors("float32")
    weights |= {"w": torch.randint(-127, 128, (OUT, IN)).to(torch.int8), "s": torch.rand(OUT) * 0.001}
    weights |= {"i": torch.tensor([3.5 / 127])}
    inputs = ["w", "s", "bias", *(["i"] if activations == "tensor" else [])]
    attrs = {"per_token": True} if activations == "token" else {}
    found = computed("linear_int8", "float32", inputs, attrs, weights)
    wanted = REFERENCE["linear_int8"](weights["embedding"][:TOKENS], *(weights[name] for name in inputs), **attrs)
    assert (found - wanted).abs().max() <= (3e-3 if activations else 1e-5) * wanted.abs().max()


ROW: dict[str, Any] = {"block_rows": 1, "block_columns": IN}
INT8 = {"w": torch.ones(OUT, IN, dtype=torch.int8), "s": torch.ones(OUT), "i": torch.ones(1)}
BUILT: dict[str, tuple[str, Sequence[str], dict[str, Any], dict[str, Tensor]]] = {
    "int4": ("linear_int4", ("w", "s"), {"group_size": 128}, int4(128, zeros=False)),
    "int4 zero points": ("linear_int4", ("w", "s", "z"), {"group_size": 32}, int4(32, zeros=True)),
    "int8 weights": ("linear_int8", ("w", "s"), {}, INT8),
    "int8 by tensor": ("linear_int8", ("w", "s", "", "i"), {}, INT8),
    "int8 by token": ("linear_int8", ("w", "s"), {"per_token": True}, INT8),
    "fp8 weights": ("linear_fp8", ("w", "s"), ROW, fp8(1, IN)),
    "fp8 by tensor": ("linear_fp8", ("w", "s", "", "i"), ROW, fp8(1, IN)),
    "fp8 by token": ("linear_fp8", ("w", "s"), {**ROW, "per_token": True}, fp8(1, IN)),
}


@pytest.mark.parametrize("form", BUILT)
def test_each_form_builds_in_16_bits(form: str, tmp_path: Path) -> None:
    """For the newest target, and the oldest that takes it, as the table says."""
    op, inputs, attrs, weights = BUILT[form]
    weights = tensors("float16") | weights
    trt, program = tensorrt.load("tensorrt_rtx"), one(op, "float16", inputs, attrs, weights)
    for capability in ("12.0", LEAST[form.split()[0]]):
        target = Target("tensorrt_rtx", capability)
        plan = build_plan(lower(program, weights, trt, target, LIMITS), trt, target, tmp_path / "plan")
        assert plan.ref.size > OUT * IN // 2


WRITERS: dict[str, tuple[dict[str, Any], Any]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq(32)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}, gptq(4, 32)),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, floats(None, "tensor")),
    "int8": (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {
                "all": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
            },
            "ignore": ["lm_head"],
        },
        packed_ints(8, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", WRITERS)
def test_quantized_checkpoints_give_the_logits_of_the_references(form: str, tmp_path: Path) -> None:
    """Through the pipeline's own programs; float32, so that only the order of sums differs."""
    plain = save_checkpoint(tmp_path / "plain", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    quantization, writer = copy.deepcopy(WRITERS[form])
    save_quantized(plain, tmp_path / "checkpoint", quantization, lambda name: None if name == "lm_head" else writer)
    loaded = make_engine(tmp_path / "checkpoint", tmp_path / "store", prepared=False, max_num_tokens=64)
    assert any(op.op.startswith("linear_") for op in loaded.program.ops)
    tokens, engine = list(range(2, 42)), evaluated(loaded, PADDED)
    spec = engine.lowered.io_spec
    at = torch.arange(len(tokens)).int()
    given = {"token_ids": torch.tensor([tokens]).int(), "positions": at[None], "logit_indices": at}
    given |= {"write_index": torch.zeros(1).int(), "kv_lengths": torch.tensor([len(tokens)]).int()}
    for port in spec.inputs:
        if port.name not in given:
            given[port.name] = torch.full([1 if isinstance(dim, str) else dim for dim in port.shape], 0.0)
    found = Evaluator(engine.lowered, engine.trt).run(given)["logits"]
    wanted = reference_logits(loaded, tokens)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def attending(dtype: Any, head_dim: int, kept: Any = None) -> Program:
    """One attention of one head, and nothing else."""
    sizes = TensorType(dtype, ("num_tokens", head_dim))
    scales = {"k_scale": 1.0, "v_scale": 1.0} if kept else {}
    return Program(
        {"num_tokens": 64, "num_logits": 64},
        {"q": sizes},
        {},
        (KVCache(1, head_dim, kept or dtype),),
        (
            Op(
                "attention", ("q", "q", "q"), (Value("y", sizes),),
                {"cache": 0, "head_dim": head_dim, "scale": 1.0, "window": 0, **scales},
            ),
        ),
        ("y",),
    )  # fmt: skip


def linear(op: str, dtype: str, weights: dict[str, Tensor], **attrs: Any) -> Program:
    return one(op, dtype, [name for name in ("w", "s") if name in weights], attrs, tensors(dtype) | weights)


REFUSED: dict[str, tuple[Program, Target, str, str]] = {
    "bfloat16": (linear("linear", "bfloat16", {"w": torch.zeros(OUT, IN)}), SM75, "linear w", "sm80, sm86, sm89, sm120"),
    "float32": (linear("linear", "float32", {"w": torch.zeros(OUT, IN)}), SM75, "takes no float32", "float16, int8"),
    "int4": (linear("linear_int4", "float16", int4(32, zeros=False), group_size=32), SM75, "takes no int4", "sm80"),
    "int4 groups": (
        linear("linear_int4", "float16", int4(8, zeros=False), group_size=8), SM80, "groups of 8", "groups of 16, 32, 64, 128",
    ),
    "int4 short group": (
        linear("linear_int4", "float16", int4(48, zeros=False), group_size=48), SM80, "256 inputs in groups of 48", "of 16, 32",
    ),
    "fp8": (linear("linear_fp8", "float16", fp8(1, IN), block_rows=1, block_columns=IN), SM80, "takes no fp8", "sm89, sm120"),
    "fp8 blocks": (
        linear("linear_fp8", "float16", fp8(16, 128), block_rows=16, block_columns=128), PADDED, "16 x 128 blocks", "by channel",
    ),
    "heads": (attending("float16", 20), PADDED, "heads of a multiple of 8", "float32"),
    "cache": (attending("bfloat16", 32, "float8_e4m3fn"), PADDED, "layer 0: tensorrt_rtx for SM120", "kv_cache_dtype 'auto'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_does_not_take_is_refused_with_layer_target_and_alternatives(case: str) -> None:
    program, target, problem, alternative = REFUSED[case]
    with pytest.raises(Unimplemented) as caught:
        check(program, target)
    message = caught.value.message
    assert problem in message and alternative in message and str(target) in message
    assert caught.value.reason == "TARGET_UNSUPPORTED"


def test_pipelines_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildConfig(backend="tensorrt_rtx", compute_capability="12.0", dtype="float32", pp_size=2)
    with pytest.raises(Unimplemented, match="SM120 has no layer for ranks of a pipeline; build with pp_size 1"):
        build(checkpoint, options, store=str(tmp_path / "store"))


def test_every_operator_has_a_handler_or_is_refused() -> None:
    """With all its inputs and attributes, but for those of caches of 8 bits."""
    assert HANDLERS.keys() | ABSENT.keys() | {"attention"} == OPERATORS.keys()
    for name, handler in (HANDLERS | {"attention": Padded.attend}).items():
        taken = list(inspect.signature(handler).parameters.values())
        positional = [each for each in taken if each.kind is each.POSITIONAL_OR_KEYWORD]
        assert len(positional) - (2 if name == "attention" else 1) >= len(OPERATORS[name].inputs), name
        assert set(OPERATORS[name].attrs) - {each.name for each in taken} <= {"k_scale", "v_scale", "kv_int8"}, name


@pytest.mark.parametrize(
    ("text", "capability"), [("sm120", "12.0"), ("SM89", "8.9"), ("sm_75", "7.5"), ("12.1", "12.1")]
)
def test_targets_are_written_in_several_ways(text: str, capability: str) -> None:
    assert tensorrt.capability_of(text) == capability


@pytest.mark.parametrize("text", ["", "rtx5090", "120", "sm1", "12", "sm1200"])
def test_what_is_no_target_is_said_to_be_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="write it like sm120"):
        tensorrt.capability_of(text)
