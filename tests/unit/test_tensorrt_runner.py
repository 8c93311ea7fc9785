"""TensorRTRunner over an engine that evaluates the network: slots, launches and profiles, and the tokens of TorchRunner."""

import socket
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families_harness import continuation, reference_of

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import blobs, tensorrt
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, Internal
from engine.fingerprint import Node
from engine.manifest import Limits, Parallelism
from engine.program import Program
from engine.tensorrt import DECODE, PREFILL
from executor_svc import worker
from executor_svc.core import Sampling, Sequence
from executor_svc.frames import FrameSocket
from executor_svc.group import ALONE, Group
from executor_svc.loader import LoadedEngine
from executor_svc.runners import make_plan_runner
from executor_svc.tensorrt_runner import TensorRTRunner
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2 import LoadEngineRequest, StepOutput, Submit
from protos.v1.worker_pb2 import FromWorker, ToWorker
from tests.conftest import VOCAB_SIZE, save_checkpoint
from tests.running import Engine, make_engine
from tests.trt_engine import PACKED, PADDED, TensorRTEngine, evaluated

OPTIONS: dict[str, Any] = {"max_num_tokens": 64, "max_batch_size": 4}
FORMS = pytest.mark.parametrize("target", [PADDED, PACKED], ids=["padded", "packed"])


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return make_engine(checkpoint, tmp_path_factory.mktemp("store"), prepared=False, **OPTIONS)


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed + length)
    return torch.randint(2, VOCAB_SIZE, (length,), generator=draw).tolist()


def work() -> list[Sequence]:
    """More than there are slots: short and long prompts, greedy and random ones, of several lengths; one tells of its prompt."""
    kinds = [
        Sampling(0.0),
        Sampling(0.8, seed=1),
        Sampling(0.0, repetition_penalty=1.3),
        Sampling(0.9, seed=2, top_k=20),
    ]
    made = []
    for number, length in enumerate((3, 150, 1, 40, 65, 2, 128)):
        ids = prompt(length, number)
        made.append(Sequence(0, number, ids, length, 3 + 2 * number, kinds[number % 4]))
    made[3].prompt_logprobs = 2
    return made


@FORMS
@pytest.mark.parametrize("slots", [2, 4])
def test_the_same_tokens_as_the_torch_runner(loaded: LoadedEngine, target: Any, slots: int) -> None:
    """Slots are given back and taken again while others are in the middle of prompts and completions."""
    wanted, found = work(), work()
    plain, engine = Engine(loaded), TensorRTEngine(loaded, target, slots)
    plain.run(wanted)
    engine.run(found)
    assert engine.runner.capabilities.num_blocks == slots
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    told, other = (
        [logprob for part in each.scheduler.take_prompt_logprobs() for logprob in part.logprobs.logprobs]
        for each in (engine, plain)
    )
    assert len(told) == 39 and told == pytest.approx(other, abs=1e-4)


@FORMS
def test_a_step_is_one_launch_for_decodes_and_one_a_prompt(loaded: LoadedEngine, target: Any) -> None:
    engine = TensorRTEngine(loaded, target)
    launches = engine.runner._context.launches
    first, second = (Sequence(0, n, prompt(5, n), 5, 4, Sampling(0.0)) for n in range(2))
    step(engine, first)
    step(engine, second)  # a decode of the first beside the second's prompt
    step(engine)
    if target is PADDED:
        assert launches == [(PREFILL, (1, 5)), (DECODE, (1, 1)), (PREFILL, (1, 5)), (DECODE, (2, 1))]
    else:
        assert launches == [(PREFILL, (5,)), (PREFILL, (6,)), (DECODE, (2,))]


def step(engine: TensorRTEngine, *new: Sequence) -> None:
    for sequence in new:
        engine.scheduler.add(sequence)
    batch = engine.scheduler.schedule()
    assert batch is not None
    engine.runner.start(batch)
    engine.scheduler.commit(batch, engine.runner.finish())


def test_it_declares_slots_and_what_it_cannot_do(loaded: LoadedEngine) -> None:
    can = TensorRTEngine(loaded, PADDED).runner.capabilities
    assert (can.num_blocks, can.block_size) == (4, loaded.manifest.limits.max_seq_len)
    assert (can.prefix_cache, can.future_tokens, can.mixed_batches, can.max_in_flight) == (False, False, True, 1)


