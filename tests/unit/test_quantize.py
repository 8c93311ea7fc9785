"""Quantizing: what is computed, what is lost, what is refused, and that what is saved builds the engine that was meant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families_harness import watch
from torch import Tensor

from builder_svc.auto import open_model
from builder_svc.causal_lm import CausalLM
from builder_svc.models.packed import Fp8, Int4, Int8
from builder_svc.pipeline import build, build_identity, read_model
from builder_svc.quantize import awq, gptq, smoothquant
from builder_svc.quantize.forward import Stream, compute_device
from builder_svc.quantize.inputs import ROWS, Inputs
from builder_svc.quantize.measure import perplexity
from builder_svc.quantize.rounding import int4_rounded, int4_scales, pack, unpacked
from builder_svc.quantize.sites import Rows, layer_sites
from builder_svc.quantize.text import CALIBRATION, HELD_OUT, Tokens, read_text
from engine.directory import DirectoryStore
from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from engine.manifest import engine_id
from enginehouse import AutoModelForCausalLM, BuildConfig, CalibConfig, QuantAlgo, QuantConfig
from enginehouse.model_shape import of_engine
from executor_svc.core import Sampling, Sequence
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from tests.conftest import VOCAB_SIZE, save_checkpoint
from tests.running import Engine, make_engine

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo-model"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "olmo2": {},
    "phi": {},
    "stablelm": {"use_parallel_residual": True},
    "gpt_neox": {},
    "bloom-like falcon": {
        "alibi": True,
        "new_decoder_architecture": False,
        "parallel_attn": False,
        "multi_query": False,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}
CALIB = CalibConfig(calib_batches=6, calib_max_seq_length=64)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture(params=FAMILIES)
def family_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "family", request.param.split()[-1], **{**SIZES, **FAMILIES[request.param]})


def quantized(model_dir: Path, output: Path, calib: CalibConfig = CALIB, **asked: Any) -> CausalLM:
    model = open_model(model_dir)
    model.write_quantized(model.plan(QuantConfig(**{"group_size": 32, **asked}), calib), output)
    return open_model(output)


def loss_in_engine(model: Path, store: Path, ids: list[int], **options: Any) -> float:
    """-log p of each token but the first, as an executor computes it."""
    engine = Engine(make_engine(model, store, **options))
    rows = watch(engine)
    engine.run([Sequence(0, 0, list(ids), len(ids), 1, Sampling(0.0))])
    logits = torch.stack([rows[0, position] for position in range(len(ids) - 1)]).float()
    return float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


# The decoder, layer by layer


def test_layer_by_layer_gives_what_the_executor_gives(family_dir: Path, tmp_path: Path) -> None:
    ids = torch.randint(2, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(1))
    model = open_model(family_dir)
    stream = Stream(model.config.decoder, model.weights().__getitem__, ids, compute_device("cpu"))
    for number in range(len(model.config.decoder.layers)):
        stream.pass_layer(number, stream.layer_tensors(number))
    total, tokens = stream.loss(stream.head_tensors(), 1)
    wanted = sum(loss_in_engine(family_dir, tmp_path / "store", row) for row in ids.tolist())
    assert tokens == 3 * 39 and total == pytest.approx(wanted, rel=1e-5)


def test_scales_change_nothing_where_they_are_folded(family_dir: Path) -> None:
    """Whatever stands before a linear takes the scale of its input: layers compute the same, and all sites that can have one."""
    model = open_model(family_dir)
    config, weights = model.config.decoder, model.weights()
    ids = torch.randint(2, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(1))
    before, after = (Stream(config, weights.__getitem__, ids, compute_device("cpu")) for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    folded = 0
    for number, layer in enumerate(config.layers):
        tensors = before.layer_tensors(number)
        before.pass_layer(number, tensors)
        scaled = dict(tensors)
        for site in layer_sites(layer):
            if site.taker is not None:
                scale = torch.rand(tensors[f"{site.linears[0]}.weight"].shape[1], generator=generator) + 0.5
                if isinstance(site.taker, Rows):
                    scale = site.taker.spread(site.taker.gathered(scale)[0])
                site.fold(scaled, scale, torch.float32)
                folded += 1
        after.pass_layer(number, scaled)
    assert folded >= 2
    torch.testing.assert_close(after.hidden, before.hidden, rtol=1e-4, atol=1e-4)


# Rounding


@pytest.mark.parametrize(
    "form", [Int4(32, False, "float16"), Int4(64, True, "float16"), Int4(0, False, "float32"), Int8("float32"), Fp8()]
)
def test_a_packed_matrix_is_the_nearest_of_its_form(form: Any) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    weight[3], weight[5, :32] = 0, 1e-9
    tensors = pack(weight, form)
    assert {name: (str(made.dtype)[6:], tuple(made.shape)) for name, made in tensors.items()} == form.tensors(24, 128)
    made = unpacked(tensors, form, 128)
    if isinstance(form, Int4):
        scales, zeros = int4_scales(weight, form)
        torch.testing.assert_close(made, int4_rounded(weight, form, scales, zeros))
        step = tensors["scales"].float().abs().repeat_interleave(form.group_size or 128, 1)
    elif isinstance(form, Int8):
        step = tensors["scales"][:, None]
    else:
        step = weight.abs().clamp(min=tensors["scales"].max() * 2**-6) / 8  # three bits behind the first
    assert ((made - weight).abs() <= step * (0.51 if not getattr(form, "zeros", False) else 1.01)).all()


def outliers(rows: int = 512) -> Tensor:
    """Inputs of which a few channels are far larger than the others."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40]] *= 30
    return x


