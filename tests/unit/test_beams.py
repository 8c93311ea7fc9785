"""Beam search: transformers' hypotheses on the same model; blocks that come back, whatever ends a search."""

import hashlib
import math
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_svc.beams import BeamGroup, BeamSearch, EarlyStopping
from executor_svc.core import Batch, Emitted, Finish, Logprobs, Reason, Sampled, Sampling, SchedulerConfig, Sequence
from executor_svc.runner import Runner
from executor_svc.scheduler import Scheduler
from tests.conftest import VOCAB_SIZE
from tests.running import Engine, make_engine

STOPPING = {EarlyStopping.ENOUGH: True, EarlyStopping.HEURISTIC: False, EarlyStopping.NEVER: "never"}


def search(scheduler: Scheduler, runner: Runner, groups: list[BeamGroup]) -> None:
    """All of them at once, to their end, as the worker does it."""
    for group in groups:
        scheduler.add(group.first())
    while not scheduler.idle:
        batch = scheduler.schedule()
        assert batch is not None
        runner.start(batch)
        for emitted in scheduler.commit(batch, runner.finish()):
            assert emitted.sequence.group is not None
            for sequence in emitted.sequence.group.take(emitted):
                scheduler.go_on(sequence)
        scheduler.check_integrity()


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(make_engine(checkpoint, tmp_path_factory.mktemp("store"), max_batch_size=8, max_num_tokens=64))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


PROMPT = [7, 91, 15, 200, 33, 4, 4, 18, 77, 120, 121, 122, 9, 10, 11, 12, 13, 14]
COUNT = 20
# (seed of the prompt, every how many tokens is an end, length penalty, width): in most of them, each way to stop early
# gives other hypotheses than the next.
CASES = [
    (6, 10, 1.0, 2),
    (6, 10, 2.5, 2),
    (6, 10, 1.0, 4),
    (8, 10, 1.0, 4),
    (4, 25, 1.0, 2),
    (1, 10, 0.0, 4),
    (5, 10, -1.0, 3),
]


@pytest.mark.parametrize("early_stopping", EarlyStopping)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_transformers(
    engine: Engine, reference: Any, case: tuple[int, int, float, int], early_stopping: EarlyStopping
) -> None:
    seed, every, length_penalty, width = case
    numbers = random.Random(seed)
    prompt = [numbers.randrange(2, VOCAB_SIZE) for _ in range(8)]
    ends = list(range(1, VOCAB_SIZE, every))
    request = Sequence(0, 0, prompt, len(prompt), COUNT, Sampling(0.0), frozenset(ends[:1]), frozenset(ends[1:]))
    group = BeamGroup(request, BeamSearch(width, length_penalty, early_stopping))
    search(engine.scheduler, engine.runner, [group])
    check(
        group, reference, ends, num_beams=width, length_penalty=length_penalty, early_stopping=STOPPING[early_stopping]
    )
    assert engine.scheduler.cache.num_free == engine.scheduler.config.num_blocks


def check(group: BeamGroup, reference: Any, ends: list[int], **options: Any) -> None:
    """Against transformers with the same settings."""
    prompt = group.request.token_ids[: group.request.prompt_len]
    ids = torch.tensor([prompt])
    found = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=VOCAB_SIZE - 1,
        num_return_sequences=options["num_beams"],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    wanted = []
    for tokens in found.sequences[:, len(prompt) :].tolist():
        length = next((at + 1 for at, token in enumerate(tokens) if token in ends), COUNT)
        wanted.append(tokens[:length])
    assert [hypothesis.token_ids for hypothesis in group.hypotheses] == wanted
    scores = [hypothesis.score for hypothesis in group.hypotheses]
    assert scores == pytest.approx(found.sequences_scores.tolist(), rel=1e-4)
    assert group.request.finish == group.hypotheses[0].finish
    assert group.request.num_completion == len(group.hypotheses[0].token_ids)
    for hypothesis in group.hypotheses:
        last = hypothesis.token_ids[-1]
        reason = Reason.EOS if last == ends[0] else Reason.STOP if last in ends else Reason.LENGTH
        assert hypothesis.finish == Finish(reason, None if reason is Reason.LENGTH else last)