@FORMS
def test_a_sequence_may_grow_to_the_last_place_of_its_slot(loaded: LoadedEngine, target: Any) -> None:
    """While a slot between computes what nobody reads, behind the end of a full one."""
    engine = TensorRTEngine(loaded, target)
    longest = loaded.manifest.limits.max_seq_len
    full = Sequence(0, 0, prompt(longest - 2), longest - 2, 8, Sampling(0.0))
    other = Sequence(0, 1, prompt(4), 4, 20, Sampling(0.0))
    engine.run([full, other])
    assert len(full.token_ids) == longest
    again = Sequence(0, 2, prompt(4), 4, 20, Sampling(0.0))
    Engine(loaded).run([again])
    assert other.token_ids == again.token_ids


def test_keys_that_a_longer_sequence_needs_are_computed_again(tmp_path: Path) -> None:
    """LongRoPE: a sequence grows beyond `original` and is computed again in its slot."""
    factors = {"short_factor": [1.0, 1.3, 1.7, 2.0, 2.5, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 24, **factors}
    changes = {"pad_token_id": None, "original_max_position_embeddings": 24, "rope_parameters": rope}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "phi3", **changes)
    engine = TensorRTEngine(make_engine(checkpoint, tmp_path / "store", prepared=False, **OPTIONS), PADDED)
    sequence = Sequence(0, 0, prompt(20), 20, 10, Sampling(0.0))
    engine.run([sequence])
    reference = reference_of(checkpoint)
    with torch.inference_mode():
        logits = reference(torch.tensor([sequence.token_ids[:-1]])).logits[0, 24:]
    assert sequence.token_ids[25:] == logits.argmax(-1).tolist()
    assert len(continuation(reference, prompt(20), new_tokens=10)) == len(sequence.token_ids)


@pytest.mark.parametrize("memory", [{"kv_memory": 1000}, {"kv_share": 0.0}])
def test_too_little_memory_for_one_sequence(memory: dict[str, Any], loaded: LoadedEngine) -> None:
    with pytest.raises(
        FailedPrecondition, match=r"less than one sequence of 256 tokens: start the executor with --kv-memory"
    ) as caught:
        TensorRTRunner(loaded.program, evaluated(loaded, PADDED), loaded.manifest.limits, device="cpu", **memory)
    assert caught.value.reason == "KV_MEMORY_TOO_SMALL"


