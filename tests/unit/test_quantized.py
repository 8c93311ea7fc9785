"""Pre-quantized checkpoints: engines against the same weights dequantized by each format's formula, and what is refused."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families_harness import watch
from quantized_writers import Writer, awq, floats, gptq, packed_ints, plain_ints, save_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor

from builder_svc.build_config import BuildConfig
from builder_svc.models.families import llama
from builder_svc.pipeline import build, read_model
from engine.directory import DirectoryStore
from engine.errors import InvalidArgument, Unimplemented
from engine.ops import REFERENCE
from engine.opset import PACKED
from engine.program import Program
from enginehouse.cli import main
from enginehouse.model_shape import of_checkpoint, of_engine
from executor_svc.core import Sampling, Sequence
from executor_svc.interpreter import Interpreter
from executor_svc.kernels.expand import expand
from executor_svc.loader import LoadedEngine, load_engine
from executor_svc.node import this_node
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine

HEADER = 8192  # bytes of a safetensors header at most
PARTS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **changes}


def compressed(weights: dict[str, Any], stored: str, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, **weights}}
    config = {"config_groups": {"group_0": group}, "format": stored, "ignore": ["lm_head"], **changes}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", **config}


@dataclass(frozen=True)
class Case:
    """A checkpoint; `form` is how the engine has the layers, `size` a matrix's bytes in it."""

    config: dict[str, Any]
    writer: Writer
    form: str
    size: Callable[[int, int], float] = lambda rows, columns: 4 * rows * columns


def int4(group: int, zeros: int = 0) -> Callable[[int, int], float]:
    """Bytes with 2 of a scale and `zeros` of a zero point."""
    return lambda rows, columns: rows * columns / 2 + rows * -(-columns // (group or columns)) * (2 + zeros)


INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
ROWS8 = (lambda rows, columns: rows * columns + 2 * rows, lambda rows, columns: rows * columns + 4 * rows)
CASES = {
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq(32), "int4, groups of 32, zero points", int4(32, 1),
    ),
    "gptq": Case(gptq_config(), gptq(4, 32, bias=True), "int4, groups of 32, symmetric", int4(32)),
    "gptq-zeros": Case(
        gptq_config(sym=False, checkpoint_format="gptq"),
        gptq(4, 32, symmetric=False), "int4, groups of 32, zero points", int4(32, 1),
    ),
    "gptq-short-group": Case(gptq_config(group_size=48), gptq(4, 48), "int4, groups of 48, symmetric", int4(48)),
    "gptq-v2": Case(
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        gptq(4, 32, symmetric=False, offset=0), "int4, groups of 32, zero points", int4(32, 1),
    ),
    "gptq-row-in-any-order": Case(
        gptq_config(group_size=-1, desc_act=True), gptq(4, -1), "int4, a scale a row, symmetric", int4(0)
    ),
    "gptq-8-row": Case(gptq_config(bits=8, group_size=-1), gptq(8, -1), "int8, a scale a row, symmetric", ROWS8[0]),
    "gptq-8-groups": Case(gptq_config(bits=8), gptq(8, 32), "dequantized: 8 bits in groups"),
    "gptq-3": Case(
        gptq_config(bits=3, sym=False), gptq(3, 32, symmetric=False), "dequantized: 3 bits in groups with zero points"
    ),
    "gptq-act-order": Case(gptq_config(desc_act=True), gptq(4, 32, act_order=True), "dequantized: act-order"),
    "pack": Case(compressed(INT4, "pack-quantized"), packed_ints(4, 32), "int4, groups of 32, symmetric", int4(32)),
    "pack-zeros": Case(
        compressed({**INT4, "symmetric": False}, "pack-quantized"),
        packed_ints(4, 32, symmetric=False), "int4, groups of 32, zero points", int4(32, 1),
    ),
    "pack-8": Case(
        compressed({"strategy": "channel"}, "pack-quantized"), packed_ints(8, 0), "int8, a scale a row, symmetric", ROWS8[0]
    ),
    "pack-act-order": Case(
        compressed({**INT4, "actorder": "group"}, "pack-quantized"), packed_ints(4, 32, act_order=True), "dequantized: act-order"
    ),
    "int": Case(compressed({"strategy": "channel"}, "int-quantized"), plain_ints(), "int8, a scale a row, symmetric", ROWS8[0]),
    "int-zeros": Case(
        compressed({"strategy": "channel", "symmetric": False}, "int-quantized"),
        plain_ints(symmetric=False), "dequantized: 8 bits a row with zero points",
    ),
    "float": Case(
        compressed({"type": "float", "strategy": "channel"}, "float-quantized"),
        floats(None, "channel"), "float8_e4m3fn, a scale a row", ROWS8[1],
    ),
    "naive": Case(
        compressed({"type": "float", "strategy": "tensor"}, "naive-quantized"),
        floats(None, "tensor"), "float8_e4m3fn, a scale a row", ROWS8[1],
    ),
    "fp8-blocks": Case(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 24]},
        floats((32, 24), scale="weight_scale_inv"), "float8_e4m3fn, blocks of 32 x 24",
        lambda rows, columns: rows * columns + 4 * -(-rows // 32) * -(-columns // 24),
    ),
    "fp8-tensor": Case(
        {"quant_method": "fp8", "activation_scheme": "static"}, floats(None, "tensor"), "float8_e4m3fn, a scale a row", ROWS8[1]
    ),
    "fbgemm": Case({"quant_method": "fbgemm_fp8"}, floats(None, "channel"), "float8_e4m3fn, a scale a row", ROWS8[1]),
    "modelopt": Case(MODELOPT, floats(None, "tensor"), "float8_e4m3fn, a scale a row", ROWS8[1]),
    "modelopt-channel": Case(
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"]},
        floats(None, "column"), "float8_e4m3fn, a scale a row", ROWS8[1],
    ),
}  # fmt: skip
OTHERS = {
    "model/layers/0/self_attn/k_proj/k_scale": torch.ones(()),
    "model/layers/0/mlp/up_proj/input_scale": torch.ones(1),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "attention_bias": True}
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", **size)


