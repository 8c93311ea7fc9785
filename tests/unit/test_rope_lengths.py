"""Rotary frequencies that depend on a sequence's length, against transformers: LongRoPE and dynamic NTK.

With LongRoPE all keys change where a sequence grows beyond 64 tokens. transformers' LLaMA keeps the old ones in its cache, so it
runs without one here; its Phi-3, which gives the cache up at that token, tells the same. With dynamic NTK keys stay as they were
written: it runs with its cache, each time anew, because its frequencies remember earlier calls.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from families_harness import check_family
from torch import Tensor

from engine.errors import Unimplemented
from engine.program import ROPE_LENGTHS, Op
from executor_svc.beams import BeamGroup, BeamSearch
from executor_svc.core import Sampling, Sequence
from executor_svc.intake import to_sequence
from executor_svc.loader import LoadedEngine
from executor_svc.rope_lengths import RopeLengths, rope_lengths
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2 import Submit
from tests.conftest import VOCAB_SIZE, save_checkpoint
from tests.running import Engine, make_engine

ORIGINAL, LONGEST = 64, 160
LONGROPE = {
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0], "long_factor": [1.5, 2.5, 4.0, 6.0, 7.0, 9.0],
    },
}  # fmt: skip
DYNAMIC = {
    "max_position_embeddings": ORIGINAL,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
}
KINDS = {"longrope": LONGROPE, "dynamic": DYNAMIC}


class Reference:
    """A model of transformers that has never seen another text, and computes everything again where keys may change."""

    def __init__(self, checkpoint: Path, *, use_cache: bool) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._use_cache = use_cache
        self._texts: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, input_ids: Tensor) -> Any:
        return copy.deepcopy(self._model)(input_ids)

    def generate(self, input_ids: Tensor, **settings: Any) -> Any:
        settings = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "pad_token_id": 0, **settings}
        return copy.deepcopy(self._model).generate(
            input_ids, **{"eos_token_id": None, "use_cache": self._use_cache, **settings}
        )

    def text(self, prompt: list[int], count: int) -> list[int]:
        """The prompt and its greedy continuation."""
        found = self._texts.get(tuple(prompt), prompt)
        if len(found) < len(prompt) + count:
            found = self._texts[tuple(prompt)] = self.generate(torch.tensor([prompt]), max_new_tokens=count)[0].tolist()
        return found[: len(prompt) + count]


@dataclasses.dataclass
class Case:
    """A model, built."""

    kind: str
    checkpoint: Path
    loaded: LoadedEngine
    reference: Reference


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = save_checkpoint(directory / "checkpoint", **KINDS[request.param])
    loaded = make_engine(checkpoint, directory / "store", max_num_tokens=48, max_batch_size=8, max_seq_len=LONGEST)
    return Case(request.param, checkpoint, loaded, Reference(checkpoint, use_cache=request.param == "dynamic"))


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(2, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(prompt: list[int], count: int, handle: int = 0, **others: Any) -> Sequence:
    return Sequence(0, handle, list(prompt), len(prompt), count, Sampling(0.0), **others)


def with_ops(loaded: LoadedEngine, ops: tuple[Op, ...]) -> LoadedEngine:
    return dataclasses.replace(loaded, program=msgspec.structs.replace(loaded.program, ops=ops))


def with_original(op: Op, original: int) -> Op:
    return msgspec.structs.replace(op, attrs=op.attrs | {"original": original})


def test_prompts_on_both_sides_of_the_boundary_and_growth_across_it(case: Case, tmp_path: Path) -> None:
    """Beside each other in chunks: grown from 10 and 33, exactly at it, one beyond, far beyond."""
    check_family(case.checkpoint, case.reference, tmp_path, lengths=(10, ORIGINAL, 100, ORIGINAL + 1), max_seq_len=192)


def test_the_boundary_is_felt_at_the_token_behind_the_first_one_beyond_it(case: Case) -> None:
    """A sequence of `original` tokens is a short one; what follows one token more is another text than without a boundary."""
    ops = tuple(with_original(op, 1 << 20) if ROPE_LENGTHS in op.inputs else op for op in case.loaded.program.ops)
    short, grown = greedy(prompt_of(40), 100), greedy(prompt_of(40), 100)
    Engine(with_ops(case.loaded, ops)).run([short])
    Engine(case.loaded).run([grown])
    differ = [one != other for one, other in zip(short.token_ids, grown.token_ids, strict=True)]
    assert ORIGINAL + 1 <= differ.index(True) < ORIGINAL + 8


def test_preempted_before_and_behind_the_boundary(case: Case) -> None:
    """Four sequences of up to 9 blocks share 12."""
    engine = Engine(case.loaded, kv_blocks=12)
    prompts = [prompt_of(length, length) for length in (66, 20, 25, 67)]
    sequences = [greedy(prompt, 75, number) for number, prompt in enumerate(prompts)]
    preempted: set[bool] = set()
    preempt = engine.scheduler._preempt

    def watched(sequence: Sequence) -> None:
        preempted.add(len(sequence.token_ids) > ORIGINAL)
        preempt(sequence)

    engine.scheduler._preempt = watched  # type: ignore[method-assign]
    engine.run(sequences)
    assert preempted == {False, True}
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.token_ids == case.reference.text(prompt, 75)


def test_keys_are_shared_only_where_they_were_rotated_alike(case: Case) -> None:
    """One engine, one after another; each prompt begins with those before it."""
    engine, text = Engine(case.loaded), prompt_of(110)
    found = {}
    for length in (50, 40, 90, 100, 90):
        sequence = greedy(text[:length], 20)
        engine.run([sequence])
        assert sequence.token_ids == case.reference.text(text[:length], 20), length
        found[length] = sequence.num_cached
    assert found[40] == 32, "both short"
    assert found[100] == (0 if case.kind == "dynamic" else 80), (
        "of another length, of which only LongRoPE makes nothing"
    )
    assert found[90] == 80, "asked again"


def test_what_has_grown_beyond_is_shared_with_who_goes_on_with_it(case: Case) -> None:
    """A text of 40 tokens and its 60 new ones is the next prompt; the keys of dynamic NTK were those of the shorter lengths."""
    engine, first = Engine(case.loaded), greedy(prompt_of(40), 60)
    engine.run([first])
    following = greedy(first.token_ids, 10)
    engine.run([following])
    assert following.token_ids == case.reference.text(first.token_ids, 10)
    assert following.num_cached == (0 if case.kind == "dynamic" else 96)


@pytest.mark.parametrize("emitted", [5, 24, 25, 60])
def test_a_stream_is_resumed_elsewhere_with_the_keys_that_it_had(case: Case, emitted: int) -> None:
    """The prompt's length counts: 40 tokens, and as many new ones as leave it short, at the boundary, and beyond."""
    wanted = case.reference.text(prompt_of(40), 80)
    submit = Submit(
        token_ids=wanted[:40],
        resume_token_ids=wanted[40 : 40 + emitted],
        sampling=SamplingParams(temperature=0),
        stopping=StoppingCriteria(max_tokens=80, ignore_eos=True),
    )
    sequence = to_sequence(0, submit, case.loaded.manifest)
    Engine(case.loaded).run([sequence])
    assert sequence.token_ids == wanted


