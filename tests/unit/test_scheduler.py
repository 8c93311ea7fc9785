"""The scheduler and the KV cache under random work, with an integrity check after every step.

The runner here computes a token as a function of the sequence's own tokens up to there, which it reads only from the blocks
that the scheduler says hold them. So a wrong block, a lost token or a doubled one gives another text than the one expected.
"""

import hashlib
import math
from array import array
from collections import deque
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Internal, ResourceExhausted
from executor_svc.core import Batch, Reason, Sampled, Sampling, SchedulerConfig, Sequence
from executor_svc.kv_cache import KVCache
from executor_svc.pace import Pace
from executor_svc.rope_lengths import RopeLengths
from executor_svc.scheduler import Scheduler
from executor_svc.table_rows import TableRows

VOCAB = 50
EOS = 0


def next_token(cells: list[int]) -> int:
    digest = hashlib.blake2b(array("H", cells).tobytes(), digest_size=2).digest()
    return int.from_bytes(digest, "big") % VOCAB


def cell(config: SchedulerConfig, token: int, length: int) -> int:
    """What a key is, of a token that was computed at this length of its sequence: a number that no other key has."""
    if config.rope is None or length <= config.rope.original:
        return token
    return token + VOCAB * (1 if config.rope.begins_again else length)


class BlockRunner:
    """Keeps tokens in blocks as a real runner keeps keys; a batch in flight sees only what was there when it started."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.memory = [[-1] * config.block_size for _ in range(config.num_blocks)]
        self.results: deque[Sampled] = deque()
        self.unknown: dict[Sequence, list[int]] = {}  # sampled, not committed: what a device would know
        self.sampled: dict[Sequence, Batch] = {}  # the last batch that did
        self.rows = TableRows(config.max_batch_size, lambda *_: None)
        self.last = [-1] * config.max_batch_size  # by row: what a device's next step finds
        self.coming: deque[tuple[int, list[tuple[int, int]]]] = deque()  # steps with what is to be kept of them

    def start(self, batch: Batch) -> None:
        size, tokens = self.config.block_size, []
        assert sum(item.count for item in batch.items) <= self.config.max_num_tokens
        assert len(batch.items) <= self.config.max_batch_size
        while self.coming and self.coming[0][0] < batch.step - batch.apart:
            for row, token in self.coming.popleft()[1]:
                self.last[row] = token
        kept = []
        for item, row in zip(batch.items, self.rows.of(batch), strict=True):
            sequence = item.sequence
            assert item.count > 0
            assert item.start + item.count < sequence.prompt_len + sequence.max_tokens, "its last token is no input"
            unknown = self.unknown.get(sequence, [])
            assert self.config.future_tokens or not unknown, "its last token is not known yet"
            known = sequence.token_ids + unknown
            if len(sequence.token_ids) < item.start + item.count:
                assert self.config.places == 1 or self.sampled[sequence].drawn, "the host has its last token"
                assert self.last[row] == known[-1], "another sequence's token, or an older one"
            for at in range(item.start, item.start + item.count):
                key = cell(self.config, known[at], max(sequence.rope_length, at + 1))
                self.memory[sequence.blocks[at // size]][at % size] = key
            if item.samples:
                end = item.start + item.count
                seen = [self.memory[sequence.blocks[at // size]][at % size] for at in range(end)]
                token = next_token(seen)
                self.unknown.setdefault(sequence, []).append(token)
                self.sampled[sequence] = batch
                kept.append((row, token))
                tokens.append(token)
        self.coming.append((batch.step, kept))
        self.results.append(Sampled(tokens))

    def finish(self, batch: Batch) -> Sampled:
        for item in batch.items:
            if item.samples:
                self.unknown[item.sequence].pop(0)
        return self.results.popleft()


def expected(prompt: list[int], max_tokens: int, config: SchedulerConfig) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and len(tokens) < config.max_seq_len:
        again = config.rope and config.rope.begins_again
        lengths = [len(tokens) if again else max(len(prompt), at + 1) for at in range(len(tokens))]
        tokens.append(next_token([cell(config, token, length) for token, length in zip(tokens, lengths, strict=True)]))
        if tokens[-1] == EOS:
            break
    return tokens


@st.composite
def tight_configs(draw: st.DrawFn) -> SchedulerConfig:
    """A cache that holds the longest sequence of these tests (24 tokens) and little more, so that preemption is common."""
    block_size = draw(st.sampled_from([1, 2, 4, 40]))  # 40: slots, a block is a whole sequence
    return SchedulerConfig(
        num_blocks=-(-24 // block_size) + draw(st.integers(0, 6)),
        block_size=block_size,
        max_batch_size=draw(st.integers(1, 6)),
        max_num_tokens=draw(st.integers(6, 20)),
        max_seq_len=40,
        max_in_flight=draw(st.integers(1, 4)),
        places=draw(st.integers(1, 3)),
        future_tokens=draw(st.booleans()),
        mixed_batches=draw(st.booleans()),
        prefix_cache=draw(st.booleans()),
        rope=draw(st.none() | st.builds(RopeLengths, st.integers(1, 23), st.booleans())),
    )


prompts = st.one_of(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12),
    st.integers(1, 12).map(lambda count: [7, 7, 8, 9, 7, 7, 8, 9, 7, 7, 8, 9][:count]),  # shared prefixes
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), prompts, st.integers(1, 12), st.integers(-1, 1), st.booleans()),
        st.tuples(st.just("add"), prompts, st.integers(8, 12), st.integers(-1, 1), st.just(False)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=250, deadline=None)
@given(config=tight_configs(), script=actions)
def test_every_sequence_gets_its_own_text_and_every_block_comes_back(config: SchedulerConfig, script: list) -> None:
    scheduler, runner = Scheduler(config), BlockRunner(config)
    in_flight: deque[Batch] = deque()
    sequences: list[tuple[Sequence, list[int]]] = []
    heard: dict[Sequence, list[int]] = {}
    finishes: dict[Sequence, int] = {}

    def commit() -> None:
        batch = in_flight.popleft()
        for emitted in scheduler.commit(batch, runner.finish(batch)):
            assert emitted.sequence not in finishes, "a token after the end"
            assert emitted.first == (emitted.sequence not in heard)
            heard.setdefault(emitted.sequence, []).append(emitted.token_id)
            if emitted.finish:
                finishes[emitted.sequence] = 1
        scheduler.check_integrity()

    def step() -> None:
        while batch := scheduler.schedule():
            assert batch.items
            runner.start(batch)
            in_flight.append(batch)
            scheduler.check_integrity()
        if in_flight:
            commit()

    for action in script:
        if action[0] == "add":
            _, prompt, max_tokens, priority, edited = action
            sequence = Sequence(
                0,
                len(sequences),
                list(prompt),
                len(prompt),
                max_tokens,
                Sampling(0.0, logit_bias=((1, 0.0),) if edited else ()),
                frozenset({EOS}),
                priority=priority,
            )
            try:
                scheduler.add(sequence)
            except ResourceExhausted:
                assert -(-(len(prompt) + max_tokens) // config.block_size) > config.num_blocks
                continue
            sequences.append((sequence, expected(prompt, max_tokens, config)))
        elif action[0] == "step":
            for _ in range(action[1]):
                step()
        elif sequences:
            sequence, _ = sequences[action[1] % len(sequences)]
            ended = sequence.finish is not None
            assert scheduler.cancel(sequence) is not ended
            if not ended:
                finishes[sequence] = 1
                assert sequence.finish is not None and sequence.finish.reason is Reason.CANCELLED
        scheduler.check_integrity()
    for _ in range(3000):
        if scheduler.idle:
            break
        step()
    assert scheduler.idle, "the scheduler does not come to an end"
    assert scheduler.cache.num_free == config.num_blocks
    assert not scheduler.running and not scheduler.num_waiting
    for sequence, text in sequences:
        assert finishes.get(sequence) == 1
        told = sequence.token_ids[: sequence.prompt_len] + heard.get(sequence, [])
        assert sequence.finish is not None
        if sequence.finish.reason is Reason.CANCELLED:
            assert told == text[: len(told)]
        else:
            assert told == text


def run_all(scheduler: Scheduler, runner: BlockRunner) -> None:
    while not scheduler.idle:
        batch = scheduler.schedule()
        assert batch is not None
        runner.start(batch)
        scheduler.commit(batch, runner.finish(batch))
        scheduler.check_integrity()


def run_ahead(scheduler: Scheduler, runner: BlockRunner) -> tuple[list[int], int]:
    """As the worker does; the batches' sizes, and how many were in flight at most."""
    in_flight, sizes, most = deque[Batch](), [], 0
    while not scheduler.idle:
        while batch := scheduler.schedule():
            runner.start(batch)
            in_flight.append(batch)
            sizes.append(len(batch.items))
        most = max(most, len(in_flight))
        first = in_flight.popleft()
        scheduler.commit(first, runner.finish(first))
    return sizes, most