@pytest.fixture(scope="module")
def dense(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return load(plain, tmp_path_factory.mktemp("dense"))


def load(checkpoint: Path, path: Path, **options: Any) -> LoadedEngine:
    """As it is stored, nothing unpacked."""
    store = DirectoryStore(path / "store")
    manifest = build(checkpoint, BuildConfig(max_num_tokens=64, **options), store=store).manifest
    return load_engine(store, manifest.engine_id, this_node("cpu"))


def stacked(weights: dict[str, Tensor], dense: LoadedEngine) -> dict[str, Tensor]:
    """A dense engine's weights with the linears of a checkpoint."""
    found = dict(dense.weights)
    for layer in range(2):
        for ours, theirs in PARTS.items():
            parts = [weights[f"model.layers.{layer}.{part}.weight"] for part in theirs]
            found[f"layers.{layer}.{ours}.weight"] = torch.cat(parts)
    found["lm_head.weight"] = weights["lm_head.weight"]
    return found


def logits(loaded: LoadedEngine, program: Program, weights: dict[str, Tensor]) -> Tensor:
    """Of a prompt's tokens by the references: [40, vocab_size]."""
    engine = Engine(replace(loaded, program=program, weights=weights))
    engine.runner._interpreter = Interpreter(program, weights, REFERENCE)
    rows = watch(engine)
    engine.run([Sequence(0, 0, list(range(2, 42)), 40, 1, Sampling(0.0))])
    return torch.stack([rows[0, position] for position in range(40)])


def no_head(writer: Writer) -> Callable[[str], Writer | None]:
    return lambda module: None if module == "lm_head" else writer


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dequantized_weights(
    name: str, plain: Path, dense: LoadedEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    weights = save_quantized(plain, tmp_path / "checkpoint", case.config, no_head(case.writer), **OTHERS)
    loaded = load(tmp_path / "checkpoint", tmp_path)
    wanted = logits(dense, dense.program, stacked(weights, dense))
    assert (logits(loaded, loaded.program, loaded.weights) - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    program, expanded = expand(loaded.program, loaded.weights, set())
    assert not {op.op for op in program.ops} & set(PACKED)
    for ours, tensor in stacked(weights, dense).items():
        torch.testing.assert_close(expanded[ours], tensor, rtol=1e-6, atol=0)

    facts = loaded.manifest.quantization
    assert facts is not None and facts == loaded.manifest.identity["quantization"]
    assert facts["method"] == case.config.get("quant_method", "modelopt")
    kind = "dequantized" if case.form.startswith("dequantized") else "packed"
    text = f"{case.form.removeprefix('dequantized: ')} has no packed operator" if kind == "dequantized" else case.form
    assert facts[kind] == {f"layers.0-1.{ours}": text for ours in PARTS}
    assert facts["packed"] == {} or facts["dequantized"] == {}
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (kind == "dequantized") and all(f"since {text}: layers.0-1." in line for line in warned)

    shapes = {ours: dense.program.weights[f"layers.0.{ours}.weight"].shape for ours in PARTS}
    saved = 2 * sum(4 * rows * columns - case.size(rows, columns) for rows, columns in shapes.values())
    assert loaded.manifest.weight_bytes() == pytest.approx(dense.manifest.weight_bytes() - saved, abs=HEADER)
    assert loaded.manifest.model.num_parameters == dense.manifest.model.num_parameters


# --- what differs from layer to layer


def by_name(found: dict[str, Writer | None]) -> Callable[[str], Writer | None]:
    """The writer of the first entry that ends the module's name or stands in it."""
    return lambda module: next((writer for part, writer in found.items() if part in module), None)


def check(checkpoint: Path, weights: dict[str, Tensor], dense: LoadedEngine, tmp_path: Path) -> dict[str, Any]:
    """What the engine says of its quantization, if its logits are right."""
    loaded = load(checkpoint, tmp_path)
    wanted = logits(dense, dense.program, stacked(weights, dense))
    assert (logits(loaded, loaded.program, loaded.weights) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    facts = loaded.manifest.quantization
    assert facts is not None
    return facts


def test_layers_that_are_left_out_and_a_quantized_head(plain: Path, dense: LoadedEngine, tmp_path: Path) -> None:
    config = gptq_config(
        lm_head=True, dynamic={"-:model.layers.0.mlp": {}, r"+:.*\.o_proj": {"bits": 8, "group_size": -1}}
    )
    writers = by_name({"layers.0.mlp": None, "o_proj": gptq(8, -1), "": gptq(4, 32)})
    weights = save_quantized(plain, tmp_path / "checkpoint", config, writers)
    small = "int4, groups of 32, symmetric"
    assert check(tmp_path / "checkpoint", weights, dense, tmp_path)["packed"] == {
        "lm_head": small, "layers.0-1.attention.qkv": small, "layers.0-1.attention.out": "int8, a scale a row, symmetric",
        "layers.1.mlp.gate_up": small, "layers.1.mlp.down": small,
    }  # fmt: skip


def test_parts_of_one_product_that_differ_are_dequantized(plain: Path, dense: LoadedEngine, tmp_path: Path) -> None:
    config = compressed(INT4, "pack-quantized", ignore=["re:.*up_proj", "lm_head"])
    coarse = json.loads(json.dumps(config["config_groups"]["group_0"]))
    coarse["targets"], coarse["weights"]["group_size"] = ["re:.*k_proj", "model.layers.1.mlp.down_proj"], 16
    config["config_groups"] |= {"group_1": coarse}
    writers = {"lm_head": None, "up_proj": None, "k_proj": packed_ints(4, 16), "layers.1.mlp.down": packed_ints(4, 16)}
    weights = save_quantized(plain, tmp_path / "checkpoint", config, by_name({**writers, "": packed_ints(4, 32)}))
    facts = check(tmp_path / "checkpoint", weights, dense, tmp_path)
    assert facts["packed"] == {
        "layers.0-1.attention.out": "int4, groups of 32, symmetric",
        "layers.0.mlp.down": "int4, groups of 32, symmetric", "layers.1.mlp.down": "int4, groups of 16, symmetric",
    }  # fmt: skip
    assert facts["dequantized"] == {
        "layers.0-1.attention.qkv": "its parts differ: int4, groups of 32, symmetric; int4, groups of 16, symmetric",
        "layers.0-1.mlp.gate_up": "only some of its parts are quantized",
    }


def test_blocks_that_parts_do_not_share_are_dequantized(plain: Path, dense: LoadedEngine, tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [48, 128]}
    writer = floats((48, 128), scale="weight_scale_inv")
    weights = save_quantized(plain, tmp_path / "checkpoint", config, no_head(writer))
    facts = check(tmp_path / "checkpoint", weights, dense, tmp_path)
    assert set(facts["dequantized"]) == {"layers.0-1.attention.qkv"}
    assert set(facts["packed"]) == {f"layers.0-1.{ours}" for ours in PARTS} - {"layers.0-1.attention.qkv"}


@pytest.mark.parametrize("case", ["gptq-zeros", "int", "float", "fp8-blocks"])
def test_rows_that_lie_together_by_head(
    case: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused projection whose rows are sorted, packed or not: two groups of two queries, a key and a value of 16 rows."""
    fused = Path(shutil.copytree(plain, tmp_path / "fused"))
    tensors = load_file(fused / "model.safetensors")
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"model.layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            tensors[f"model.layers.{layer}.self_attn.qkv.{kind}"] = torch.cat(parts)
    save_file(tensors, fused / "model.safetensors")
    weights = save_quantized(fused, tmp_path / "checkpoint", CASES[case].config, no_head(CASES[case].writer))
    names = replace(llama.NAMES, qkv=("self_attn.qkv",), heads_together=True)
    monkeypatch.setattr(llama, "NAMES", names)
    loaded = load(tmp_path / "checkpoint", tmp_path)
    _, expanded = expand(loaded.program, loaded.weights, set())
    queries, keys, values = (
        [*range(32), *range(64, 96)],
        [*range(32, 48), *range(96, 112)],
        [*range(48, 64), *range(112, 128)],
    )
    wanted = weights["model.layers.1.self_attn.qkv.weight"][queries + keys + values]
    torch.testing.assert_close(expanded["layers.1.attention.qkv.weight"], wanted, rtol=1e-6, atol=0)
    assert loaded.manifest.quantization is not None
    packed = "layers.0-1.attention.qkv" in loaded.manifest.quantization["packed"]
    assert packed == (case != "fp8-blocks")  # whose scales are of rows that are taken apart


def test_the_cpu_runs_it_and_the_command_line_tells_it(plain: Path, tmp_path: Path) -> None:
    """In bfloat16, too, where an expanded matrix is rounded as the operator's."""
    checkpoint = tmp_path / "checkpoint"
    save_quantized(plain, checkpoint, gptq_config(), no_head(gptq(4, 32)))
    for dtype in ("float32", "bfloat16"):
        stored, engine = (
            load(checkpoint, tmp_path, dtype=dtype),
            make_engine(checkpoint, tmp_path / "store", dtype=dtype),
        )
        wanted = logits(stored, stored.program, stored.weights)
        sequence = Sequence(0, 0, list(range(2, 42)), 40, 1, Sampling(0.0))
        Engine(engine).run([sequence])
        assert wanted[-1, sequence.token_ids[-1]] >= wanted[-1].max() - (
            0 if dtype == "float32" else 0.02 * wanted.abs().max()
        )
    engine_id = stored.manifest.engine_id
    shape = of_engine(DirectoryStore(tmp_path / "store"), engine_id).whole
    assert shape.total_bytes == pytest.approx(stored.manifest.weight_bytes(), abs=HEADER)
    assert (shape.num_parameters, shape.layer_dtype) == (stored.manifest.model.num_parameters, "bfloat16")
    change_config(checkpoint, dtype="float16")  # that of the scales, which a config alone does not tell
    assert of_checkpoint(str(checkpoint), "bfloat16").whole.weight_bytes == shape.weight_bytes
    with pytest.raises(InvalidArgument, match="is quantized as it is"):
        shape.quantized("fp8")
    told = CliRunner().invoke(main, ["engines", "inspect", engine_id[:12], "--store", str(tmp_path / "store")])
    assert "gptq; int4, groups of 32, symmetric: layers.0-1.attention.out, " in told.output, told.output


def test_auto_takes_the_dtype_that_the_config_declares(plain: Path, tmp_path: Path) -> None:
    save_quantized(plain, tmp_path / "checkpoint", {"quant_method": "fbgemm_fp8"}, no_head(floats(None, "channel")))
    change_config(tmp_path / "checkpoint", dtype="bfloat16")
    assert read_model(tmp_path / "checkpoint", BuildConfig(device="cuda")).dtype == "bfloat16"
    assert read_model(tmp_path / "checkpoint", BuildConfig()).dtype == "float32"
    change_config(tmp_path / "checkpoint", dtype=None)
    assert read_model(tmp_path / "checkpoint", BuildConfig(device="cuda")).dtype == "float32"


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


# --- what is refused

INT = {"num_bits": 8, "type": "int", "strategy": "channel"}
UNSUPPORTED = {
    "bits": (gptq_config(bits=5), "bits 5 is not supported; supported: 2, 3, 4, 8"),
    "marlin": (gptq_config(checkpoint_format="marlin"), "checkpoint_format 'marlin' .*: gptq, gptq_v2"),
    "group size": (gptq_config(group_size=0), "group_size 0 is not supported; supported: -1"),
    "gemv": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMV"}, "version 'gemv' .*: gemm"),
    "awq bits": ({"quant_method": "awq", "bits": 8, "group_size": 128}, "bits 8 is not supported; supported: 4"),
    "llm-awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "backend": "llm-awq"}, "backend 'llm-awq'"),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported; supported: e4m3"),
    "blocks": ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\] is not supported"),
    "nvfp4": (compressed(INT, "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' .*: pack-quantized, int-"),
    "sparse": (compressed(INT, "int-quantized", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity format 'sparse-24-"),
    "3 bits": (compressed({**INT4, "num_bits": 3}, "pack-quantized"), "num_bits 3 is not supported; supported: 4, 8"),
    "strategy": (compressed({**INT, "strategy": "token"}, "int-quantized"), "strategy 'token' is not supported"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not supported; supported: FP8"),
    "modelopt file": ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "hf_quant_config.json: quant_algo 'W4A16_AWQ'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "method 'bitsandbytes' .*: awq, compressed-tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_is_not_read_is_named_with_what_is(kind: str, plain: Path, tmp_path: Path) -> None:
    config, message = UNSUPPORTED[kind]
    save_quantized(plain, tmp_path / "checkpoint", config, lambda _: None)
    with pytest.raises(Unimplemented, match=message) as caught:
        read_model(tmp_path / "checkpoint", BuildConfig())
    assert caught.value.reason == "QUANTIZATION_UNSUPPORTED"


BROKEN = {
    "ignored": (compressed(INT4, "pack-quantized", ignore=["re:("]), r"'\(' is no regular expression \(missing \)"),
    "dynamic": (gptq_config(dynamic={"+:[": {}}), r"quantization_config: dynamic: '\[' is no regular expression"),
    "dynamic layer": (gptq_config(dynamic={"+:x": 5}), r"dynamic: '\+:x' is 5, expected dict"),
    "no name": (
        {"quant_method": "awq", "group_size": 32, "modules_to_not_convert": [5]},
        r"_convert' is \[5\], expected names",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_configs_that_hold_nonsense(kind: str, plain: Path, tmp_path: Path) -> None:
    config, message = BROKEN[kind]
    save_quantized(plain, tmp_path / "checkpoint", config, lambda _: None)
    with pytest.raises(InvalidArgument, match=message):
        read_model(tmp_path / "checkpoint", BuildConfig())


Q = "model.layers.0.self_attn.q_proj"
OUT = "model.layers.1.self_attn.o_proj"
DOWN = "model.layers.1.mlp.down_proj"
WORDS = torch.zeros(2, 8, dtype=torch.int32)


def cut(name: str, dim: int = 0) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1).contiguous()

    return spoil


def put(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return spoil


BAD: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "qweight": ("gptq", cut(f"{OUT}.qweight"), rf"{OUT}.qweight' has shape \[7, 64\], .* imply \[8, 64\]"),
    "qweight in a stack": ("gptq", cut(f"{Q}.qweight"), rf"{Q}.qweight' has shape \[7, 64\], .* imply \[8, 64\]"),
    "rows of a stack": ("gptq", cut(f"{Q}.qweight", 1), r"63 \+ 32 \+ 32 = 127 rows of the weight, .* 128"),
    "scales": ("gptq", cut(f"{Q}.scales"), rf"{Q}.scales' has shape \[1, 64\], .* imply \[2, 64\]"),
    "qzeros": ("awq", cut(f"{OUT}.qzeros", 1), rf"{OUT}.qzeros' has shape \[2, 7\], .* imply \[2, 8\]"),
    "no g_idx": ("gptq", put(f"{OUT}.g_idx", None), rf"no tensor '{OUT}.g_idx' of shape \[64\], .* 'gptq'"),
    "no scales": ("gptq", put(f"{OUT}.scales", None), rf"no tensor '{OUT}.scales' of shape \[2, 64\]"),
    "dtype": ("gptq", put(f"{OUT}.g_idx", torch.zeros(64)), rf"{OUT}.g_idx' is float32, its quantization implies int32 or int64"),
    "order": ("gptq", put(f"{OUT}.g_idx", torch.ones(64, dtype=torch.int32)), rf'{OUT}.g_idx\' has another .* "desc_act": false'),
    "groups": ("gptq-act-order", put(f"{OUT}.g_idx", torch.full((64,), 2)), rf"{OUT}.g_idx' names groups .* not among the 2"),
    "not symmetric": ("gptq", put(f"{OUT}.qzeros", WORDS), rf"{OUT}.qzeros' holds other zero points than 8"),
    "weight_shape": ("pack", put(f"{OUT}.weight_shape", torch.tensor([64, 60])), r"weight_shape' says \[64, 60\], but the"),
    "blocks": ("fp8-blocks", cut(f"{Q}.weight_scale_inv"), rf"{Q}.weight_scale_inv' has shape \[1, 3\], .* imply \[2, 3\]"),
    "no scale": ("fp8-blocks", put(f"{OUT}.weight_scale_inv", None), rf"_inv', but '{OUT}.weight' is stored in float8"),
    "no weight": ("fp8-blocks", put(f"{OUT}.weight", None), rf"no tensor '{OUT}.weight' to '{OUT}.weight_scale_inv'"),
    "ignored": ("pack", put("lm_head.weight_packed", WORDS), r"lm_head.weight_packed' of shape \[2, 8\], but .* not quantized"),
    "bias": ("gptq", put(f"{DOWN}.bias", torch.ones(64)), f"{DOWN}.bias', for which its config.json has no"),
    "no matrix": ("awq", put(f"{OUT}.qweight", torch.zeros(4, dtype=torch.int32)), r"qweight' has shape \[4\], expected two dim"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_weights_that_do_not_fit_the_config_are_named(kind: str, plain: Path, tmp_path: Path) -> None:
    name, spoil, message = BAD[kind]
    checkpoint, store = tmp_path / "checkpoint", DirectoryStore(tmp_path / "store")
    save_quantized(plain, checkpoint, CASES[name].config, no_head(CASES[name].writer))
    tensors = load_file(checkpoint / "model.safetensors")
    spoil(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(InvalidArgument, match=message):
        build(checkpoint, BuildConfig(max_num_tokens=64), store=store)
    assert list(store.list("")) == []


@pytest.mark.parametrize("case", ["awq", "gptq", "fp8-blocks"])
def test_dummy_weights_are_packed_as_real_ones(case: str, plain: Path, tmp_path: Path) -> None:
    """The same program and facts of the config alone; the engine runs."""
    chosen = CASES[case]
    save_quantized(plain, tmp_path / "checkpoint", chosen.config, no_head(chosen.writer))
    change_config(tmp_path / "checkpoint", dtype="float16")  # that of the scales
    real, dummy = (load(tmp_path / "checkpoint", tmp_path, dummy_weights=dummy) for dummy in (False, True))
    assert dummy.program == real.program
    assert dummy.manifest.quantization == real.manifest.quantization
    for name, weight in dummy.weights.items():
        assert not name.endswith("zeros") or weight.max() < 16
    engine = make_engine(tmp_path / "checkpoint", tmp_path / "store", max_num_tokens=64, dummy_weights=True)
    sequence = Sequence(0, 0, [3, 4, 5], 3, 4, Sampling(0.0))
    Engine(engine).run([sequence])
    assert len(sequence.token_ids) == 7


def test_a_config_that_says_quantized_beside_plain_weights(
    plain: Path, dense: LoadedEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    change_config(copy, quantization_config=CASES["awq"].config)
    loaded = load(copy, tmp_path)
    assert loaded.manifest.quantization is None and loaded.program == dense.program
    assert "its config says awq, but none of its weights is quantized" in caplog.text
