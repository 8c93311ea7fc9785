"""FP8 as an engine has it: what the references mean, and what builds make of checkpoints that quantize activations and caches."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from quantized_writers import floats, save_quantized
from test_ops import attend
from test_quantized import compressed, no_head
from torch import Tensor

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from builder_svc.weights import write_weights
from engine import blobs
from engine.directory import DirectoryStore
from engine.errors import InvalidArgument
from engine.fingerprint import Node
from engine.manifest import Manifest
from engine.ops import REFERENCE, Step, to_fp8
from engine.program import Op, Program, TensorType, Value
from enginehouse.model_shape import of_program
from executor_svc import kernels
from executor_svc.core import Sampling, Sequence
from executor_svc.interpreter import Interpreter
from tests.conftest import save_checkpoint
from tests.running import Engine, load_into_main_memory, make_engine

NUMBERS = [0.0, 2**-9, 0.001, 1.0, 1.0625, 1.1875, 17.0, 440.0, 448.0, 1e6]
NEAREST = [0.0, 2**-9, 2**-9, 1.0, 1.0, 1.25, 16.0, 448.0, 448.0, 448.0]
"""Ties go to the even one, and what is too large to the largest."""


def test_numbers_are_rounded_to_the_nearest_and_never_beyond_the_largest() -> None:
    found = to_fp8(torch.tensor(NUMBERS + [-number for number in NUMBERS]) * 2, 2.0).float()
    assert found.tolist() == [*NEAREST, *(-number for number in NEAREST)]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_quantized_activations_by_its_formula_in_float64(static: bool, dtype: torch.dtype) -> None:
    """By the interpreter, and on the CPU, which leaves the operator as it is."""
    torch.manual_seed(0)
    x, bias = torch.randn(5, 80, dtype=dtype) * torch.tensor([1, 30, 0, 1e-3, 1])[:, None], torch.randn(33, dtype=dtype)
    x = x.to(dtype)
    held = {"weight": (torch.randn(33, 80) * 50).to(torch.float8_e4m3fn), "scales": torch.rand(33, 1), "bias": bias}
    scale = x.double().abs().amax(1, keepdim=True) / 448
    if static:  # which cuts off the second row
        held["input_scale"], scale = torch.tensor([0.01]), torch.full((5, 1), 0.01).double()
    kept = torch.where(scale > 0, (x.double() / scale).clamp(-448, 448), 0).float().to(torch.float8_e4m3fn).double()
    wanted = (kept * scale) @ (held["weight"].double() * held["scales"].double()).T + bias.double()

    def kind(tensor: Tensor, *shape: int | str) -> TensorType:
        return TensorType(str(tensor.dtype).removeprefix("torch."), shape or tuple(tensor.shape))  # type: ignore[arg-type]

    attrs: dict[str, Any] = {"block_rows": 1, "block_columns": 80} | ({} if static else {"per_token": True})
    op = Op("linear_fp8", ("x", *held), (Value("y", kind(x, "t", 33)),), attrs)
    types = {name: kind(tensor) for name, tensor in held.items()}
    program = Program({"t": 9}, {"x": kind(x, "t", 80)}, types, (), (op,), ("y",), opset_version=3)
    program.validate()
    counted = program.parameters()
    assert counted["weight"] == 33 * 80 and counted["scales"] == counted.get("input_scale", 0) == 0
    with pytest.raises(InvalidArgument, match="used as in operator set 3, the program says 2"):
        msgspec.structs.replace(program, opset_version=2).validate()
    unpacked, weights = kernels.unpack("cpu", program, held)
    assert unpacked == program
    step = Step([], [], torch.empty(0), torch.empty(0), [], [])
    (found,) = Interpreter(unpacked, weights, kernels.implementations("cpu")).run({"x": x}, step)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4 if dtype is torch.float32 else 1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["reference", "cpu"])
def test_a_cache_of_8_bits_is_one_of_rounded_keys_and_values(kind: str) -> None:
    torch.manual_seed(0)
    table = torch.tensor([[1, 2]], dtype=torch.int32)
    caches = [torch.zeros(3, 16, 2, 8, dtype=torch.float8_e4m3fn) for _ in range(2)]
    spans = [range(18), range(18, 21)]
    steps = [
        Step([len(part)], [part[-1] + 1], table, torch.tensor([16 + at for at in part]), *([cache] for cache in caches))
        for part in spans
    ]
    q, k, v = (torch.randn(21, heads * 8) * size for heads, size in ((4, 1), (2, 8), (2, 200)))
    attrs = {"cache": 0, "head_dim": 8, "scale": 0.1, "window": 0}
    function = REFERENCE["attention"] if kind == "reference" else kernels.implementations("cpu")["attention"]
    found = attend(function, [q, k, v], {**attrs, "k_scale": 0.05, "v_scale": 1.0}, steps)
    plain = [replace(step, k_caches=[torch.zeros(3, 16, 2, 8)], v_caches=[torch.zeros(3, 16, 2, 8)]) for step in steps]
    rounded = [to_fp8(part, scale).float() * scale for part, scale in ((k, 0.05), (v, 1.0))]
    assert rounded[1].abs().max() == 448 < v.abs().max()
    torch.testing.assert_close(found, attend(REFERENCE["attention"], [q, *rounded], attrs, plain), rtol=1e-5, atol=1e-4)


# --- builds

FLOAT = {"type": "float", "strategy": "channel"}


def activations(**fields: Any) -> dict[str, Any]:
    """compressed-tensors' config with such input_activations."""
    config = compressed(FLOAT, "float-quantized")
    config["config_groups"]["group_0"]["input_activations"] = {"type": "float", "num_bits": 8, **fields}
    return config


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "weights alone": (compressed(FLOAT, "float-quantized"), "channel", ""),
    "by token": (activations(strategy="token", dynamic=True), "channel", "token"),
    "by tensor, as they come": (activations(strategy="tensor", dynamic=True), "channel", "token"),
    "by tensor": (activations(strategy="tensor", dynamic=False), "channel", "tensor"),
    "by group": (activations(strategy="group", group_size=128, dynamic=True), "channel", ""),
    "fp8": ({"quant_method": "fp8"}, "tensor", "token"),
    "fp8 dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "tensor", "token"),
    "fp8 static": ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", "tensor"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "channel", "token"),
    "modelopt": (MODELOPT, "tensor", "tensor"),
    "modelopt by token": ({**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "column", "token"),
}
GPU = Node("cuda", {"torch": torch.__version__})
QKV = [f"model/layers/0/self_attn/{part}_proj" for part in "qkv"]
SCALES = {
    f"{module}/input_scale": torch.tensor(scale)
    for module, scale in [
        *zip(QKV, (0.5, 0.75, 0.25), strict=True),
        ("model/layers/0/self_attn/o_proj", 0.1),
        *((f"model/layers/0/mlp/{part}_proj", 0.2) for part in ("gate", "up", "down")),
    ]
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", **size)


def make(checkpoint: Path, store: Path, **options: Any) -> tuple[Manifest, Program]:
    """Built for a GPU, if nothing else is said."""
    directory = DirectoryStore(store)
    manifest = build(checkpoint, BuildConfig(**{"device": "cuda", **options}), store=directory).manifest
    return manifest, Program.from_json(blobs.read(directory, manifest.ranks[0].program))


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_as_the_checkpoint_says_on_a_gpu(name: str, plain: Path, tmp_path: Path) -> None:
    config, shape, wanted = CONFIGS[name]
    save_quantized(plain, tmp_path / "checkpoint", config, no_head(floats(None, shape)), **SCALES)
    manifest, program = make(tmp_path / "checkpoint", tmp_path / "store")
    products = [op for op in program.ops if op.op == "linear_fp8"]
    assert len(products) == 4
    for op in products:
        scaled = [*op.inputs, ""][4] == op.inputs[1].replace("weight", "input_scale")
        assert (op.attrs.get("per_token", False), scaled) == (wanted == "token", wanted == "tensor")
    assert program.opset_version == (3 if wanted else 2)
    assert manifest.quantization is not None
    said = "float8_e4m3fn, a scale a row" + (f", activations by {wanted}" if wanted else "")
    assert set(manifest.quantization["packed"].values()) == {said}
    if wanted == "tensor":  # of parts that are one product, the largest
        weights = load_into_main_memory(DirectoryStore(tmp_path / "store"), manifest.engine_id, GPU).weights
        assert weights["layers.0.attention.qkv.input_scale"].tolist() == [0.75]
    on_cpu, plainly = make(tmp_path / "checkpoint", tmp_path / "store", device="cpu")
    assert on_cpu.engine_id != manifest.engine_id and plainly.opset_version == 2
    assert on_cpu.quantization is not None
    assert set(on_cpu.quantization["packed"].values()) == {"float8_e4m3fn, a scale a row"}


def test_a_static_scale_that_is_not_there_is_named(plain: Path, tmp_path: Path) -> None:
    save_quantized(plain, tmp_path / "checkpoint", MODELOPT, no_head(floats(None, "tensor")))
    with pytest.raises(
        InvalidArgument, match=r"no tensor 'model.layers.0.self_attn.q_proj.input_scale' of shape \[1\]"
    ):
        make(tmp_path / "checkpoint", tmp_path / "store")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ((), (1.0, 1.0)),
        (("self_attn/k_scale", "self_attn/v_scale"), (0.5, 0.25)),
        (("self_attn/k_proj/k_scale", "self_attn/v_proj/v_scale"), (0.5, 0.25)),
        (("self_attn/kv_scale",), (0.5, 0.5)),
    ],
)
def test_a_cache_of_8_bits_takes_the_checkpoints_scales(
    names: tuple[str, ...], wanted: tuple[float, float], plain: Path, tmp_path: Path
) -> None:
    kept = {f"model/layers/0/{name}": torch.tensor(scale) for name, scale in zip(names, (0.5, 0.25), strict=False)}
    save_quantized(
        plain, tmp_path / "checkpoint", {"quant_method": "fbgemm_fp8"}, no_head(floats(None, "channel")), **kept
    )
    half, program = make(tmp_path / "checkpoint", tmp_path / "store", dtype="bfloat16", kv_cache_dtype="fp8")
    whole, before = make(tmp_path / "checkpoint", tmp_path / "store", dtype="bfloat16")
    (op,) = (op for op in program.ops if op.op == "attention")
    assert (op.attrs["k_scale"], op.attrs["v_scale"]) == wanted
    assert [cache.dtype for cache in (*program.caches, *before.caches)] == ["float8_e4m3fn", "bfloat16"]
    assert half.model.kv_bytes_per_token * 2 == whole.model.kv_bytes_per_token and half.engine_id != whole.engine_id
    shape = of_program(program, half.limits, name="half")
    assert shape.kv_bytes(1) == half.model.kv_bytes_per_token