def seen(x: Tensor) -> Inputs:
    inputs = Inputs(len(x), with_products=True)
    for start in range(0, len(x), 100):
        inputs.add(x[start : start + 100])
    return inputs


def test_the_tokens_that_are_kept_stand_anywhere_in_their_sequences() -> None:
    """First ones have activations like no others: with a stride they would be a quarter of 512 tokens of 128 x 512."""
    length, count = 512, 128
    inputs, places = Inputs(length * count), torch.arange(length, dtype=torch.float32)[:, None]
    for _ in range(count // 8):
        inputs.add(places.repeat(8, 1))
    kept = inputs.rows[:, 0].long()
    assert len(kept) == ROWS and (kept == 0).sum() < 8
    assert kept.bincount(minlength=length).max() < 8 and len(kept.unique()) > ROWS / 2
    again = Inputs(length * count)
    again.add(places.repeat(count, 1))
    assert torch.equal(again.rows, inputs.rows)  # however many come at a time


@pytest.mark.parametrize("zeros", [False, True])
def test_awq_loses_less_than_rounding_to_nearest(zeros: bool) -> None:
    x, form = outliers(), Int4(32, zeros, "float16")
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    inputs, none = seen(x), torch.ones(64)
    torch.testing.assert_close(inputs.rows, x)

    def lost(tensors: dict[str, Tensor], scale: Tensor) -> float:
        return float((x / scale @ unpacked(tensors, form, 64).T - x @ weight.T).square().sum())

    nearest = lost(pack(weight, form), none)
    clipped = lost(awq.pack_clipped(weight, form, inputs, none), none)
    scale = awq.input_scale([(weight, form)], inputs, None)
    scaled = lost(pack(weight * scale, form), scale)
    both = lost(awq.pack_clipped(weight * scale, form, inputs, scale), scale)
    assert clipped < 0.95 * nearest and scaled < 0.6 * nearest and both < scaled
    assert scale[3] > 2 * scale.median() < scale[40]
    kept = awq.pack_clipped(weight, form, inputs, none, kept=48)  # fitted, but no range is shrunk
    assert clipped < lost(kept, none) < nearest


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("columns", [64, 320])
def test_columns_make_up_for_each_other(columns: int, zeros: bool) -> None:
    """Of inputs that go together: 320 are more than are rounded at a time. Codes stay those of the scales that were chosen."""
    made = torch.Generator().manual_seed(2)
    common = torch.randn(columns // 4, columns, generator=made)
    x = torch.randn(600, len(common), generator=made) @ common + 0.1 * torch.randn(600, columns, generator=made)
    weight, form = torch.randn(40, columns, generator=made), Int4(32, zeros, "float16")
    lost = [
        float((x @ (unpacked(tensors, form, columns) - weight).T).square().sum())
        for tensors in (pack(weight, form), gptq.pack(weight, form, seen(x)))
    ]
    assert lost[1] < 0.4 * lost[0]
    scales, middles = int4_scales(weight, form)
    rounded = gptq.Feedback(seen(x).products).rounded(weight, form, scales, middles)
    torch.testing.assert_close(unpacked(gptq.pack(weight, form, seen(x)), form, columns), rounded)
    alone = gptq.Feedback(torch.eye(columns)).rounded(weight, form, scales, middles)
    torch.testing.assert_close(alone, unpacked(pack(weight, form), form, columns))  # nothing goes together


@pytest.mark.parametrize("zeros", [False, True])
def test_outputs_of_awq_keep_their_size_and_inputs_have_scales_where_these_help(zeros: bool) -> None:
    """Of inputs that go together: feedback makes up for more if they are as they are, whatever rounding to nearest likes."""
    made = torch.Generator().manual_seed(2)
    common = torch.randn(16, 64, generator=made)
    x = torch.randn(600, 16, generator=made) @ common + 0.1 * torch.randn(600, 64, generator=made)
    weight, form, inputs = torch.randn(40, 64, generator=made), Int4(32, zeros, "float16"), seen(x)
    scale = awq.input_scale([(weight, form)], inputs, None)
    assert (scale == 1).all()
    right = x @ weight.T
    for kept in (0, 40):
        found = x @ unpacked(awq.pack_clipped(weight, form, inputs, scale, kept), form, 64).T
        size = (found * right).sum(0) / right.square().sum(0)
        assert (
            (size - 1).abs().max() < 1e-3 < (found - right).norm() / right.norm()
        )  # but for float16's rounding of scales


def test_awq_loses_less_in_every_layer_on_text_that_it_has_not_seen(tmp_path: Path) -> None:
    """Of a trained model, whole layers: scales are folded, heads share their values, and what was fitted holds elsewhere."""
    made, calib = {}, CalibConfig(calib_batches=16, calib_max_seq_length=256)
    for algo in ("W4A16", "W4A16_GPTQ", "W4A16_AWQ"):
        made[algo] = quantized(DEMO_MODEL, tmp_path / algo, calib, quant_algo=algo, group_size=64)
    dense = open_model(DEMO_MODEL)
    ids = Tokens(read_text(HELD_OUT), dense.tokenizer().files()).sequences(256, 12)
    models = {"dense": dense, **made}
    streams = {
        name: Stream(model.config.decoder, model.weights().__getitem__, ids, compute_device("cpu"), model.config.packed)
        for name, model in models.items()
    }
    for number in range(len(dense.config.decoder.layers)):
        before = streams["dense"].hidden.clone()
        for stream in streams.values():
            stream.hidden.copy_(before)
            stream.pass_layer(number, stream.layer_tensors(number))
        right = streams["dense"].hidden
        nearest, fed_back, both = (float((streams[name].hidden - right).square().sum()) for name in made)
        assert fed_back < nearest and both < 0.85 * nearest, (number, fed_back / nearest, both / nearest)


def test_smoothquant_moves_outliers_into_the_weights() -> None:
    x, weight = outliers(), torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    scale = smoothquant.input_scale([weight], seen(x), 0.5, None)
    reach = (x / scale).abs().amax(0)
    torch.testing.assert_close(reach, (weight * scale).abs().amax(0))  # halfway, both reach equally far
    rows = Rows("attention.qkv", 0, 32, shared=2, head_dim=16)
    shared = smoothquant.input_scale([weight], seen(x), 0.5, rows).view(2, 2, 16)
    assert (shared[:, 0] == shared[:, 1]).all() and rows.gathered(x.abs().amax(0)).shape == (2, 32)


# A model, to its engine


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"quant_algo": "W8A16"}, Int8("float32")),
        ({"quant_algo": "W4A16", "has_zero_point": True}, Int4(32, True, "float16")),
        ({"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "FP8"}, Int4(32, False, "float16")),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL", "kv_cache_quant_algo": "INT8"}, Int8("float32", "token")),
    ],
)
def test_a_quantized_model_is_saved_read_and_run(
    model_dir: Path, tmp_path: Path, asked: dict[str, Any], form: Any
) -> None:
    read = quantized(model_dir, tmp_path / "saved", **asked)
    assert read.config.quantized is not None and set(read.config.quantized.packed.values()) == {form}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == asked["quant_algo"]
    assert config["quantization"]["kv_cache_quant_algo"] == asked.get("kv_cache_quant_algo")
    store = DirectoryStore(tmp_path / "store")
    engine = build(read, BuildConfig(device="cpu"), store=store)
    loaded = load_engine(store, engine.engine_id, this_node("cpu"))
    packed = [op for op in loaded.program.ops if op.op == form.operator]
    assert len(packed) == 8 and all(
        op.attrs.items() >= {k: v for k, v in form.attrs(64).items() if v and k != "group_size"}.items()
        for op in packed
    )
    for name, weight in read.weights().items():
        assert torch.equal(loaded.weights[name].view(torch.uint8), weight.view(torch.uint8)), name
    caches = {"FP8": "float8_e4m3fn", "INT8": "int8", None: "float32"}
    cache = asked.get("kv_cache_quant_algo")
    assert (
        loaded.program.caches[0].dtype == caches[cache] and engine.manifest.identity["kv_cache_dtype"] == caches[cache]
    )
    assert engine.manifest.model.kv_bytes_per_token == sum(one.bytes_per_token for one in loaded.program.caches)
    told = of_engine(store, engine.engine_id).whole
    assert told.kv_bytes(1) == engine.manifest.model.kv_bytes_per_token
    if cache:  # said once more, it is the same engine
        said = build(read, BuildConfig(device="cpu", kv_cache_dtype=cache.lower()), store=store)
        assert said.engine_id == engine.engine_id
    # the build's own option makes the same weights, under an id of its own, and finds them again
    direct = build(
        model_dir,
        BuildConfig(device="cpu", quant_config=QuantConfig(group_size=32, **asked), calib_config=CALIB),
        store=store,
    )
    assert direct.engine_id != engine.engine_id
    assert direct.manifest.ranks[0] == engine.manifest.ranks[0]
    assert direct.manifest.quantization == engine.manifest.quantization
    # and an executor computes what the measure of perplexity says
    ids = Tokens(read_text(HELD_OUT), read.tokenizer().files()).sequences(60, 1)
    measured = perplexity(read, ids, 1, "cpu")
    found = loss_in_engine(tmp_path / "saved", tmp_path / "store", ids[0].tolist())
    assert found / measured.tokens == pytest.approx(torch.tensor(measured.value).log().item(), rel=2e-3)


