"""`enginehouse plan`: the arithmetic by hand, and the model's facts against what builds write."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_server
import pytest
from click.testing import CliRunner
from hub_server import Repository

from builder_svc.build_config import BuildConfig
from builder_svc.models.config import AttentionSpec, DecoderConfig, ExpertsSpec, LayerSpec, MlpSpec, NormSpec, RopeSpec
from builder_svc.pipeline import build
from engine import blobs, registry
from engine.backends import open_store
from engine.errors import FailedPrecondition, InvalidArgument
from engine.manifest import Manifest
from enginehouse import roofline
from enginehouse.cli import main
from enginehouse.gpus import GPUS, find_gpu
from enginehouse.home import Home
from enginehouse.model_shape import of_checkpoint, of_engine, ranks_json
from enginehouse.roofline import Attention, Device, Experts, Shape
from executor_svc.runner import BLOCK_SIZE

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
H100 = Device(80e9, 3.35e12, {"bfloat16": 989.4e12, "fp8": 1978.9e12, "float32": 67e12})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "Llama-3.1-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


@pytest.fixture(scope="module")
def shape(llama: Path) -> Shape:
    return of_checkpoint(str(llama), None).whole


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose store has the demo model in bfloat16, called demo."""
    folder = tmp_path_factory.mktemp("home")
    store = open_store(Home(folder).store)
    options = BuildConfig(dtype="bfloat16", max_batch_size=50)
    registry.set_name(store, "demo", build(DEMO, options, store=store).manifest.engine_id)
    return folder


def plan(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(main, ["plan", *map(str, arguments), "--json"])
    assert result.exit_code == status, (result.output, result.exception)
    return json.loads(result.stdout) if status == 0 else json.loads(result.stderr)["error"]


# --- the model's facts


def test_llama_8b_as_everybody_knows_it(shape: Shape) -> None:
    """8.03 billion parameters; 2 x 32 layers x 8 heads x 128 x 2 bytes of KV cache a token."""
    assert shape.num_parameters == 8_030_261_248 + 64  # and the rotary frequencies
    assert shape.weight_bytes == {"bfloat16": 2 * 8_030_261_248, "float32": 4 * 64}
    assert shape.kv_bytes(1) == 131_072
    assert shape.attention == (Attention(32, 32, 8, 128),)
    assert shape.head_parameters == 128256 * 4096
    assert shape.layer_parameters == 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)


def weights_written(manifest: Manifest, store: Any) -> int:
    """Bytes of tensors in the engine's files: all but their safetensors headers."""
    headers = 0
    for file in manifest.ranks[0].weights:
        data = store.read(f"blobs/sha256/{file.digest[:2]}/{file.digest}")
        headers += 8 + int.from_bytes(data[:8], "little")
    return manifest.weight_bytes() - headers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_says_what_a_build_writes(dtype: str, tmp_path: Path) -> None:
    """Of the checkpoint before, and of the engine after."""
    store = open_store(str(tmp_path / "store"))
    manifest = build(DEMO, BuildConfig(dtype=dtype, max_batch_size=5, max_seq_len=700), store=store).manifest
    planned = of_checkpoint(str(DEMO), dtype).whole
    assert planned.total_bytes == weights_written(manifest, store)
    assert planned.num_parameters == manifest.model.num_parameters
    assert planned.kv_bytes(1) == manifest.model.kv_bytes_per_token
    assert (planned.dtype, planned.max_batch_size) == (dtype, None)
    built = of_engine(store, manifest.engine_id[:12]).whole
    assert (built.max_seq_len, built.max_batch_size) == (700, 5)
    limits = {"name": built.name, "max_seq_len": 700, "max_batch_size": 5}
    assert built == replace(planned, **limits)


