"""Real builds by TensorRT for RTX, without a GPU: plans for named targets, in the store, signed, and refused elsewhere."""

import asyncio
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from quantized_writers import awq, floats, save_quantized

from builder_svc import tensorrt_plans
from builder_svc.build_config import BuildConfig
from builder_svc.lower.tensorrt.build import Plan
from builder_svc.lower.tensorrt.build import build as build_plan
from builder_svc.lower.tensorrt.lower import lower
from builder_svc.lower.tensorrt.lowered import LoweredNetwork
from builder_svc.lower.tensorrt.targets import Target
from builder_svc.mapping import Mapping
from builder_svc.pipeline import build, build_identity, make_rank, read_model
from builder_svc.process import BuildProcess, BuildRequest
from engine import blobs, registry, signing, tensorrt
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from engine.fingerprint import Node
from engine.manifest import Limits, engine_id
from engine.program import Op, Program, TensorType, Value
from engine.trust import Trust
from enginehouse.cli import main
from executor_svc.loader import load_engine
from tests.conftest import save_checkpoint

TINY: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 1}
LIMITS: dict[str, Any] = {"max_batch_size": 4, "max_num_tokens": 64}
RTX = tensorrt.load("tensorrt_rtx")
SM120 = Target("tensorrt_rtx", "12.0")
FP8 = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("llama", TINY),
    "window": ("mistral", {**TINY, "sliding_window": 24}),
    "alibi": ("falcon", {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "alibi": True}),
    "capped": ("gemma2", {**TINY, "sliding_window": 24}),
    "experts": ("mixtral", {**TINY, "num_local_experts": 4}),
    "int4": ("llama", TINY),
    "fp8": ("llama", TINY),
}


def checkpoint_of(kind: str, path: Path) -> Path:
    family, changes = KINDS[kind]
    plain = save_checkpoint(path / "plain", family, **changes)
    if kind not in ("int4", "fp8"):
        return plain
    quantization, writer = (AWQ, awq(32)) if kind == "int4" else (FP8, floats(None, "column"))
    save_quantized(plain, path / kind, quantization, lambda name: None if name == "lm_head" else writer)
    return path / kind


def options(capability: str = "12.0", **more: Any) -> BuildConfig:
    chosen = {"dtype": "float16", **LIMITS, **more}
    return BuildConfig(backend="tensorrt_rtx", compute_capability=capability, **chosen)