def test_beams_across_the_boundary(case: Case) -> None:
    """Each step is a new sequence: at the boundary, all beams are computed again, and share the new keys then."""
    prompt, count = prompt_of(56), 24
    engine, group = Engine(case.loaded), BeamGroup(greedy(prompt, count), BeamSearch(3))
    engine.scheduler.add(group.first())
    computed = []
    while not engine.scheduler.idle:
        batch = engine.scheduler.schedule()
        assert batch is not None
        engine.runner.start(batch)
        computed.append(sum(item.count for item in batch.items))
        for emitted in engine.scheduler.commit(batch, engine.runner.finish()):
            for sequence in group.take(emitted):
                engine.scheduler.go_on(sequence)
        engine.scheduler.check_integrity()
    found = case.reference.generate(torch.tensor([prompt]), max_new_tokens=count, num_beams=3, num_return_sequences=3)
    assert [hypothesis.token_ids for hypothesis in group.hypotheses] == found[:, len(prompt) :].tolist()
    assert sum(computed) <= len(prompt) + 3 * (ORIGINAL + 1) + 3 * 16 * (count - 2), "prefixes are not shared"


def test_log_probabilities_of_a_prompt_are_told_once_by_its_own_keys(case: Case) -> None:
    for length in (ORIGINAL, ORIGINAL + 1):
        prompt, engine = prompt_of(length, 5), Engine(case.loaded)
        sequence = greedy(prompt, 20, prompt_logprobs=0)
        engine.scheduler.add(sequence)
        told: list[float] = []
        while not engine.scheduler.idle:
            batch = engine.scheduler.schedule()
            assert batch is not None
            engine.runner.start(batch)
            engine.scheduler.commit(batch, engine.runner.finish())
            told += [value for part in engine.scheduler.take_prompt_logprobs() for value in part.logprobs.logprobs]
        with torch.inference_mode():
            logprobs = case.reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        assert told == pytest.approx(logprobs[range(length - 1), prompt[1:]].tolist(), abs=1e-4)


def test_layers_that_change_at_different_lengths_are_refused(case: Case) -> None:
    program = case.loaded.program
    (table,) = [op for op in program.ops if ROPE_LENGTHS in op.inputs]
    assert rope_lengths(program) == RopeLengths(ORIGINAL, case.kind == "longrope")
    with pytest.raises(Unimplemented, match=f"of {case.kind} 100, {case.kind} 64: this executor"):
        Engine(with_ops(case.loaded, (*program.ops, with_original(table, 100))))
