"""Families as TensorRT networks against transformers: ragged prompts, then decodes, through scheduler and TensorRTRunner."""

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from families_harness import check_family, reference_of, watch
from test_families import CASES as LLAMAS
from test_families_experts import CASES as EXPERTS
from test_families_gpt import CASES as GPTS
from test_families_wide import CASES as WIDE
from test_shards import CASES as DIVIDED
from torch import Tensor

from builder_svc.build_config import BuildConfig
from builder_svc.lower.tensorrt.targets import attention_form
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.manifest import Parallelism
from executor_svc.core import Sampling, Sequence
from executor_svc.group import Group
from executor_svc.layout import StepLayout
from executor_svc.loader import begin_load
from executor_svc.loop import scheduler_config
from executor_svc.node import this_node
from executor_svc.plans import pack
from executor_svc.scheduler import Scheduler
from executor_svc.tensorrt_runner import TensorRTRunner
from tests.conftest import VOCAB_SIZE, save_checkpoint
from tests.ranks import Stage
from tests.running import make_engine
from tests.trt_engine import PACKED, PADDED, TensorRTEngine, evaluated, runner

CASES: dict[str, tuple[str, dict[str, Any]]] = {**LLAMAS, **GPTS, **WIDE, **EXPERTS}  # type: ignore[dict-item]
QUICK = (
    "llama-grouped-odd-head", "qwen2", "qwen3", "mistral", "phi3-longrope", "llama-dynamic", "gpt2", "gptj", "phi", "falcon-40b",
    "falcon-rw", "gpt-neox-parallel", "gemma", "gemma2-caps", "gemma3", "stablelm-parallel-norms", "olmo2", "olmo3", "granite",
    "mixtral", "qwen2-moe",
)  # fmt: skip
"""One of each family; the others in drills."""
OPTIONS: dict[str, Any] = {"max_num_tokens": 64, "max_batch_size": 4}


def check(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **changes)
    reference = reference_of(checkpoint, "sdpa" if changes.get("alibi") else "eager")  # eager adds Falcon's alibi twice
    loaded = make_engine(checkpoint, tmp_path / "store", prepared=False, **OPTIONS)
    targets = [PADDED, PACKED] if attention_form(loaded.program, PACKED) == "packed" else [PADDED]
    for target in targets:
        engine = TensorRTEngine(loaded, target)
        assert engine.evaluated.lowered.io_spec.attention == attention_form(loaded.program, target)
        check_family(checkpoint, reference, tmp_path, make=lambda *_, made=engine, **__: made, new_tokens=6)


@pytest.mark.parametrize("case", QUICK)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.drill
@pytest.mark.parametrize("case", sorted(CASES.keys() - set(QUICK)))
def test_others_equal_transformers(case: str, tmp_path: Path) -> None:
    check(case, tmp_path)