def test_edits_and_min_tokens_equal_transformers(engine: Engine, reference: Any) -> None:
    ends = list(range(1, 120, 4))
    words = [(5,), (PROMPT[-1], 9), (2, 3)]
    sampling = Sampling(0.0, repetition_penalty=1.4, bad_words=tuple(words))
    request = Sequence(
        0, 0, PROMPT, len(PROMPT), COUNT, sampling, frozenset(ends[:1]), frozenset(ends[1:]), min_tokens=5
    )
    group = BeamGroup(request, BeamSearch(4))
    search(engine.scheduler, engine.runner, [group])
    given = {"bad_words_ids": [list(word) for word in words], "repetition_penalty": 1.4, "min_new_tokens": 5}
    check(group, reference, ends, num_beams=4, **given)
    assert min(len(hypothesis.token_ids) for hypothesis in group.hypotheses) > 5


def test_one_beam_is_greedy(engine: Engine) -> None:
    plain = Sequence(0, 0, list(PROMPT), len(PROMPT), COUNT, Sampling(0.0))
    engine.run([plain])
    group = BeamGroup(Sequence(0, 0, PROMPT, len(PROMPT), COUNT), BeamSearch(1))
    search(engine.scheduler, engine.runner, [group])
    assert [hypothesis.token_ids for hypothesis in group.hypotheses] == [plain.token_ids[len(PROMPT) :]]


def test_beams_share_their_prefixes_and_groups_do_not_disturb_each_other(engine: Engine) -> None:
    def group() -> BeamGroup:
        return BeamGroup(Sequence(0, 0, PROMPT, len(PROMPT), COUNT), BeamSearch(3))

    alone, first, second = group(), group(), group()
    search(engine.scheduler, engine.runner, [alone])
    search(engine.scheduler, engine.runner, [first, second])
    assert alone.hypotheses == first.hypotheses == second.hypotheses or all(
        [h.token_ids for h in found.hypotheses] == [h.token_ids for h in alone.hypotheses] for found in (first, second)
    )
    assert first.request.num_cached == len(PROMPT) // 16 * 16


def test_diversity_is_subtracted_rank_times_and_only_to_compete() -> None:
    """Two beams whose best continuations are all one beam's, until its lower ranks pay."""

    def step(rate: float) -> list[tuple[int, int]]:
        group = BeamGroup(Sequence(0, 0, [1], 1, 9), BeamSearch(2, diversity_rate=rate))
        beams = give(group, [group.first()], [[(10, -0.1), (11, -0.4), (12, -9.0)]])
        assert [beam.token_ids for beam in beams] == [[1, 10], [1, 11]]
        beams = give(group, beams, [[(20, -0.1), (21, -0.2), (22, -0.3)], [(30, -0.2), (31, -0.5), (32, -0.6)]])
        totals = [group._scores[beam] for beam in beams]
        sums = {(10, 20): -0.2, (10, 21): -0.3, (11, 30): -0.6}
        found = [(beam.token_ids[1], beam.token_ids[2]) for beam in beams]
        assert totals == pytest.approx([sums[path] for path in found])
        return found

    assert step(0.0) == step(0.29) == [(10, 20), (10, 21)]
    assert step(0.31) == [(10, 20), (11, 30)]


def give(group: BeamGroup, beams: list[Sequence], candidates: list[list[tuple[int, float]]]) -> list[Sequence]:
    following: list[Sequence] = []
    for beam, best in zip(list(beams), candidates, strict=True):
        beam.token_ids.append(best[0][0])
        columns = Logprobs([], len(best), [token for token, _ in best], [logprob for _, logprob in best])
        following = group.take(Emitted(beam, best[0][0], Finish(Reason.LENGTH), True, columns))
    return following


def test_a_search_that_may_not_go_on_ends_with_what_it_has() -> None:
    group = BeamGroup(Sequence(0, 0, [1], 1, 9, eos_ids=frozenset({2})), BeamSearch(2))
    beams = give(group, [group.first()], [[(2, -1.0), (10, -2.0), (3, -math.inf)]])
    assert len(beams) == 1
    assert give(group, beams, [[(2, -math.inf), (3, -math.inf), (4, -math.inf)]]) == []
    assert [hypothesis.token_ids for hypothesis in group.hypotheses] == [[2]]
    assert group.request.finish == Finish(Reason.EOS, 2)