def config_of(**changes: int | bool) -> SchedulerConfig:
    defaults = {"num_blocks": 64, "block_size": 4, "max_batch_size": 8, "max_num_tokens": 16, "max_seq_len": 64}
    return SchedulerConfig(**{**defaults, **changes})  # type: ignore[arg-type]


def sequence_of(prompt: list[int], max_tokens: int = 4, **changes) -> Sequence:  # type: ignore[no-untyped-def]
    return Sequence(0, 0, list(prompt), len(prompt), max_tokens, Sampling(0.0), **changes)


def test_decodes_go_on_beside_a_long_prompt_in_chunks() -> None:
    scheduler, runner = Scheduler(config_of(max_num_tokens=8)), BlockRunner(config_of())
    short, long = sequence_of([1, 2, 3], 10), sequence_of(list(range(1, 31)), 2)
    scheduler.add(short)
    first = scheduler.schedule()
    assert first is not None
    runner.start(first)
    scheduler.commit(first, runner.finish(first))
    scheduler.add(long)
    counts = []
    for _ in range(5):
        batch = scheduler.schedule()
        assert batch is not None
        counts.append([(item.sequence is short, item.count, item.samples) for item in batch.items])
        runner.start(batch)
        scheduler.commit(batch, runner.finish(batch))
    assert counts[0] == [(True, 1, True), (False, 7, False)]
    assert counts[4] == [(True, 1, True), (False, 2, True)]  # 30 = 4 * 7 + 2