def test_a_scale_of_a_cache_that_is_none_is_named(plain: Path, tmp_path: Path) -> None:
    wrong = {"model/layers/0/self_attn/k_scale": torch.tensor(-1.0)}
    save_quantized(
        plain, tmp_path / "checkpoint", {"quant_method": "fbgemm_fp8"}, no_head(floats(None, "channel")), **wrong
    )
    with pytest.raises(InvalidArgument, match=r"self_attn.k_scale' holds -1.0, which is no scale"):
        make(tmp_path / "checkpoint", tmp_path / "store", kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("dtype", "attrs"),
    [
        ("float8_e4m3fn", {}),
        ("float8_e4m3fn", {"k_scale": 1.0, "v_scale": -1.0}),
        ("float32", {"k_scale": 1.0, "v_scale": 1.0}),
    ],
)
def test_a_program_whose_scales_do_not_fit_its_cache(
    dtype: Any, attrs: dict[str, float], plain: Path, tmp_path: Path
) -> None:
    _, program = make(plain, tmp_path / "store")
    caches = tuple(msgspec.structs.replace(cache, dtype=dtype) for cache in program.caches)
    ops = tuple(
        msgspec.structs.replace(op, attrs=op.attrs | attrs) if op.op == "attention" else op for op in program.ops
    )
    changed = msgspec.structs.replace(program, caches=caches, ops=ops, opset_version=3)
    with pytest.raises(InvalidArgument, match=rf"k_scale and v_scale are \[.*\] for a cache of {dtype}"):
        changed.validate()