@pytest.mark.parametrize("target", ["12.0", "8.9"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_attention_and_form_builds(kind: str, target: str, tmp_path: Path) -> None:
    store, told = DirectoryStore(tmp_path / "store"), list[tuple[str, int, int, str]]()
    built = build(checkpoint_of(kind, tmp_path), options(target), store=store, progress=lambda *step: told.append(step))
    manifest = built.manifest
    (rank,) = manifest.ranks
    assert (rank.weights, rank.kernels, len(rank.native)) == ((), (), 1)
    assert b"trt" in blobs.read(store, rank.native[0])[:4], "the plan is whole, by its digests"
    needs = manifest.fingerprint
    assert (needs.backend, needs.backend_version) == ("tensorrt_rtx", tensorrt.version(RTX))
    assert (needs.device, needs.compute_capability) == ("cuda", target)
    network = rank.network
    assert network is not None and network["attention"] == "padded" and network["caches"] == 1
    assert network["profiles"]["prefill"]["seq"] == [1, 16, 64]
    assert network["profiles"]["decode"]["batch"] == [1, 1, 4]
    assert network["layers"].get("ATTENTION_INPUT", 0) == (0 if kind == "capped" else 1)
    assert network["layers"].get("DEQUANTIZE", 0) == {"int4": 4, "fp8": 8}.get(kind, 0)
    steps = [step for step in told if step[0] == "plan"]
    assert len(steps) > 100 and [done for _, done, _, _ in steps[:-1]] == list(range(1, len(steps)))
    assert steps[-1] == ("plan", len(steps) - 1, len(steps) - 1, "steps")


def test_from_the_command_line_signed_and_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, key = save_checkpoint(tmp_path / "checkpoint", **TINY), tmp_path / "key"
    private, store = signing.generate(key), DirectoryStore(tmp_path / "store")
    command = ["build", str(checkpoint), "--backend", "tensorrt_rtx", "--target", "sm120", "--name", "X"]
    limits = ["--max-batch-size", "4", "--max-num-tokens", "64", "--store", store.url, "--data", str(tmp_path / "data")]
    run = CliRunner().invoke(main, [*command, *limits, "--sign-with", str(key)])
    assert run.exit_code == 0, run.output
    found = registry.find_engine(store, "X")
    shown = CliRunner().invoke(main, ["engines", "inspect", "X", "--store", store.url]).output
    assert "needs         tensorrt_rtx, " in shown and "compute capability 12.0" in shown and "native code" in shown
    assert "in the plans" in shown and "padded attention" in shown and f"signed by     {private.public.id}" in shown

    monkeypatch.setattr(blobs, "read", lambda *_: pytest.fail("a byte of the engine is read"))
    monkeypatch.setattr(blobs, "read_into", lambda *_: pytest.fail("a byte of the engine is read"))
    trust, version = Trust((private.public,)), tensorrt.version(RTX)
    nodes = {
        "this node has torch": Node("cuda", {"torch": "2.13"}, compute_capability="12.0"),
        "this executor runs on 'cpu'": Node("cpu", {"torch": "2.13"}),
        "this GPU has 9.0": Node("cuda", {"torch": "2.13", "tensorrt_rtx": version}, compute_capability="9.0"),
        "this node has 1.0": Node("cuda", {"torch": "2.13", "tensorrt_rtx": "1.0"}, compute_capability="12.0"),
    }
    for problem, node in nodes.items():
        with pytest.raises(FailedPrecondition) as caught:
            load_engine(store, found, node, trust=trust)
        assert problem in caught.value.message and "Build one that fits: enginehouse build" in caught.value.message
    with pytest.raises(FailedPrecondition, match="trusted") as caught:
        load_engine(store, found, nodes["this GPU has 9.0"])
    assert caught.value.reason == "NATIVE_UNTRUSTED"


def test_where_it_fits_the_plan_is_loaded_and_nothing_else(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    manifest = build(save_checkpoint(tmp_path / "checkpoint", **TINY), options(), store=store).manifest
    node = Node("cuda", {"tensorrt_rtx": tensorrt.version(RTX)}, compute_capability="12.0")
    loaded = load_engine(store, manifest.engine_id, node, trust=Trust(native=True))
    assert loaded.weights == {} and loaded.plan is not None and loaded.size == manifest.ranks[0].native[0].size
    assert loaded.plan.numpy().tobytes() == blobs.read(store, manifest.ranks[0].native[0])
    assert build(tmp_path / "checkpoint", options(), store=store).reused
    others = [options("8.9"), options(weight_streaming=True), options(max_batch_size=5)]
    ids = {build_id(tmp_path / "checkpoint", each) for each in others} | {manifest.engine_id}
    assert len(ids) == 4


def build_id(checkpoint: Path, chosen: BuildConfig) -> str:
    return engine_id(build_identity(read_model(checkpoint, chosen), chosen))


def test_two_ranks_have_a_plan_each(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    changes = {**TINY, "num_key_value_heads": 2, "vocab_size": 322}
    manifest = build(
        save_checkpoint(tmp_path / "checkpoint", **changes), options(tp_size=2, weight_streaming=True), store=store
    ).manifest
    assert [rank.native[0].name for rank in manifest.ranks] == ["rank0.plan", "rank1.plan"]
    for rank in manifest.ranks:
        assert rank.network is not None and rank.network["layers"]["DIST_COLLECTIVE"] == 4


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"compute_capability": None}, "needs a target: choose one of sm75, sm80"),
        ({"compute_capability": "9.0"}, "does not build for compute capability 9.0"),
        ({"device": "cpu"}, "not for device 'cpu'"),
        ({"dummy_weights": True}, "a plan of backend 'tensorrt_rtx' holds its weights"),
        ({"backend": "onnx"}, "backend 'onnx': choose one of torch, tensorrt, tensorrt_rtx"),
        (
            {"backend": "torch", "device": "cuda", "weight_streaming": True},
            "weight_streaming needs backend tensorrt or",
        ),
    ],
)
def test_options_that_cannot_be(more: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        BuildConfig(**{"backend": "tensorrt_rtx", "compute_capability": "12.0", **more})


def test_a_package_that_is_missing_or_broken_names_the_extra(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match=r"pip install 'enginehouse\[tensorrt\]'") as caught:
        build(checkpoint, BuildConfig(backend="tensorrt"))  # which cannot be installed where tests run
    assert caught.value.reason == "EXTRA_MISSING"

    def broken(name: str) -> None:
        raise ImportError("libtensorrt_rtx.so: cannot open shared object file")

    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    with pytest.raises(FailedPrecondition, match=r"cannot be loaded: libtensorrt_rtx.so.*enginehouse\[tensorrt-rtx\]"):
        tensorrt.load("tensorrt_rtx")


def test_tensorrt_builds_for_the_gpu_of_the_machine_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_plans.tensorrt, "load", lambda _: RTX)  # as if it were installed
    with pytest.raises(FailedPrecondition, match="the GPU of this machine, and none is here"):
        build(checkpoint, BuildConfig(backend="tensorrt"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(FailedPrecondition, match=r"capability is 9\.0, not 10\.0"):
        build(checkpoint, BuildConfig(backend="tensorrt", compute_capability="10.0"))
    planner = tensorrt_plans.Planner.of(BuildConfig(backend="tensorrt"))
    assert planner is not None and planner.fingerprint(1).compute_capability == "9.0"


def embedding(rows: int, columns: int) -> LoweredNetwork:
    """A table of random numbers, from which rows are taken."""
    weights = {"table": torch.randn(1, columns, dtype=torch.float16).repeat(rows, 1)}
    ints = {"token_ids": "num_tokens", "positions": "num_tokens", "logit_indices": "num_logits"}
    program = Program(
        {"num_tokens": 64, "num_logits": 64},
        {name: TensorType("int32", (dim,)) for name, dim in ints.items()},
        {"table": TensorType("float16", (rows, columns))},
        (),
        (
            Op("embedding", ("token_ids", "table"), (Value("x", TensorType("float16", ("num_tokens", columns))),)),
            Op("gather", ("x", "logit_indices"), (Value("y", TensorType("float16", ("num_logits", columns))),)),
        ),
        ("y",),
    )
    return lower(program, weights, RTX, SM120, Limits(4, 64, 64))


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="cannot write /dev/full: No space left on device; free some space"):
        build_plan(embedding(8, 16), RTX, SM120, Path("/dev/full"))
    with pytest.raises(FailedPrecondition, match="cannot write .*No such file or directory"):
        build_plan(embedding(8, 16), RTX, SM120, tmp_path / "absent" / "plan")


def test_what_the_builder_has_measured_is_kept_for_the_next_build(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX measures nothing, and the other one only on its GPU: only what is handed on is seen here."""
    store, given = DirectoryStore(tmp_path / "store"), []

    def measuring(*arguments: Any, timing_cache: bytes, **named: Any) -> Plan:
        given.append(timing_cache)
        return dataclasses.replace(build_plan(*arguments, **named), timing_cache=timing_cache + b"more")

    monkeypatch.setattr(tensorrt_plans, "build", measuring)
    for size in (1, 2):
        build(checkpoint, options(dtype="float32", max_batch_size=size), store=store)
    assert given == [b"", b"more"]
    assert store.read(f"timing/tensorrt_rtx-{tensorrt.version(RTX)}-SM120") == b"moremore"


class Stopped(BaseException):
    """Of a signal."""


@contextmanager
def stopping(heard: threading.Event) -> Iterator[None]:
    def stop(*_: object) -> None:
        heard.set()
        raise Stopped

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_ends_it_in_the_middle(tmp_path: Path) -> None:
    """TensorRT is in a thread of its own and stops at a step; the main one goes on only then."""
    steps, heard = list[int](), threading.Event()
    build_plan(embedding(64, 32), RTX, SM120, tmp_path / "whole", progress=steps.append)
    whole = len(steps)
    steps.clear()

    def kill(step: int) -> None:
        steps.append(step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        if step >= 5:
            heard.wait(60)  # the main thread, which then asks TensorRT to stop
            time.sleep(0.05)

    with stopping(heard), pytest.raises(Stopped):
        build_plan(embedding(64, 32), RTX, SM120, tmp_path / "plan", progress=kill)
    assert 5 <= len(steps) < whole


@pytest.mark.drill
def test_a_large_model_becomes_a_network_soon_and_without_copies() -> None:
    """Llama 8B in under 60 s of the processor, with under 4 GB beside its weights, which nobody has written: memory that is
    copied would count."""
    chosen = BuildConfig(device="cuda", dtype="bfloat16", dummy_weights=True, max_seq_len=8192)
    model = read_model(Path(__file__).parents[2] / "bench/models/llama-3.1-8b", chosen)
    program = make_rank(model, Mapping()).program
    weights = {
        name: torch.empty(type.shape, dtype=getattr(torch, type.dtype)) for name, type in program.weights.items()
    }
    weights |= {name: torch.ones_like(tensor) for name, tensor in weights.items() if tensor.dtype == torch.float32}
    before, began = anonymous(), time.process_time()
    lowered = lower(program, weights, RTX, SM120, model.limits)
    assert time.process_time() - began < 60
    assert anonymous() - before < 4 * 1024**3
    assert lowered.summary()["layers"]["ATTENTION_INPUT"] == 32
    assert sum(tensor.nbytes for tensor in lowered.constants.values()) > 16e9


@pytest.mark.drill
async def test_a_build_that_is_cancelled_while_tensorrt_works_leaves_nothing(tmp_path: Path) -> None:
    """As a builder runs it: the job's events have TensorRT's steps, and its process ends in the middle of them."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", **{**TINY, "num_hidden_layers": 12})
    store, work = DirectoryStore(tmp_path / "store"), tmp_path / "work"
    work.mkdir()
    building, steps = asyncio.Event(), list[int]()

    def progress(phase: str, done: int, *_: object) -> None:
        if phase == "plan":
            steps.append(done)
            building.set()

    request = BuildRequest(str(checkpoint), store.url, options())
    job = asyncio.create_task(BuildProcess(work_dir=work).run(request, progress))
    await asyncio.wait({asyncio.create_task(building.wait()), job}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert building.is_set(), job
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert list(work.iterdir()) == [] and registry.engine_ids(store) == []
    assert steps


def anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.drill
def test_a_plan_of_more_than_2_gib(tmp_path: Path) -> None:
    """It is written as it is made, and its digests are those of the file."""
    plan = build_plan(embedding(280_000, 4096), RTX, SM120, tmp_path / "plan")
    assert plan.ref.size > 2**31
    hasher = blobs.Hasher()
    with plan.path.open("rb") as file:
        while data := file.read(1 << 24):
            hasher.update(data)
    assert hasher.ref("plan") == plan.ref


def test_manifests_without_a_network_keep_their_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """Over which signatures are."""
    manifest = build(checkpoint, BuildConfig(device="cpu"), store=str(tmp_path / "store")).manifest
    assert "network" not in msgspec.json.decode(manifest.to_json())["ranks"][0]