def test_a_repeated_prompt_is_found_in_the_cache_and_another_tenants_is_not() -> None:
    scheduler, runner = Scheduler(config_of()), BlockRunner(config_of())
    prompt = list(range(1, 14))
    first, again, foreign = sequence_of(prompt), sequence_of(prompt), sequence_of(prompt, salt=b"other")
    for sequence in (first, again, foreign):
        scheduler.add(sequence)
        run_all(scheduler, runner)
    assert (first.num_cached, again.num_cached, foreign.num_cached) == (0, 12, 0)
    assert first.token_ids == again.token_ids == foreign.token_ids


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    scheduler, runner = Scheduler(config_of()), BlockRunner(config_of())
    prompt = list(range(1, 9))
    for cached in (0, 4):  # 8 tokens fill two blocks; the second is computed again for its last row
        sequence = sequence_of(prompt)
        scheduler.add(sequence)
        run_all(scheduler, runner)
        assert sequence.num_cached == cached


def test_the_lowest_rank_is_preempted_and_ends_with_the_same_text() -> None:
    config = config_of(num_blocks=8, max_num_tokens=32)
    scheduler, runner = Scheduler(config), BlockRunner(config)
    low, high = sequence_of(list(range(1, 9)), 20), sequence_of(list(range(2, 8)), 20, priority=1)
    scheduler.add(low)
    scheduler.add(high)
    run_all(scheduler, runner)
    assert scheduler.num_preemptions > 0
    for sequence, prompt in ((low, list(range(1, 9))), (high, list(range(2, 8)))):
        assert sequence.token_ids == [*prompt, *expected_without_eos(prompt, 20)]


def test_a_prompt_that_would_take_the_last_blocks_waits_instead_of_being_preempted_at_once() -> None:
    config = config_of(num_blocks=5)
    scheduler, runner = Scheduler(config), BlockRunner(config)
    scheduler.add(sequence_of([1, 2, 3, 4], 5))  # grows to three blocks
    scheduler.add(sequence_of(list(range(1, 15)), 1))  # needs four
    run_all(scheduler, runner)
    assert scheduler.num_preemptions == 0