class HashRunner:
    """Log-probabilities that are a function of the sequence's own tokens, read from the blocks that hold them."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.memory = [[-1] * config.block_size for _ in range(config.num_blocks)]
        self.results: deque[Sampled] = deque()

    def start(self, batch: Batch) -> None:
        size, tokens, found = self.config.block_size, [], {}
        for item in batch.items:
            blocks = item.sequence.blocks
            for at in range(item.start, item.start + item.count):
                self.memory[blocks[at // size]][at % size] = item.sequence.token_ids[at]
            if item.samples:
                seen = [self.memory[blocks[at // size]][at % size] for at in range(item.start + item.count)]
                digest = hashlib.blake2b(bytes(seen), digest_size=20).digest()
                scores = sorted(((-byte / 50, token) for token, byte in enumerate(digest)), reverse=True)
                best = scores[: item.sequence.candidates] or scores[:1]
                if item.sequence.candidates:
                    columns = Logprobs([], len(best), [token for _, token in best], [score for score, _ in best])
                    found[len(tokens)] = columns
                tokens.append(best[0][1])
        self.results.append(Sampled(tokens, found))

    def finish(self) -> Sampled:
        return self.results.popleft()


prompts = st.lists(st.integers(1, 19), min_size=1, max_size=9)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("search"), prompts, st.integers(1, 6), st.integers(1, 4)),
        st.tuples(st.just("sample"), prompts, st.integers(1, 6), st.integers(-1, 1)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    min_size=5,
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(
    script=actions,
    size=st.sampled_from([1, 2, 4, 40]),
    in_flight=st.integers(1, 3),
    future_tokens=st.booleans(),
    batch=st.integers(1, 5),
)
def test_every_search_finds_what_it_finds_alone_and_every_block_comes_back(
    script: list[Any], size: int, in_flight: int, future_tokens: bool, batch: int
) -> None:
    """Among others, in full queues and tight caches, with other searches cancelled; with any number of batches in flight."""

    def config(**changes: Any) -> SchedulerConfig:
        return SchedulerConfig(-(-16 // size) + 2, size, batch, 12, 40, max_waiting=4, **changes)

    def group_of(action: Any) -> BeamGroup:
        _, prompt, max_tokens, width = action
        request = Sequence(0, 0, list(prompt), len(prompt), max_tokens, Sampling(0.0), frozenset({0}))
        return BeamGroup(request, BeamSearch(width))

    # A runner of this test reads known tokens only, so a sequence with tokens in flight must not be in a batch: sequences of
    # one token never are.
    scheduler = Scheduler(config(max_in_flight=in_flight, future_tokens=future_tokens))
    runner = HashRunner(scheduler.config)
    started: list[tuple[BeamGroup, Any]] = []
    batches: deque[Batch] = deque()

    def step() -> None:
        while found := scheduler.schedule():
            runner.start(found)
            batches.append(found)
        if batches:
            for emitted in scheduler.commit(batches.popleft(), runner.finish()):
                if group := emitted.sequence.group:
                    assert group.request.finish is None, "a search that has ended hears nothing more"
                    for sequence in group.take(emitted):
                        scheduler.go_on(sequence)
        scheduler.check_integrity()

    for action in script:
        full = len(scheduler.running) + scheduler.num_waiting >= batch + 4
        if action[0] == "search" and not full:
            started.append((group_of(action), action))
            scheduler.add(started[-1][0].first())
        elif action[0] == "sample" and not full and not future_tokens:
            scheduler.add(Sequence(0, 0, list(action[1]), len(action[1]), action[2], Sampling(0.0), priority=action[3]))
        elif action[0] == "step":
            for _ in range(action[1]):
                step()
        elif action[0] == "cancel" and started:
            group, _ = started[action[1] % len(started)]
            if group.request.finish is None:
                group.request.finish = Finish(Reason.CANCELLED)
                for member in group.members:
                    scheduler.cancel(member)
            scheduler.check_integrity()
    for _ in range(3000):
        if scheduler.idle:
            break
        step()
    assert scheduler.idle and scheduler.cache.num_free == scheduler.config.num_blocks
    for group, action in started:
        assert group.request.finish is not None
        if group.request.finish.reason is not Reason.CANCELLED:
            alone, fresh = group_of(action), config()
            search(Scheduler(fresh), HashRunner(fresh), [alone])  # type: ignore[arg-type]
            assert group.hypotheses == alone.hypotheses