def test_tokens_come_of_a_cache_of_8_bits_on_the_cpu(plain: Path, tmp_path: Path) -> None:
    loaded = make_engine(plain, tmp_path / "store", kv_cache_dtype="fp8")
    sequence = Sequence(0, 0, [3, 4, 5], 3, 4, Sampling(0.0))
    Engine(loaded).run([sequence])
    assert len(sequence.token_ids) == 7


def test_the_8b_that_benchmarks_take(tmp_path: Path) -> None:
    """All its layers' products are of 8 bits by token, the head is as it was; half of the KV cache."""
    large = Path(__file__).parents[2] / "bench" / "models" / "llama-3.1-8b-fp8"
    manifest, program = make(large, tmp_path, dummy_weights=True, max_seq_len=8192, kv_cache_dtype="fp8")
    products = [op for op in program.ops if op.op.startswith("linear")]
    assert [op.attrs.get("per_token", False) for op in products] == [True] * 128 + [False]
    assert program.weights["lm_head.weight"].dtype == "bfloat16"
    assert manifest.model.num_parameters == 8_030_261_312
    assert manifest.model.kv_bytes_per_token == 2 * 8 * 128 * 32


def test_matrices_lie_where_gpus_read_them_at_once(tmp_path: Path) -> None:
    """At multiples of 16 bytes, however many scales of 4 there are."""
    values = {f"scale{number}": torch.ones(1) for number in range(3)}
    values |= {"narrow": torch.ones(3, dtype=torch.bfloat16), "matrix": torch.ones(4, 16).to(torch.float8_e4m3fn)}
    values["wide"] = torch.ones(8, 8, dtype=torch.bfloat16)
    kinds = {
        name: TensorType(str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in values.items()
    }
    program = SimpleNamespace(ops=[SimpleNamespace(inputs=list(values))], weights=kinds)
    ((_, path),) = write_weights(program, lambda name: [values[name]], values, tmp_path, lambda *_: None)
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    found = {
        name: size + at["data_offsets"][0] for name, at in json.loads(data[8:size]).items() if name != "__metadata__"
    }
    assert found.keys() == values.keys() and all(found[name] % 16 == 0 for name in ("matrix", "wide"))
    assert all(found[name] % kinds[name].nbytes == 0 for name in ("scale0", "scale1", "scale2"))