def expected_without_eos(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def test_every_slot_is_used() -> None:
    """A block as long as a sequence: none has to be left free for growth."""
    scheduler = Scheduler(config_of(num_blocks=8, block_size=64, prefix_cache=False))
    for _ in range(9):
        scheduler.add(sequence_of([1], 8))
    assert scheduler.schedule() is not None
    assert (len(scheduler.running), scheduler.num_waiting) == (8, 1)


def test_where_batches_are_not_mixed_neither_kind_waits_for_the_end_of_the_other() -> None:
    config = config_of(mixed_batches=False)
    scheduler, runner = Scheduler(config), BlockRunner(config)
    scheduler.add(sequence_of([3, 2, 1], 20))
    kinds = []
    for number in range(12):
        scheduler.add(sequence_of([number + 1, 2, 3, 4, 5], 1))
        batch = scheduler.schedule()
        assert batch is not None
        kinds.append({item.count == 1 for item in batch.items})
        runner.start(batch)
        scheduler.commit(batch, runner.finish(batch))
    assert kinds == [{False}, *[{True}, {False}] * 5, {True}] or kinds == [{False}, {False}, *[{True}, {False}] * 5]


def test_higher_priority_is_admitted_first() -> None:
    scheduler = Scheduler(config_of(max_batch_size=1))
    low, high = sequence_of([1]), sequence_of([2], priority=5)
    scheduler.add(low)
    scheduler.add(high)
    batch = scheduler.schedule()
    assert batch is not None and [item.sequence for item in batch.items] == [high]


def test_what_can_never_fit_and_what_is_too_much_is_refused() -> None:
    scheduler = Scheduler(config_of(num_blocks=4, max_seq_len=100))
    with pytest.raises(ResourceExhausted, match="32 tokens of KV cache, this executor has 16"):
        scheduler.add(sequence_of([1, 2], 30))


@pytest.mark.parametrize("max_waiting", [0, 3])
def test_as_many_wait_as_are_allowed_beside_those_that_can_run(max_waiting: int) -> None:
    """Those that come at once, before the next batch, find the places of the batch free."""
    config = config_of(max_batch_size=2, max_waiting=max_waiting)
    scheduler = Scheduler(config)
    for number in range(2 + max_waiting):
        scheduler.add(sequence_of([number + 1]))
    for running in (0, 2):
        with pytest.raises(ResourceExhausted) as caught:
            scheduler.add(sequence_of([9]))
        assert caught.value.reason == "QUEUE_FULL"
        waiting = 2 + max_waiting - running
        assert f"{waiting} requests are waiting and {running} run; the limit is {max_waiting}" in caught.value.message
        assert scheduler.schedule() is not None or running


def test_a_refusal_says_when_those_that_wait_will_have_run() -> None:
    """At the pace at which requests have ended since the engine was idle; a second while none has."""
    now = 1000.0
    config = config_of(max_batch_size=2, max_waiting=4)
    scheduler, runner = Scheduler(config, clock=lambda: now), BlockRunner(config)

    def refused() -> float | None:
        while True:
            try:
                scheduler.add(sequence_of([1, 2], 1))
            except ResourceExhausted as error:
                assert f"try again in {error.retry_after:.0f} s" in error.message
                return error.retry_after

    def step(seconds: float) -> None:
        nonlocal now
        batch = scheduler.schedule()
        assert batch is not None
        runner.start(batch)
        now += seconds
        scheduler.commit(batch, runner.finish(batch))

    assert refused() == 1
    step(5)  # two of six have ended
    assert refused() == 5 / 2 * 6
    step(1)
    assert refused() == (5 + 1) / 4 * 6
    while not scheduler.idle:
        step(0.001)
    now += 3600  # idle: this says nothing about the pace
    assert refused() == 1
    step(100)
    assert refused() == 60


def test_the_pace_is_that_of_the_newest_ends() -> None:
    pace = Pace()
    pace.restart(0.0)
    assert pace.wait(100, 50.0) == 1
    for second in range(1, 101):
        pace.ended(float(second))  # one a second
    for tenth in range(1, 101):
        pace.ended(100 + tenth / 10)  # ten a second
    assert pace.wait(100, 110.0) == pytest.approx(10)
    assert pace.wait(1, 110.0) == 1


@settings(max_examples=200, deadline=None)
@given(
    config=tight_configs(),
    script=st.lists(
        st.one_of(
            st.tuples(st.just("add"), prompts, st.integers(1, 12), st.none() | st.integers(-2, 20)),
            st.tuples(st.just("step"), st.integers(0, 4)),
        ),
        min_size=5,
        max_size=60,
    ),
)
def test_nothing_whose_deadline_has_passed_is_ever_computed(config: SchedulerConfig, script: list) -> None:
    """Time goes on by whole units between any two calls; some are added when their deadline has passed already."""
    now = 100.0
    scheduler, runner = Scheduler(config, clock=lambda: now), BlockRunner(config)
    in_flight: deque[Batch] = deque()
    sequences: list[Sequence] = []
    expired: list[Sequence] = []

    def step(units: int) -> None:
        nonlocal now
        while batch := scheduler.schedule():
            for item in batch.items:
                assert item.sequence.deadline is None or item.sequence.deadline > now, "computed after its deadline"
            runner.start(batch)
            in_flight.append(batch)
            now += units
        expired.extend(scheduler.take_expired())
        if in_flight:
            batch = in_flight.popleft()
            scheduler.commit(batch, runner.finish(batch))
        scheduler.check_integrity()

    for action in script:
        if action[0] == "add":
            _, prompt, max_tokens, left = action
            sequence = sequence_of(prompt, max_tokens, deadline=None if left is None else now + left)
            with suppress(ResourceExhausted):
                scheduler.add(sequence)
                sequences.append(sequence)
        else:
            step(action[1])
    for _ in range(3000):
        if scheduler.idle:
            break
        step(0)
    assert scheduler.idle and scheduler.cache.num_free == config.num_blocks
    assert len(expired) == len(set(expired)), "told twice"
    assert set(expired) == {item for item in sequences if item.finish and item.finish.reason is Reason.DEADLINE}
    assert all(item.deadline is not None and item.deadline <= now for item in expired)


def test_a_deadline_that_passes_with_every_batch_in_flight() -> None:
    """The tokens that are being sampled for it are never known; the bookkeeping holds until the last batch is back."""
    now = 0.0
    config = config_of(max_in_flight=3, future_tokens=True)
    scheduler, runner = Scheduler(config, clock=lambda: now), BlockRunner(config)
    sequence = sequence_of([7], 9, deadline=1.0)
    scheduler.add(sequence)
    batches = []
    while batch := scheduler.schedule():
        runner.start(batch)
        batches.append(batch)
    assert len(batches) == 3
    now = 1.0
    assert scheduler.schedule() is None and scheduler.take_expired() == [sequence]
    for batch in batches:
        assert scheduler.commit(batch, runner.finish(batch)) == []
        scheduler.check_integrity()
    assert scheduler.idle and scheduler.cache.num_free == config.num_blocks and scheduler.take_expired() == []


def test_ended_sequences_do_not_pile_up_until_their_deadlines() -> None:
    scheduler, runner = Scheduler(config_of()), BlockRunner(config_of())
    kept = sequence_of([1], 1, deadline=math.inf, serial=-1)
    scheduler._deadlines.add(kept)
    for _ in range(300):
        scheduler.add(sequence_of([1, 2], 1, deadline=math.inf))
        run_all(scheduler, runner)
    entries = [entry[2] for entry in scheduler._deadlines._heap]
    assert len(entries) <= 67 and kept in entries


def test_commits_out_of_order_are_refused() -> None:
    scheduler = Scheduler(config_of(max_in_flight=2))
    scheduler.add(sequence_of([1]))
    first = scheduler.schedule()
    scheduler.add(sequence_of([2]))
    second = scheduler.schedule()
    assert first is not None and second is not None
    with pytest.raises(Internal, match="in the order"):
        scheduler.commit(second, Sampled([1]))


@pytest.mark.parametrize(("at_once", "future"), [(2, False), (3, True)])
def test_places_share_the_decodes(at_once: int, future: bool) -> None:
    """So that every place of a pipeline has work, and where tokens stay on the devices the first has its next already."""
    config = config_of(max_in_flight=at_once, places=2, future_tokens=future)
    scheduler, runner = Scheduler(config), BlockRunner(config)
    for number in range(5):
        scheduler.add(sequence_of([number + 1, 2], 6))
    sizes, most = run_ahead(scheduler, runner)
    assert sizes == [5, *[2, 3] * 5] and most == at_once


@pytest.mark.parametrize("places", [2, 3])
def test_nobody_gets_the_row_of_a_token_that_the_device_alone_knows(places: int) -> None:
    """Where sequences end by themselves, and others come in their place."""
    config = config_of(max_in_flight=places + 1, places=places, future_tokens=True, max_batch_size=4)
    scheduler = Scheduler(config)
    for number in range(100):
        scheduler.add(sequence_of([number % (VOCAB - 1) + 1, number % 7 + 1], 20, eos_ids=frozenset({EOS, 1, 2})))
    run_ahead(scheduler, BlockRunner(config))


def test_tokens_that_are_chosen_on_the_host_are_waited_for() -> None:
    """In a pipeline, where the first place does not have them before."""
    config = config_of(max_in_flight=3, places=2, future_tokens=True)
    scheduler, runner = Scheduler(config), BlockRunner(config)
    for number, edited in enumerate([False, True]):
        sampling = Sampling(0, logit_bias=((1, 0.0),) if edited else ())
        scheduler.add(Sequence(0, number, [1, 2], 2, 6, sampling))
    batches = []
    for _ in range(2):
        batch = scheduler.schedule()
        assert batch is not None
        runner.start(batch)
        batches.append(batch)
        if len(batches) == 1:
            scheduler.commit(batch, runner.finish(batch))
    third = scheduler.schedule()
    assert third is not None and [batch.drawn for batch in (*batches, third)] == [False, True, False]
    runner.start(third)
    fourth = scheduler.schedule()
    assert fourth is not None and fourth.items[0].sequence is batches[1].items[0].sequence and len(fourth.items) == 1
    runner.start(fourth)
    scheduler.commit(batches[1], runner.finish(batches[1]))
    assert scheduler.schedule() is None


def test_a_sequence_alone_need_not_wait_for_the_host() -> None:
    """In a pipeline a step of it is queued behind the one before, but no more, so that a newcomer's comes soon."""
    config = config_of(max_in_flight=3, places=2, future_tokens=True)
    scheduler, runner = Scheduler(config), BlockRunner(config)
    scheduler.add(sequence_of([1, 2], 6))
    for _ in range(2):
        batch = scheduler.schedule()
        assert batch is not None
        runner.start(batch)
    assert scheduler.schedule() is None
    scheduler.add(sequence_of([3, 4], 6))
    batch = scheduler.schedule()
    assert batch is not None and [item.sequence.token_ids for item in batch.items] == [[3, 4]]
    assert batch.apart == 3  # it takes nothing of what is sampled


def test_integrity_check_sees_a_lost_and_a_stolen_block() -> None:
    cache = KVCache(4, 2)
    blocks = cache.allocate(2)
    cache.check_integrity([blocks])
    with pytest.raises(Internal, match="reference counts"):
        cache.check_integrity([])
    with pytest.raises(Internal, match="reference counts"):
        cache.check_integrity([blocks, blocks])
    with pytest.raises(Internal, match="wanted"):
        cache.allocate(3)


def test_unused_content_is_forgotten_longest_unused_first_and_ends_before_beginnings() -> None:
    cache = KVCache(3, 2)
    blocks = cache.allocate(3)
    digests = [bytes([number]) * 16 for number in range(3)]
    for block, digest in zip(blocks, digests, strict=True):
        cache.remember(block, digest)
    cache.free(blocks)
    assert cache.match(digests) == blocks
    cache.allocate(1)
    assert cache.match(digests) == blocks[:2]