def test_layers_of_several_kinds_are_each_counted(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    rope = RopeSpec(inv_freq=(1.0, 0.1))
    norm = NormSpec("rms", 1e-5)
    full = LayerSpec(AttentionSpec(4, 2, 8, rope), MlpSpec(32), norm, norm)
    sliding = LayerSpec(AttentionSpec(4, 1, 8, rope, window=16, qkv_bias=True), MlpSpec(64), norm, norm)
    mixed = DecoderConfig("LlamaForCausalLM", 100, 32, (full, sliding, sliding, full, sliding), norm, True, 64)
    monkeypatch.setattr("builder_svc.models.families.llama.decoder_config", lambda *_: mixed)
    shape = of_checkpoint(str(llama), "float32").whole
    assert shape.attention == (Attention(2, 4, 2, 8), Attention(3, 4, 1, 8, 16))
    both = 32 * 32  # the output projection
    assert shape.layer_parameters == 2 * (32 * 64 + both + 3 * 32 * 32) + 3 * (32 * 48 + both + 3 * 32 * 64)
    assert shape.kv_bytes(1) == (2 * 2 * 2 * 8 + 3 * 2 * 1 * 8) * 4
    assert shape.replicated_bytes == 4 * (5 * 2 * 32 + 32 + 3 * 48 + 2)  # norms, the last one, biases, frequencies
    assert shape.total_bytes == 4 * (shape.layer_parameters + 100 * 32) + shape.replicated_bytes


MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def test_mixtral_as_everybody_knows_it(tmp_path: Path) -> None:
    """46.7 billion parameters, of which a token goes through 12.9."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    shape = of_checkpoint(str(tmp_path), None).whole
    assert shape.experts == (Experts(32, 8, 2, 3 * 4096 * 14336),)
    assert shape.num_parameters == 46_702_792_704 + 64  # and the rotary frequencies
    assert shape.active_parameters == shape.num_parameters - 32 * 6 * 3 * 4096 * 14336
    assert shape.active_parameters == pytest.approx(12.9e9, rel=2e-3)
    assert plan(tmp_path)["model"]["experts"] == [
        {"layers": 32, "num_experts": 8, "top_k": 2, "parameters": 176_160_768}
    ]
    printed = CliRunner().invoke(main, ["plan", str(tmp_path)]).stdout
    assert "46.70 billion parameters (12.88 billion a token), bfloat16" in printed
    assert "25.5 GB of them for one token, 93.1 GB for many, which reach all experts" in printed


def test_experts_in_some_layers_and_one_that_all_tokens_share(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    attention, norm = AttentionSpec(4, 2, 8, RopeSpec(inv_freq=(1.0, 0.1))), NormSpec("rms", 1e-5)
    dense = LayerSpec(attention, MlpSpec(32), norm, norm)
    sparse = LayerSpec(attention, ExpertsSpec(5, 2, 16, False, MlpSpec(24)), norm, norm)
    mixed = DecoderConfig("LlamaForCausalLM", 100, 32, (sparse, dense, sparse, sparse), norm, False, 64)
    monkeypatch.setattr("builder_svc.models.families.llama.decoder_config", lambda *_: mixed)
    shape = of_checkpoint(str(llama), "float32").whole
    each = 3 * 32 * 16
    assert shape.experts == (Experts(3, 5, 2, each),)
    projections = 32 * 64 + 32 * 32
    assert shape.layer_parameters == 4 * projections + 3 * 32 * 32 + 3 * (5 * each + 3 * 32 * 24 + 5 * 32 + 32)
    assert shape.total_bytes == 4 * (shape.layer_parameters + 2 * 100 * 32) + shape.replicated_bytes
    assert shape.quantized("int8").layer_read(1) == shape.layer_read(1) / 4


def test_tables_of_positions_are_read_by_rows_and_norms_of_heads_are_no_matrices(
    monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    attention, norm = AttentionSpec(4, 2, 8, None, qk_norm="heads"), NormSpec("layer", 1e-5, bias=True)
    layer = LayerSpec(attention, MlpSpec(32, activation="gelu", gated=False), norm, norm)
    learned = DecoderConfig("LlamaForCausalLM", 100, 32, (layer,), norm, False, 64, learned_positions=64)
    monkeypatch.setattr("builder_svc.models.families.llama.decoder_config", lambda *_: learned)
    shape = of_checkpoint(str(llama), "float32").whole
    assert shape.layer_parameters == 32 * 64 + 32 * 32 + 2 * 32 * 32
    assert shape.replicated_bytes == 4 * (3 * 2 * 32 + 6 * 8)
    assert shape.total_bytes == 4 * (shape.layer_parameters + 2 * 100 * 32 + 64 * 32) + shape.replicated_bytes


def test_an_engine_is_planned_without_torch(home: Path) -> None:
    code = (
        "import sys; from enginehouse.cli import main\n"
        f"main(['plan', 'demo', '--data', {str(home)!r}, '--gpu', 'L4'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'grpc' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the engine takes 50" in done.stdout and "bound by" in done.stdout


# --- the roofline


def test_decode_of_one_sequence_is_bound_by_the_weights(shape: Shape) -> None:
    """15.0 GB at 3.35 TB/s: the published limit of 4.48 ms, and 0.04 us for each token of context."""
    bare = roofline.decode_step(shape, H100, 1, 0)
    streamed = 2 * (8_030_261_248 - 128256 * 4096)  # all but the input embedding
    assert bare.seconds == pytest.approx(streamed / 3.35e12, rel=1e-6) == pytest.approx(4.48e-3, rel=2e-3)
    assert (bare.bound, bare.compute) == ("memory", 0)
    there = roofline.decode_step(shape, H100, 1, 2048)
    assert there.seconds - bare.seconds == pytest.approx(2048 * 131_072 / 3.35e12)
    slower = replace(H100, bandwidth_efficiency=0.5)
    assert roofline.decode_step(shape, slower, 1, 0).seconds == pytest.approx(2 * bare.seconds)


def test_large_batches_are_bound_by_arithmetic(shape: Shape) -> None:
    batch = 2048
    step = roofline.decode_step(shape, H100, batch, 0)
    assert step.compute == pytest.approx(
        2 * (shape.layer_parameters + shape.head_parameters) * batch / 989.4e12, rel=1e-9
    )
    assert step.bound == "compute"


def test_a_step_reads_the_experts_that_its_tokens_reach(shape: Shape) -> None:
    """Computing grows with the tokens alone; reading begins at top_k experts and ends at all of them."""
    one = 1_000_000
    sparse = replace(shape, experts=(Experts(10, 8, 2, one),))
    assert sparse.layer_read(1) == pytest.approx(shape.layer_bytes - 2 * 10 * 6 * one)
    assert sparse.layer_read(2) == pytest.approx(shape.layer_bytes - 2 * 10 * 8 * one * 0.75**2)
    assert sparse.layer_read(1000) == pytest.approx(shape.layer_bytes)
    for tokens in (1, 2, 3, 50):  # what random choices reach
        reached = 8 - sparse.experts[0].idle(tokens) / (10 * one)
        assert 2 <= reached <= min(8, 2 * tokens)
    for tokens in (1, 7, 4096):
        assert sparse.layer_operations(tokens) == 2 * tokens * (shape.layer_parameters - 10 * 6 * one)
    step, whole = (roofline.decode_step(kind, H100, 1, 0) for kind in (sparse, shape))
    assert whole.seconds - step.seconds == pytest.approx(2 * 10 * 6 * one / 3.35e12)
    slow = replace(H100, flops={"bfloat16": 1e9})
    computed = roofline.decode_step(sparse, slow, 3, 0).compute
    assert computed == pytest.approx((sparse.layer_operations(3) + 2 * 3 * shape.head_parameters) / 1e9)


def test_prefill_by_hand(shape: Shape) -> None:
    """4,096 tokens in two chunks: each pair of a query and a key before it costs 4 x heads x head_dim x layers."""
    time = roofline.prefill(shape, H100, 4096)
    layers = 2 * shape.layer_parameters * 4096 / 989.4e12
    attention = 4 * 32 * 32 * 128 * (4096 * 4097 / 2) / 989.4e12
    head = 2 * shape.head_bytes / 3.35e12  # one row of logits a chunk: its matrix is only read
    assert time.seconds == pytest.approx(layers + attention + head, rel=1e-6)
    assert time.bound == "compute"
    short = roofline.prefill(shape, H100, 16)
    assert short.bound == "memory"


def test_windows_bound_what_attention_reads_and_computes(shape: Shape) -> None:
    sliding = replace(shape, attention=(Attention(32, 32, 8, 128, window=100),))
    assert roofline.decode_step(sliding, H100, 4, 5000) == roofline.decode_step(sliding, H100, 4, 100)
    for tokens in (1, 60, 100, 101, 5000):
        pairs = sum(min(query + 1, 100) for query in range(tokens))
        chunked = [roofline._windowed(start, min(70, tokens - start), 100) for start in range(0, tokens, 70)]
        assert sum(chunked) == pairs


def test_how_many_sequences_fit(shape: Shape) -> None:
    """Whole blocks of 16 tokens in what the weights leave of 90% of the memory."""
    room = 0.9 * 80e9 - shape.total_bytes
    assert roofline.max_sequences(shape, H100, 1000, 0.9) == int(room // (1008 * 131_072))
    assert roofline.max_sequences(shape, replace(H100, memory=16e9), 1000, 0.9) == 0
    assert roofline.max_sequences(replace(shape, kv_dtype="fp8"), H100, 1008, 0.9) == int(room // (1008 * 65_536))


def test_a_block_is_the_executors() -> None:
    assert roofline.BLOCK_SIZE == BLOCK_SIZE


def test_several_cards_divide_the_matrices_and_the_heads(llama: Path, shape: Shape) -> None:
    four = of_checkpoint(str(llama), None, tp=4)
    assert four.whole == shape and len(four.stages) == 1
    (each,) = four.stages
    whole = (shape.total_bytes - shape.replicated_bytes) / 4 + shape.replicated_bytes
    assert each.total_bytes == whole + 4, "the first id that it has"
    assert each.kv_bytes(1) == shape.kv_bytes(1) / 4
    # a sum of the embedding's rows, and two in each layer; a rank sends 2 x 3/4 of each
    assert each.sent_per_token == (1 + 2 * 32) * 2 * 3 / 4 * 4096 * 2
    assert each.sent_per_row == 3 * 128256 / 4 * 2
    alone, together = (roofline.decode((one,), H100, 1, 1000).seconds for one in (shape, each))
    assert alone / 4 < together < alone / 3.99
    (sixteen,) = of_checkpoint(str(llama), None, tp=16).stages
    assert sixteen.kv_bytes(1) == 2 * 32 * 1 * 128 * 2, "eight of sixteen KV heads are there twice"


def test_a_pipeline_has_its_places_one_after_another(llama: Path, shape: Shape) -> None:
    divided = of_checkpoint(str(llama), None, pp=3)
    stages = divided.stages
    assert [stage.layers for stage in stages] == [11, 11, 10]
    assert [stage.sent_per_token for stage in stages] == [4096 * 2, 4096 * 2, 0]
    assert stages[0].head_bytes == stages[1].head_bytes == 0 and stages[2].head_bytes == shape.head_bytes
    assert sum(stage.layer_bytes for stage in stages) == shape.layer_bytes
    assert sum(stage.kv_bytes(1) for stage in stages) == shape.kv_bytes(1)
    told = ranks_json(divided)
    assert [rank["sent_bytes_per_row_of_logits"] for rank in told] == [0, 0, 4 * 128256]
    alone = roofline.decode_step(shape, H100, 1, 500).seconds
    assert roofline.decode(stages, H100, 1, 500).seconds == pytest.approx(alone, rel=1e-3)  # through all of them
    times = [roofline.decode_step(stage, H100, 11, 500).seconds for stage in stages]
    assert roofline.decode(stages, H100, 33, 500).seconds == pytest.approx(
        3 * max(times)
    )  # as often as the slowest can
    assert roofline.decode(stages, H100, 2, 500).seconds == pytest.approx(
        sum(roofline.decode_step(stage, H100, 1, 500).seconds for stage in stages)
    )
    told = plan(llama, "--gpu", "H100", "--pp", 3, "--input-len", 4096)["prefill"]
    once = sum(roofline.prefill(stage, H100, 4096).seconds for stage in stages)
    assert told["floor_seconds"] == pytest.approx(once)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_a_plan_of_several_ranks_says_what_a_build_writes(tp: int, pp: int, tmp_path: Path) -> None:
    """Of the checkpoint before, and of the engine after."""
    store = open_store(str(tmp_path / "store"))
    manifest = build(DEMO, BuildConfig(dtype="bfloat16", tp_size=tp, pp_size=pp), store=store).manifest
    registry.set_name(store, "demo", manifest.engine_id)
    planned = of_checkpoint(str(DEMO), "bfloat16", tp, pp)
    engine = of_engine(store, "demo")
    assert ranks_json(planned) == ranks_json(engine) and planned.whole.num_parameters == engine.whole.num_parameters
    for told, rank in zip(ranks_json(engine), manifest.ranks, strict=True):
        headers = 0
        for file in rank.weights:
            headers += 8 + int.from_bytes(blobs.read(store, file)[:8], "little")
        assert told["weight_bytes"] == sum(file.size for file in rank.weights) - headers
    assert engine.whole.kv_bytes(1) == manifest.model.kv_bytes_per_token
    told = plan("demo", "--store", store.url, "--gpu", "H100", "--batch", 4)
    assert (told["tp"], told["pp"], len(told["ranks"])) == (tp, pp, tp * pp)
    assert told["decode"][0]["floor_seconds"] == roofline.decode(engine.stages, H100, 4, 1024 + 128).seconds
    assert told == plan("demo", "--store", store.url, "--gpu", "H100", "--batch", 4, "--tp", tp, "--pp", pp)


def test_fp8_halves_the_layers_and_needs_a_card_that_has_it(shape: Shape) -> None:
    small = shape.quantized("fp8")
    assert small.weight_bytes["fp8"] == shape.layer_parameters
    assert small.total_bytes == shape.total_bytes - shape.layer_parameters
    limit = (small.layer_bytes + small.replicated_bytes + small.head_bytes) / 3.35e12
    assert roofline.decode_step(small, H100, 1, 0).seconds == pytest.approx(limit) == pytest.approx(2.4e-3, rel=0.01)
    with pytest.raises(FailedPrecondition, match="no fp8 matrix units"):
        roofline.decode_step(small, replace(H100, flops={"bfloat16": 1.0}), 1, 0)


def test_the_table_of_gpus_holds_together() -> None:
    assert len(GPUS) == 15
    for gpu in GPUS.values():
        assert 10 < gpu.memory < 300 and 200 < gpu.bandwidth < 10_000 and gpu.source
        half = gpu.tflops["float16"]
        assert half > gpu.tflops["float32"] and gpu.tflops.get("bfloat16", half) == half
        for dtype in {"fp8", "int8"} & gpu.tflops.keys():
            assert 1.9 < gpu.tflops[dtype] / half < 4.1
    assert find_gpu("h100 sxm") == find_gpu("H100") == GPUS["H100-SXM"]
    assert find_gpu("rtx4090").memory == 24
    with pytest.raises(InvalidArgument, match="no GPU 'H900' in the table: choose one of H100-SXM"):
        find_gpu("H900")


# --- what is typed


def test_the_plan_of_an_engine(home: Path) -> None:
    shape = of_engine(open_store(Home(home).store), "demo").whole
    demo = ("demo", "--data", home)
    told = plan(*demo, "--gpu", "H100", "--bandwidth-efficiency", "1", "--compute-efficiency", "1")
    assert told["model"]["weight_bytes"] == shape.total_bytes
    assert told["model"]["kv_bytes_per_token"] == 5 * 2 * 2 * 32 * 2
    assert (told["input_len"], told["output_len"], told["max_batch"]) == (1024, 256, 50)
    assert [row["batch"] for row in told["decode"]] == [1, 8, 50]
    prefill = roofline.prefill(shape, H100, 1024).seconds
    for row in told["decode"]:
        expected = roofline.decode_step(shape, H100, row["batch"], 1024 + 128).seconds
        assert row["step_seconds"] == row["floor_seconds"] == pytest.approx(expected)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / expected)
        whole = row["batch"] * prefill + 256 * expected
        assert row["requests_per_second"] == pytest.approx(row["batch"] / whole)
    assert told["prefill"]["ttft_seconds"] == pytest.approx(prefill)
    own = plan(*demo, "--gpu", "H100", "--memory", 40, "--bandwidth", 1000, "--flops", 9, "--batch", 2, "--batch", 99)
    assert own["device"]["memory"] == 40e9 and own["device"]["flops"]["bfloat16"] == 9e12
    assert [(row["batch"], row["fits"]) for row in own["decode"]] == [(2, True), (99, False)]
    nothing = plan(*demo, "--gpu", "A10", "--memory", 0.008)
    assert (nothing["max_batch"], nothing["decode"]) == (0, [])
    assert plan(*demo, "--memory", 80)["max_batch"] == 50
    assert "decode" not in plan(*demo, "--memory", 80)
    quantized = plan(*demo, "--dtype", "fp8", "--kv-dtype", "fp8")["model"]
    assert quantized["weight_bytes"] == shape.total_bytes - shape.layer_parameters
    assert quantized["kv_bytes_per_token"] == 5 * 2 * 2 * 32
    assert plan("--gpu", "list")[0]["name"] == "H100-SXM"


def test_the_plan_of_a_checkpoint_as_a_person_reads_it(llama: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(llama), "--gpu", "H100", "--tp", "2"])
    assert result.exit_code == 0, result.output
    for words in (
        "Llama-3.1-8B, 8.03 billion parameters, bfloat16",
        "16.1 GB (bfloat16 16.1 GB",
        "131,072 bytes a token",
        "2 cards, tp 2, pp 1; on each:",
        "  0 to 1     32 layers, 8.03 GB of weights, 65,536 bytes of KV cache a token; sends 532,480 bytes a token and 128,256",
        "H100-SXM, 80 GB, 3350 GB/s, 989.4 TFLOP/s bfloat16",
        "bound by compute",
        "at 85% of the bandwidth and 70%",
    ):
        assert words in result.stdout


def test_what_else_a_person_reads(home: Path) -> None:
    for arguments, words in (
        ((), "Add --gpu NAME"),
        (("--memory", "0.001"), "weights need"),
        (("--memory", "0.001"), "Not even one sequence fits"),
        (("--gpu", "A100", "--dtype", "int8"), "builds no int8 engines yet"),
    ):
        result = CliRunner().invoke(main, ["plan", "demo", "--data", str(home), *arguments])
        assert (result.exit_code, words in result.stdout) == (0, True), result.output
    assert "RTX-5090" in CliRunner().invoke(main, ["plan", "--gpu", "list"]).stdout


def test_wrong_input(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"torch_dtype": None}))
    for arguments, reason in (
        (("demo", "--gpu", "H900"), "GPU_UNKNOWN"),
        (("demo", "--gpu", "A100", "--dtype", "fp8"), "DTYPE_NOT_ON_DEVICE"),
        (("demo", "--gpu", "T4"), "DTYPE_NOT_ON_DEVICE"),
        (("demo", "--dtype", "float16"), "DTYPE_FIXED"),
        (("demo", "--bandwidth", 100), "DEVICE_INCOMPLETE"),
        (("demo", "--input-len", 2048), "CONTEXT_TOO_LONG"),
        (("demo", "--tp", 5), "MAPPING_FIXED"),
        ((DEMO, "--tp", 3), "MAPPING_INVALID"),
        ((tmp_path / "none",), "CHECKPOINT_NOT_FOUND"),
        ((tmp_path,), "DTYPE_NEEDED"),
        (("unknown",), "MODEL_NOT_FOUND"),
    ):
        assert plan(*arguments, "--data", home, status=1)["reason"] == reason, arguments
    assert plan(status=2)["message"] == "Missing argument 'CHECKPOINT|ENGINE'."


def test_a_checkpoint_needs_the_builders_extra(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    error = plan(llama, status=1)
    assert error["reason"] == "EXTRA_MISSING" and "pip install 'enginehouse[builder]'" in error["message"]


HUB = """
import json
from engine.errors import EnginehouseError
from enginehouse.model_shape import download_config
for repository in (("org/name", "v2"), ("org/name", "gone"), ("org/none", None), ("org/empty", None)):
    try:
        print(json.dumps([sorted(path.name for path in download_config(*repository).iterdir()), None]))
    except EnginehouseError as error:
        print(json.dumps([error.reason, error.message]))
"""


def test_of_a_repository_of_the_hub_only_the_config_is_downloaded(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (llama / "model.safetensors").write_bytes(b"never sent")
    repositories = {
        "org/name": Repository(llama, {"v2": "b" * 40}),
        "org/empty": Repository(tmp_path / "empty"),
    }
    with hub_server.serve(repositories) as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= hub_server.environment(hub.url, tmp_path / "cache")
        done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said[0] == [["config.json"], None]
    assert [reason for reason, _ in said[1:]] == ["REVISION_NOT_FOUND", "REPOSITORY_NOT_FOUND", "FILE_NOT_FOUND"]
    assert hub.downloaded() <= {"config.json"}
