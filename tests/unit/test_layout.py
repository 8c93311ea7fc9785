"""The tensors of a step, against what the sequences themselves say, under the scheduler's own batches."""

from collections import deque

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ResourceExhausted
from executor_svc.core import Batch, Sampled, Sampling, SchedulerConfig, Sequence
from executor_svc.layout import Layout, StepLayout
from executor_svc.rope_lengths import RopeLengths
from executor_svc.scheduler import Scheduler

SIZE, MAX_SEQ_LEN = 4, 40


def check(batch: Batch, layout: StepLayout, rope: RopeLengths | None) -> None:
    """Every entry, computed the plain way."""
    tokens, positions, slots, last = [], [], [], []
    for item in batch.items:
        for at in range(item.start, item.start + item.count):
            tokens.append(item.sequence.token_ids[at])
            positions.append(at)
            slots.append(item.sequence.blocks[at // SIZE] * SIZE + at % SIZE)
        if item.samples:
            last.append(len(tokens) - 1)
    assert layout.token_ids.tolist() == tokens
    assert layout.positions.tolist() == positions
    owners = [item.sequence for item in batch.items for _ in range(item.count)]
    lengths = [max(owner.rope_length, at + 1) for owner, at in zip(owners, positions, strict=True)]
    assert (layout.rope_lengths.tolist() if layout.rope_lengths is not None else None) == (lengths if rope else None)
    assert layout.slots.tolist() == slots
    assert layout.logit_indices.tolist() == last
    assert layout.query_lens == [item.count for item in batch.items]
    assert layout.context_lens == [item.start + item.count for item in batch.items]
    width = max(-(-length // SIZE) for length in layout.context_lens)
    assert layout.block_tables.shape == (len(batch.items), width)
    for row, item, length in zip(layout.block_tables.tolist(), batch.items, layout.context_lens, strict=True):
        needed = -(-length // SIZE)
        assert row[:needed] == item.sequence.blocks[:needed]
    small = (layout.token_ids, layout.positions, layout.logit_indices, layout.block_tables, layout.rope_lengths)
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in small if tensor is not None)
    assert layout.slots.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    extra_blocks=st.integers(0, 8),
    max_batch_size=st.integers(1, 5),
    budget=st.integers(5, 20),
    rope=st.none() | st.builds(RopeLengths, st.integers(1, 20), st.booleans()),
    script=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 14), st.integers(1, 12), st.integers(-1, 1)),
            st.tuples(st.just("step"), st.integers(1, 6), st.just(0), st.just(0)),
            st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just(0)),
        ),
        min_size=5,
        max_size=50,
    ),
)
def test_it_says_what_the_batch_says_across_chunks_preemption_and_reuse(
    extra_blocks: int,
    max_batch_size: int,
    budget: int,
    rope: RopeLengths | None,
    script: list[tuple[str, int, int, int]],
) -> None:
    config = SchedulerConfig(7 + extra_blocks, SIZE, max_batch_size, budget, MAX_SEQ_LEN, rope=rope)
    scheduler = Scheduler(config)
    layout = Layout(max_batch_size, MAX_SEQ_LEN // SIZE, SIZE, rope_lengths=rope is not None)
    sequences: list[Sequence] = []
    kept: deque[tuple[StepLayout, list[int]]] = deque(maxlen=2)

    def step() -> None:
        if batch := scheduler.schedule():
            laid_out = layout.lay_out(batch)
            check(batch, laid_out, rope)
            kept.append((laid_out, laid_out.block_tables.flatten().tolist()))
            scheduler.commit(batch, Sampled([1 + batch.step % 7 for item in batch.items if item.samples]))
            assert all(earlier.block_tables.flatten().tolist() == was for earlier, was in kept), (
                "an earlier step's changed"
            )

    for action, number, max_tokens, priority in script:
        if action == "add":
            prompt = list(range(1, number + 1))
            sequence = Sequence(0, len(sequences), prompt, number, max_tokens, Sampling(0.0), priority=priority)
            try:
                scheduler.add(sequence)
                sequences.append(sequence)
            except ResourceExhausted:
                continue
        elif action == "step":
            for _ in range(number):
                step()
        elif sequences:
            scheduler.cancel(sequences[number % len(sequences)])
    while not scheduler.idle:
        step()