def test_static_scales_of_activations_are_calibrated_and_left_out_on_the_cpu(model_dir: Path, tmp_path: Path) -> None:
    read = quantized(model_dir, tmp_path / "saved", quant_algo="FP8", exclude_modules=["layers.1.mlp", "*.o_proj"])
    assert read.config.quantized is not None
    assert set(read.config.quantized.packed) == {
        "layers.0.attention.qkv",
        "layers.1.attention.qkv",
        "layers.0.mlp.gate_up",
        "layers.0.mlp.down",
    }
    model = open_model(model_dir)
    stream = Stream(
        model.config.decoder,
        model.weights().__getitem__,
        model.plan(QuantConfig("FP8"), CALIB).sequences,
        compute_device("cpu"),
    )
    inputs = stream.pass_layer(0, stream.layer_tensors(0), ["mlp.down"])["mlp.down"]
    assert float(read.weights()["layers.0.mlp.down.input_scale"]) == pytest.approx(float(inputs.largest.max()) / 448)
    cuda = read_model(read, BuildConfig(device="cuda"))
    assert cuda.weights.packed["layers.0.mlp.down"] == Fp8(activations="tensor")
    engine = build(read, BuildConfig(device="cpu"), store=DirectoryStore(tmp_path / "store"))
    assert not any(
        op.attrs.get("per_token") or len(op.inputs) > 4
        for op in load_engine(DirectoryStore(tmp_path / "store"), engine.engine_id, this_node("cpu")).program.ops
        if op.op == "linear_fp8"
    )