def prompts() -> list[Sequence]:
    torch.manual_seed(3)
    tokens = [torch.randint(2, VOCAB_SIZE, (length,)).tolist() for length in (1, 70, 33)]
    return [Sequence(0, row, ids, len(ids), 4, Sampling(0.0)) for row, ids in enumerate(tokens)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon"])
def test_half_precision_errs_as_transformers_does(family: str, dtype: str, tmp_path: Path) -> None:
    """Against transformers in float32 with the weights rounded, of logits of about 5."""
    changes: dict[str, Any] = {"alibi": True, "hidden_size": 64} if family == "falcon" else {"head_dim": 32}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", family, **changes)
    attention = "sdpa" if family == "falcon" else "eager"
    half: Any = copy.deepcopy(reference_of(checkpoint, attention)).to(getattr(torch, dtype))
    exact: Any = copy.deepcopy(half).float()
    engine = TensorRTEngine(make_engine(checkpoint, tmp_path / "store", prepared=False, dtype=dtype, **OPTIONS), PADDED)
    rows, work, ours, theirs = watch(engine), prompts(), [], []
    engine.run(work)
    for sequence in work:
        ids = torch.tensor([sequence.token_ids[:-1]])
        with torch.inference_mode():
            wanted, other = exact(ids).logits[0], half(ids).logits[0].float()
        found = torch.stack([rows[sequence.handle, at] for at in range(len(wanted))])
        ours.append((found - wanted).abs())
        theirs.append((other - wanted).abs())
    assert torch.cat(ours).mean() <= 1.5 * torch.cat(theirs).mean()
    assert torch.cat(ours).max() <= 2 * torch.cat(theirs).max()


def listen(one: TensorRTRunner) -> list[Tensor]:
    """The logits of each step, filled as the runner runs."""
    made, compute = [], one._logits

    def logits(layout: StepLayout) -> Tensor:
        made.append(compute(layout))
        return made[-1]

    one._logits = logits  # type: ignore[method-assign]
    return made


class Led(Group):
    """A rank in a thread: rank 0's plans go to the others' queues."""

    def __init__(self, rank: int, size: int, followers: "list[Queue[bytes | None]]") -> None:
        super().__init__(rank, Parallelism(size, size))
        self.followers = followers

    def tell(self, plan: Mapping[str, Any]) -> None:
        for follower in self.followers:
            follower.put(pack(plan))

    def communicator(self) -> int:
        return 4096 + self.rank


@pytest.mark.parametrize(
    ("family", "target"), [("llama", PADDED), ("llama", PACKED), ("gemma2", PADDED), ("mixtral", PADDED)], ids=str
)
def test_two_ranks_equal_one(family: str, target: Any, tmp_path: Path) -> None:
    """Rank 0's scheduler and runner lead; collectives go by the metadata that the layers have."""
    check_two_ranks(save_checkpoint(tmp_path / "checkpoint", family, vocab_size=323), target, tmp_path)


@pytest.mark.drill
@pytest.mark.parametrize("case", sorted(DIVIDED))
def test_two_ranks_of_others_equal_one(case: str, tmp_path: Path) -> None:
    family, changes = DIVIDED[case]
    check_two_ranks(save_checkpoint(tmp_path / "checkpoint", family, **changes), PADDED, tmp_path)


def check_two_ranks(checkpoint: Path, target: Any, tmp_path: Path) -> None:
    alone = TensorRTEngine(make_engine(checkpoint, tmp_path / "store", prepared=False, **OPTIONS), target)
    wanted, work, again = listen(alone.runner), prompts(), prompts()
    alone.run(work)
    with led_by_rank_0(alone, checkpoint, target, tmp_path):
        found = listen(alone.runner)
        alone.run(again)
    assert [one.token_ids for one in again] == [one.token_ids for one in work]
    assert len(found) == len(wanted)
    assert max((one - other).abs().max() for one, other in zip(found, wanted, strict=True) if len(one)) < 1e-4


@contextmanager
def led_by_rank_0(
    engine: TensorRTEngine, checkpoint: Path, target: Any, tmp_path: Path, **options: Any
) -> Iterator[None]:
    """Makes the engine's runner the first of two ranks'; the second follows in a thread."""
    stage, plans, store = Stage(2), Queue[bytes | None](), DirectoryStore(tmp_path / "store")
    two = build(checkpoint, BuildConfig(device="cpu", tp_size=2, **OPTIONS, **options), store=store)
    ranks = [begin_load(store, two.engine_id, this_node("cpu"), which=lambda _, r=rank: r) for rank in range(2)]
    for part in ranks:
        part.arriving.close()

    def collective(rank: int) -> Any:
        def compute(facts: dict[str, Any], x: Tensor) -> Tensor:
            assert facts["ranks"] == 2 and (facts["operation"], facts["reduce"]) in (
                ("ALL_REDUCE", "SUM"), ("ALL_GATHER", "NONE"),
            )  # fmt: skip
            parts = stage.exchange(rank, x)
            return torch.cat(parts) if facts["operation"] == "ALL_GATHER" else torch.stack(parts).sum(0)

        return compute

    runners = [
        runner(part, evaluated(part, target, collective(rank)), 4, Led(rank, 2, [plans] if rank == 0 else []))
        for rank, part in enumerate(ranks)
    ]
    assert [each._context.communicator for each in runners] == [4096, 4097]

    def follow() -> None:
        while (plan := plans.get()) is not None:
            runners[1].follow(plan)

    engine.runner, engine.scheduler = runners[0], Scheduler(scheduler_config(runners[0], ranks[0].manifest))
    follower = threading.Thread(target=follow)
    follower.start()
    try:
        yield
    finally:
        plans.put(None)
        follower.join()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 0.013), ("bfloat16", 0.11)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_llama_in_each_precision(dtype: str, tolerance: float, ranks: int, tmp_path: Path) -> None:
    """Against transformers in float32 with the weights rounded: logits of about 5, from a width of 512."""
    checkpoint = save_checkpoint(
        tmp_path / "checkpoint", vocab_size=2000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
        num_attention_heads=8, initializer_range=0.05, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    exact: Any = copy.deepcopy(reference_of(checkpoint)).to(getattr(torch, dtype)).float()
    tokens = [[5, 17, 900, 33, 2, 71, 8, 9, 10, 11, 400], [3, 1999, 7], [44, 45, 46, 47, 48, 49]]
    work = [Sequence(0, row, list(ids), len(ids), 5, Sampling(0.0)) for row, ids in enumerate(tokens)]
    engine = TensorRTEngine(make_engine(checkpoint, tmp_path / "store", prepared=False, dtype=dtype, **OPTIONS), PADDED)
    with led_by_rank_0(engine, checkpoint, PADDED, tmp_path, dtype=dtype) if ranks == 2 else nullcontext():
        steps = listen(engine.runner)
        engine.run(work)
    found = torch.stack(steps[:5], 1).float()  # of a prompt and four decodes
    for row, (sequence, prompt) in enumerate(zip(work, tokens, strict=True)):
        with torch.inference_mode():
            wanted = exact(torch.tensor([sequence.token_ids[:-1]])).logits[0, len(prompt) - 1 :]
        assert 3 < wanted.abs().max() < 8
        assert (found[row] - wanted).abs().max() <= tolerance