def test_caches_leave_the_memory_of_what_computes(loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps = evaluated(loaded, PADDED), list[str]()
    context = engine.create_execution_context()
    engine.create_execution_context = lambda: steps.append("context") or context  # type: ignore[method-assign]
    monkeypatch.setattr("executor_svc.tensorrt_runner.free_memory", lambda _: steps.append("free") or 1 << 30)
    TensorRTRunner(loaded.program, engine, loaded.manifest.limits, device="cpu")
    assert steps == ["context", "free"]
    engine.create_execution_context = lambda: None  # type: ignore[method-assign]
    with pytest.raises(FailedPrecondition, match="no room for what the plan computes with"):
        TensorRTRunner(loaded.program, engine, loaded.manifest.limits, device="cpu")


def test_memory_is_that_of_all_requests_at_most(loaded: LoadedEngine) -> None:
    runner = TensorRTRunner(loaded.program, evaluated(loaded, PADDED), loaded.manifest.limits, device="cpu")
    assert runner.capabilities.num_blocks == loaded.manifest.limits.max_batch_size


def test_weights_are_streamed_as_tensorrt_advises(loaded: LoadedEngine) -> None:
    engine = evaluated(loaded, PADDED)
    engine.streamable_weights_size = 1000
    TensorRTRunner(loaded.program, engine, loaded.manifest.limits, device="cpu")
    assert engine.weight_streaming_budget_v2 == engine.get_weight_streaming_automatic_budget()


class Two(Group):
    def __init__(self) -> None:
        super().__init__(0, Parallelism(2, 2))

    def communicator(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("call", "group", "kind"),
    [
        ("set_communicator", Two(), FailedPrecondition), ("execute_async_v3", ALONE, Internal),
        ("set_input_shape", ALONE, Internal), ("set_optimization_profile_async", ALONE, Internal),
    ],
)  # fmt: skip
def test_what_tensorrt_refuses_is_an_error(call: str, group: Group, kind: type, loaded: LoadedEngine) -> None:
    engine = evaluated(loaded, PADDED)
    context = engine.create_execution_context()
    setattr(context, call, lambda *_: False)
    engine.create_execution_context = lambda: context  # type: ignore[method-assign]
    with pytest.raises(kind, match="TensorRT|the plan"):
        run = TensorRTEngine.__new__(TensorRTEngine)
        run.guides = None
        run.runner = TensorRTRunner(loaded.program, engine, loaded.manifest.limits, device="cpu", group=group)
        run.scheduler = Engine(loaded).scheduler
        run.run([Sequence(0, 0, prompt(3), 3, 2, Sampling(0.0))])


def test_a_plan_that_tensorrt_does_not_take_is_refused_in_words(loaded: LoadedEngine) -> None:
    """The real runtime, which has no GPU here."""
    with pytest.raises(
        FailedPrecondition, match="tensorrt_rtx .* does not take this plan here: .*Build the engine again"
    ) as caught:
        make_plan_runner(
            loaded.program, torch.zeros(4096, dtype=torch.uint8), "tensorrt_rtx", loaded.manifest.limits,
            group=ALONE, kv_memory=None, kv_share=None,
        )  # fmt: skip
    assert caught.value.reason == "PLAN_REFUSED"


def test_a_worker_loads_a_plan_and_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the worker's way, but for TensorRT's runtime, which needs a GPU: its engine evaluates the network of the plan."""
    checkpoint, store = save_checkpoint(tmp_path / "checkpoint"), DirectoryStore(tmp_path / "store")
    options = {"backend": "tensorrt_rtx", "compute_capability": "12.0", "dtype": "float32", **OPTIONS}
    built = build(checkpoint, BuildConfig(**options), store=store).manifest
    plain = make_engine(checkpoint, tmp_path / "store", prepared=False, **OPTIONS)
    given = []

    def runtime(program: Program, plan: torch.Tensor, backend: str, limits: Limits, **settings: Any) -> TensorRTRunner:
        given.append((plan.numpy().tobytes(), backend, limits))
        assert settings.pop("group") is ALONE and settings == {"kv_memory": 1 << 20, "kv_share": None}
        return TensorRTRunner(program, evaluated(plain, PADDED), limits, device="cpu")

    node = Node("cuda", {"tensorrt_rtx": tensorrt.version(tensorrt.load("tensorrt_rtx"))}, compute_capability="12.0")
    monkeypatch.setattr(worker, "this_node", lambda _: node)
    monkeypatch.setattr(worker, "make_plan_runner", runtime)
    monkeypatch.setattr(worker, "free_memory", lambda _: 1 << 30)
    monkeypatch.setattr(worker.gc, "freeze", lambda: None)  # this process has more to do
    ours, theirs = socket.socketpair()
    front = FrameSocket(ours)
    more = {
        "kv_memory": 1 << 20,
        "kv_tokens": None,
        "kv_share": None,
        "max_waiting": None,
        "no_block_reuse": False,
        "trusted_keys": [],
    }
    arguments = Namespace(device="cuda", store=store.url, trust_native=True, imports=0.0, **more)
    with ThreadPoolExecutor(1) as pool, theirs:
        serving = pool.submit(worker._serve, FrameSocket(theirs), arguments)
        with ours:
            front.send(ToWorker(load_engine=LoadEngineRequest(engine_id=built.engine_id)).SerializeToString())
            ready, tokens = False, list[int]()
            while not ready and not serving.done():
                ready = any(FromWorker.FromString(data).progress.HasField("engine") for data in front.receive(60))
            wanted = Submit(
                handle=1,
                engine_id=built.engine_id,
                token_ids=prompt(7),
                sampling=SamplingParams(temperature=0),
                stopping=StoppingCriteria(max_tokens=6, ignore_eos=True),
            )
            front.send(ToWorker(client=1, submit=wanted).SerializeToString())
            while len(tokens) < 6 and not serving.done():
                for data in front.receive(60):
                    tokens += StepOutput.FromString(FromWorker.FromString(data).step_output).token_ids
        assert isinstance(serving.exception(60), ConnectionError)
    assert given == [(blobs.read(store, built.ranks[0].native[0]), "tensorrt_rtx", built.limits)]
    alone = Sequence(0, 0, prompt(7), 7, 6, Sampling(0.0))
    Engine(plain).run([alone])
    assert tokens == alone.token_ids[7:]