def test_the_same_seed_gives_the_same_weights_and_what_decides_them_decides_the_id(
    model_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 100)
    others = {
        "seed": CalibConfig(calib_batches=6, calib_max_seq_length=64, random_seed=7),
        "text": CalibConfig(calib_batches=6, calib_max_seq_length=64, calib_dataset=str(text)),
        "samples": CalibConfig(calib_batches=5, calib_max_seq_length=64),
    }
    made = {}
    for name, calib in {"one": CALIB, "again": CALIB, **others}.items():
        quantized(model_dir, tmp_path / name, calib, quant_algo="W4A16_AWQ")
        made[name] = (tmp_path / name / "rank0.safetensors").read_bytes()
    assert made["one"] == made["again"] and len(set(made.values())) == 4
    ids = {
        read_model(model_dir, BuildConfig(quant_config=QuantConfig("W4A16_AWQ", group_size=32), calib_config=calib))
        .plan.facts["calibration"]
        .__repr__()
        for calib in (CALIB, *others.values())
    }
    assert len(ids) == 4


def test_the_dtype_in_which_weights_are_read_decides_the_id(model_dir: Path) -> None:
    """A float32 checkpoint that is rounded to bfloat16 before it is quantized gives other codes than one that is not."""
    quant, options = QuantConfig("W8A16"), BuildConfig(device="cpu", dtype="bfloat16")
    ids, weights = set(), []
    for dtype in ("auto", "bfloat16"):
        model = AutoModelForCausalLM.from_hugging_face(model_dir, dtype, quant_config=quant)
        resolved = read_model(model, options)
        assert resolved.dtype == "bfloat16"
        ids.add(engine_id(build_identity(resolved, options)))
        weights.append(pack(model.weights()["layers.0.mlp.down.weight"].float(), Int8("float32"))["weight"])
    assert len(ids) == 2 and not torch.equal(*weights)


