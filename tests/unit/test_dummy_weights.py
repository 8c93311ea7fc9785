"""Dummy weights: an engine of a config alone, whose weights its executor makes."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from families_harness import watch
from gateway_harness import cluster, collect, eventually, failure
from mock_executor import EOS

import enginehouse
from builder_svc.checkpoint.sources import fetch
from builder_svc.server import read_options
from engine import checkpoints
from engine.blobs import put_bytes
from engine.checkpoints import UploadedCheckpoint
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition
from engine.fingerprint import Node
from engine.manifest import Manifest
from engine.ops import DENSE
from engine.opset import OPERATORS, packed_inputs
from engine.program import Op, Program, TensorType, Value
from engine.verify import verify
from enginehouse import AutoConfig, AutoModelForCausalLM, BuildConfig, build
from enginehouse.cli import main
from enginehouse.upload import find_files
from executor_svc import random_weights
from executor_svc.core import Sampling, Sequence
from executor_svc.loader import load_engine
from executor_svc.node import this_node
from protos.v1.builder_pb2 import BuildSpec
from protos.v1.common_pb2 import StoppingCriteria, TokenIds
from protos.v1.gateway_pb2 import DetokenizeRequest, ListModelsRequest, TokenizeRequest
from tests import tokenizer_engine
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine

LARGE = Path(__file__).parents[2] / "bench" / "models" / "llama-3.1-8b"


@pytest.fixture
def config_alone(checkpoint: Path, tmp_path: Path) -> Path:
    """A directory that has nothing but config.json."""
    directory = tmp_path / "alone"
    directory.mkdir()
    shutil.copy(checkpoint / "config.json", directory)
    return directory


# Building


def test_one_engine_from_the_class_and_from_the_option(checkpoint: Path, config_alone: Path, tmp_path: Path) -> None:
    """It differs from the real one, and holds no weight but what no checkpoint has."""
    store = DirectoryStore(tmp_path / "store")
    config = AutoConfig.from_hugging_face(checkpoint)
    dummy = AutoModelForCausalLM.get_trtllm_model_class(checkpoint)(config)
    first, again = build(dummy, store=store), build(checkpoint, BuildConfig(dummy_weights=True), store=store)
    of_real = build(AutoModelForCausalLM.from_hugging_face(checkpoint), BuildConfig(dummy_weights=True), store=store)
    assert (first.reused, again.reused, of_real.reused) == (False, True, True)
    manifest = first.manifest
    real, bare = (
        build(checkpoint, store=store).manifest,
        build(config_alone, BuildConfig(dummy_weights=True), store=store).manifest,
    )
    assert len({manifest.engine_id, real.engine_id, bare.engine_id}) == 3
    assert (manifest.model, manifest.limits) == (real.model, real.limits)
    assert (manifest.tokenizer, bare.tokenizer) == (real.tokenizer, ())
    (rank,) = manifest.ranks
    assert rank.random_seed == 0 and rank.program == real.ranks[0].program
    assert manifest.weight_bytes() < 1000
    assert Manifest.from_json(manifest.to_json()) == manifest and b"random_seed" not in real.to_json()
    assert {state.state for state in verify(store, manifest)} == {"ok"}


def test_real_weights_are_still_asked_for(config_alone: Path, tmp_path: Path) -> None:
    with pytest.raises(enginehouse.EnginehouseError, match="holds no \\*.safetensors file"):
        build(config_alone, store=DirectoryStore(tmp_path / "store"))


def test_dummy_weights_cannot_be_read_or_saved(checkpoint: Path, tmp_path: Path) -> None:
    dummy = enginehouse.LLaMAForCausalLM(AutoConfig.from_hugging_face(checkpoint))
    with pytest.raises(FailedPrecondition, match="dummy weights are made by executors"):
        dummy.weights()
    with pytest.raises(FailedPrecondition, match="dummy weights are made by executors"):
        dummy.save_checkpoint(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_saved_checkpoint_with_dummy_weights(checkpoint: Path, tmp_path: Path) -> None:
    store, options = DirectoryStore(tmp_path / "store"), BuildConfig(dummy_weights=True)
    AutoModelForCausalLM.from_hugging_face(checkpoint).save_checkpoint(tmp_path / "saved")
    assert build(tmp_path / "saved", options, store=store).manifest == build(checkpoint, options, store=store).manifest


def test_eight_billion_parameters_in_seconds_and_a_few_megabytes(tmp_path: Path) -> None:
    """CPU seconds of this process: others run beside it. Measured: 4 to 8."""
    began = time.process_time()
    config = AutoConfig.from_hugging_face(LARGE, dtype="auto")
    model = AutoModelForCausalLM.get_trtllm_model_class(LARGE)(config)
    manifest = build(model, BuildConfig(device="cuda", max_seq_len=8192), store=DirectoryStore(tmp_path)).manifest
    assert time.process_time() - began < 20
    assert sum(file.size for file in manifest.files()) < 5_000_000
    facts = manifest.model
    assert (facts.num_parameters, facts.dtype, facts.num_layers) == (8_030_261_312, "bfloat16", 32)


# Loading


def test_weights_are_random_of_the_right_size_and_the_same_each_time(checkpoint: Path, tmp_path: Path) -> None:
    store, seen = DirectoryStore(tmp_path), []
    real = load_engine(store, build(checkpoint, store=store).manifest.engine_id, this_node("cpu"))
    engine = build(checkpoint, BuildConfig(dummy_weights=True), store=store).manifest.engine_id
    loaded = load_engine(store, engine, this_node("cpu"), lambda done, total: seen.append((done, total)))
    again = load_engine(store, engine, this_node("cpu"))
    assert set(loaded.weights) == set(real.weights) == set(loaded.program.weights)
    assert torch.equal(loaded.weights["rope.0.inv_freq"], real.weights["rope.0.inv_freq"])
    values = set()
    for name, weight in loaded.weights.items():
        assert torch.equal(weight, again.weights[name])
        assert (weight.dtype, weight.shape) == (real.weights[name].dtype, real.weights[name].shape)
        if name.endswith("norm.weight"):
            assert (weight - 1).abs().max() < 0.2 and weight.std() > 0
        elif weight.dim() == 2:
            assert weight.std().item() == pytest.approx(1 / math.sqrt(weight.shape[1]), rel=0.1)
        values.add(weight.view(-1)[0].item())
    assert len(values) == len(loaded.weights)
    assert seen[-1] == (loaded.size, loaded.size) and all(done <= total for done, total in seen)
    assert loaded.size > sum(weight.nbytes for weight in loaded.weights.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_with_dummy_weights_runs(tmp_path: Path, dtype: str) -> None:
    """With biases: its tokens are not all the same, and two runs agree."""
    checkpoint = save_checkpoint(tmp_path / "qwen", "qwen2")
    (checkpoint / "model.safetensors").unlink()
    texts = []
    for store in ("one", "two"):
        loaded = make_engine(checkpoint, tmp_path / store, dtype=dtype, dummy_weights=True)
        sequences = [Sequence(0, row, [5 + row, 9], 2, 24, Sampling(0.0)) for row in range(3)]
        engine = Engine(loaded)
        logits = watch(engine)
        engine.run(sequences)
        rows = torch.stack(list(logits.values()))
        assert bool(rows.isfinite().all()) and 1 < rows.abs().max() < 50
        texts.append([sequence.token_ids for sequence in sequences])
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == 3 and len(set(texts[0][0])) > 5


PACKED: dict[str, tuple[dict[str, Any], dict[str, TensorType]]] = {
    "linear_int4": (
        {"group_size": 32},
        {"weight": TensorType("uint8", (512, 128)), "scales": TensorType("float16", (512, 8))},
    ),
    "linear_int4 with zero points": (
        {"group_size": 32},
        {
            "weight": TensorType("uint8", (512, 128)),
            "scales": TensorType("float16", (512, 8)),
            "zeros": TensorType("uint8", (512, 8)),
        },
    ),
    "linear_int8": ({}, {"weight": TensorType("int8", (512, 256)), "scales": TensorType("float32", (512,))}),
    "linear_fp8": (
        {"block_rows": 128, "block_columns": 128},
        {"weight": TensorType("float8_e4m3fn", (512, 256)), "scales": TensorType("float32", (4, 2))},
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_stand_for_a_matrix_like_any_other(case: str) -> None:
    (attrs, types), op = PACKED[case], case.split()[0]
    given = [name if name in types else "" for name in (slot.rstrip("?") for slot in OPERATORS[op].inputs[1:])]
    x, y = (Value(name, TensorType("float32", ("num_tokens", size))) for name, size in (("x", 256), ("y", 512)))
    ops = (Op("embedding", ("token_ids", "table"), (x,)), Op(op, ("x", *given), (y,), attrs))
    inputs = {"token_ids": TensorType("int32", ("num_tokens",))}
    held = {"table": TensorType("float32", (100, 256)), **types}
    program = Program({"num_tokens": 4, "num_logits": 1}, inputs, held, (), ops, ("y",))
    program.validate()
    made = random_weights.make(program, list(held), 0, "cpu")
    weight, scales, *_ = packed_inputs(op, ("x", *given))
    dense = DENSE[op](*map(made.get, (weight, *scales)), **attrs)
    assert dense.shape == (512, 256) and abs(dense.mean().item()) < 0.01
    assert dense.std().item() == pytest.approx(1 / 16, rel=0.03)
    bits = made["weight"].view(torch.uint8)
    assert len(bits.unique()) > 100 and set(DENSE) == {name.split()[0] for name in PACKED}
    assert random_weights.make(program, ["weight"], 1, "cpu")["weight"].view(torch.uint8).ne(bits).any()


def test_a_refusal_names_the_build_that_fits(checkpoint: Path, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    engine = build(checkpoint, BuildConfig(device="cuda", dummy_weights=True), store=store).manifest.engine_id
    with pytest.raises(FailedPrecondition, match="--device cpu --store .* --dummy-weights"):
        load_engine(store, engine, Node("cpu", {"torch": "2"}))


# Command line, service, upload


def test_the_command_line(config_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))

    def typed(*words: str) -> Any:
        result = CliRunner().invoke(main, [*words, "--json"])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    built = typed("build", str(config_alone), "--name", "m", "--dummy-weights")
    assert built["dummy_weights"] and built["size"] < 200_000
    assert [one["dummy_weights"] for one in typed("engines", "ls")] == [True]
    assert typed("engines", "inspect", "m")["manifest"]["ranks"][0]["random_seed"] == 0
    planned = typed("plan", "m")["model"]
    assert planned["dummy_weights"] and planned["weight_bytes"] > built["size"]
    for words, shown in [
        (("engines", "ls"), "float32 cpu, dummy weights"),
        (("engines", "inspect", "m"), "dummy: random, made where it is loaded from seed 0"),
        (("engines", "inspect", "m"), "none: token ids in and out"),
        (("plan", "m"), "float32, dummy weights"),
        (("build", str(config_alone), "--name", "m", "--dummy-weights"), "dummy weights, found, nothing to build"),
    ]:
        assert shown in CliRunner().invoke(main, list(words)).stdout


def test_the_wire_says_it() -> None:
    assert read_options(BuildSpec(dummy_weights=True)).dummy_weights
    assert not read_options(BuildSpec()).dummy_weights


def test_an_upload_without_weights(checkpoint: Path, config_alone: Path, tmp_path: Path) -> None:
    """And one with weights, of which a build with dummy weights downloads the rest."""
    assert [path.name for path in find_files(config_alone, weights=False)] == ["config.json"]
    assert "model.safetensors" not in {path.name for path in find_files(checkpoint, weights=False)}
    store = DirectoryStore(tmp_path / "store")
    refs = [put_bytes(store, path.name, path.read_bytes()) for path in find_files(checkpoint)]
    source = f"upload://{checkpoints.put(store, UploadedCheckpoint(tuple(refs)))}"
    brought = {path.name for path in fetch(source, store, tmp_path, lambda *_: None, weights=False).iterdir()}
    assert brought == {ref.name for ref in refs} - {"model.safetensors"}


# A model without a tokenizer, at the gateway


async def test_token_ids_go_in_and_out_without_a_tokenizer(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        engine = tokenizer_engine.publish(made.store, "bare", {}, {"bare": 1}, 512, 1000)
        made.executor.ready.append(engine)
        await eventually(lambda: made.router.ready(engine) == 1)
        models = await made.stub.ListModels(ListModelsRequest())
        told = {model.name: (model.has_tokenizer, model.vocab_size) for model in models.models}
        assert told == {"bare": (False, 512), "demo": (True, 512)}
        for call in (
            made.generate(model="bare", text="hello"),
            made.generate(model="bare", token_ids=TokenIds(ids=[1]), stop=["x"]),
            made.generate(model="bare", token_ids=TokenIds(ids=[1]), bad_words=["x"]),
            made.generate(model="bare", token_ids=TokenIds(ids=[1]), echo=True),
            made.stub.Tokenize(TokenizeRequest(model="bare", text="x")),
            made.stub.Detokenize(DetokenizeRequest(model="bare", token_ids=[1])),
        ):
            error = await failure(call)
            assert (error.code, error.reason) == (9, "TOKENIZER_MISSING"), error.message
            assert "no tokenizer" in error.message
        call = made.generate(model="bare", token_ids=TokenIds(ids=[7, 500]), stopping=StoppingCriteria(max_tokens=3))
        submit = await made.executor.submitted()
        assert list(submit.token_ids) == [7, 500]
        made.executor.begin(submit.handle)
        made.executor.tokens(submit.handle, [3, 400], EOS)
        text, token_ids, last = await collect(call)
        assert (text, token_ids, last.finish) == ("", [3, 400], EOS)