def test_dummy_weights_have_the_form_that_is_asked_for(model_dir: Path, tmp_path: Path) -> None:
    options = BuildConfig(
        device="cpu", dummy_weights=True, quant_config=QuantConfig("W4A16_AWQ", "INT8", group_size=32)
    )
    engine = build(model_dir, options, store=DirectoryStore(tmp_path))
    program = load_engine(DirectoryStore(tmp_path), engine.engine_id, this_node("cpu")).program
    assert sum(op.op == "linear_int4" for op in program.ops) == 8 and program.caches[0].dtype == "int8"
    options = BuildConfig(device="cpu", dummy_weights=True, kv_cache_dtype="int8")
    plain = build(model_dir, options, store=DirectoryStore(tmp_path)).manifest
    assert plain.model.kv_bytes_per_token == engine.manifest.model.kv_bytes_per_token
    assert load_engine(DirectoryStore(tmp_path), plain.engine_id, this_node("cpu")).program.caches[0].dtype == "int8"


def test_a_head_of_its_own_is_quantized_if_asked_for(model_dir: Path, tmp_path: Path) -> None:
    read = quantized(model_dir, tmp_path / "saved", quant_algo="W4A16_AWQ", quantize_lm_head=True)
    assert read.config.quantized is not None and "lm_head" in read.config.quantized.packed
    plain = open_model(model_dir)
    ids = Tokens(read_text(HELD_OUT), read.tokenizer().files()).sequences(60, 4)
    assert perplexity(read, ids, 1, "cpu").value == pytest.approx(perplexity(plain, ids, 1, "cpu").value, rel=0.2)


# What is refused, before work starts


@pytest.mark.parametrize(
    ("asked", "calib", "options", "error", "message"),
    [
        (
            {"quant_algo": "W4A16"},
            {},
            {},
            InvalidArgument,
            "group_size 128 does not divide the 64 inputs of layers.0.attention.qkv.*32 or 64",
        ),
        (
            {"quant_algo": "W4A16", "group_size": 48},
            {},
            {},
            InvalidArgument,
            "group_size is 48: choose one of 32, 64, 128",
        ),
        (
            {"quant_algo": "W8A16", "exclude_modules": ["mlp.dwon"]},
            {},
            {},
            InvalidArgument,
            "'mlp.dwon' matches no linear.*v_proj",
        ),
        ({"quant_algo": "W8A16", "exclude_modules": ["layers"]}, {}, {}, InvalidArgument, "leaves nothing to quantize"),
        ({"quant_algo": "W4A8_AWQ"}, {}, {}, Unimplemented, "W4A8_AWQ: it is not made here, choose one of W8A16"),
        ({"quant_algo": "INT8"}, {}, {}, Unimplemented, "INT8: it is not made here"),
        (
            {"kv_cache_quant_algo": "W8A16"},
            {},
            {},
            InvalidArgument,
            "kv_cache_quant_algo is W8A16: choose one of INT8, FP8",
        ),
        ({"quant_algo": "W8A16", "has_zero_point": True}, {}, {}, InvalidArgument, "has_zero_point is for int4"),
        ({"quant_algo": "W8A16", "clamp_val": [1.0]}, {}, {}, Unimplemented, "clamp_val"),
        (
            {"quant_algo": "W8A8_SQ_PER_CHANNEL", "smoothquant_val": 1.5},
            {},
            {},
            InvalidArgument,
            "smoothquant_val is 1.5",
        ),
        (
            {"quant_algo": "FP8"},
            {"calib_dataset": "{tmp}/short.txt"},
            {},
            InvalidArgument,
            "short.txt has 60 tokens, fewer than the 2048",
        ),
        ({"quant_algo": "FP8"}, {"calib_dataset": "{tmp}/empty.txt"}, {}, InvalidArgument, "empty.txt is empty"),
        (
            {"quant_algo": "FP8"},
            {"calib_dataset": "{tmp}/wrong.jsonl"},
            {},
            InvalidArgument,
            "wrong.jsonl, line 2: .*'text'",
        ),
        ({"quant_algo": "FP8"}, {"calib_dataset": "{tmp}/binary.txt"}, {}, InvalidArgument, "binary.txt is no UTF-8"),
        ({"quant_algo": "FP8"}, {"calib_dataset": "cnn_dailymail"}, {}, NotFound, "'cnn_dailymail': no such file"),
        ({"quant_algo": "FP8"}, {"calib_dataset": "{tmp}/folder"}, {}, NotFound, "holds no .txt"),
        (
            {"quant_algo": "FP8"},
            {},
            {"device": "cuda", "compute_capability": "8.0"},
            InvalidArgument,
            "8.9 or more, not 8.0",
        ),
        ({"kv_cache_quant_algo": "INT8"}, {}, {"kv_cache_dtype": "fp8"}, InvalidArgument, "choose one of both"),
        ({"kv_cache_quant_algo": "FP8"}, {}, {"kv_cache_dtype": "int8"}, InvalidArgument, "as FP8: choose one of both"),
        ({"quant_algo": "W8A16"}, {}, {"kv_cache_dtype": "int8"}, InvalidArgument, "'int8' takes scales .* INT8"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(
    model_dir: Path,
    tmp_path: Path,
    asked: dict[str, Any],
    calib: dict[str, Any],
    options: dict[str, Any],
    error: type[EnginehouseError],
    message: str,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "short.txt").write_text("a few words. " * 5)
    (tmp_path / "empty.txt").write_text(" \n\f\n")
    (tmp_path / "wrong.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    given = {name: value.replace("{tmp}", str(tmp_path)) for name, value in calib.items()}
    with pytest.raises(error, match=message):
        read_model(
            model_dir, BuildConfig(**options, quant_config=QuantConfig(**asked), calib_config=CalibConfig(**given))
        )


def test_what_is_quantized_already_is_not_quantized_again(model_dir: Path, tmp_path: Path) -> None:
    read = quantized(model_dir, tmp_path / "saved", quant_algo=QuantAlgo.W8A16)
    with pytest.raises(FailedPrecondition, match="is quantized already"):
        read.plan(QuantConfig("W4A16"))
    asked = AutoModelForCausalLM.from_hugging_face(model_dir, quant_config=QuantConfig("W8A16"))
    with pytest.raises(InvalidArgument, match="the model's is .*W8A16.*, the options say .*FP8"):
        read_model(asked, BuildConfig(quant_config=QuantConfig("FP8")))
    asked.save_checkpoint(tmp_path / "again")  # quantized, as it was asked for
    assert (tmp_path / "again" / "rank0.safetensors").read_bytes() == (
        tmp_path / "saved" / "rank0.safetensors"
    ).read_bytes()
    tied = save_checkpoint(tmp_path / "tied", **SIZES, tie_word_embeddings=True)
    with pytest.raises(Unimplemented, match="is its embedding"):
        open_model(tied).plan(QuantConfig("W8A16", quantize_lm_head=True))


@pytest.mark.parametrize(
    "change",
    [
        {"packed": {"layers.0.attention.qkv": {"operator": "linear_int2"}}},
        {"packed": {"layers.9.attention.qkv": {"operator": "linear_int8", "scales": "float32"}}},
        {"kv_scales": [[1.0, 1.0]]},
        {"kv_scales": [[1.0, 0.0], [1.0, 1.0]]},
    ],
)
def test_a_saved_config_that_does_not_fit_is_refused(model_dir: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    quantized(model_dir, tmp_path / "saved", quant_algo="W8A16")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["enginehouse"]["quantized"] |= change
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match="quantize the model again"):
        open_model(tmp_path / "saved")


def test_texts_are_read_in_all_their_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\f\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "id": 3}\n\n{"text": "four"}\n')
    found = read_text(tmp_path)
    assert [document.strip() for document in found.documents] == ["one", "two", "three", "four"]
    assert read_text(tmp_path / "b.jsonl").digest != found.digest == read_text(tmp_path).digest
    bundled, held = read_text(""), read_text(HELD_OUT)
    assert read_text(CALIBRATION) == bundled and not set(bundled.documents) & set(held.documents)
