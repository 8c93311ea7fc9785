"""Which tokens are computed next. Pure Python: no torch, no clock, no I/O but the log.

`schedule()` gives a batch, `commit()` takes its tokens, in the same order, with up to `max_in_flight` batches between.
Continuous batching with chunked prefill (Orca, Yu et al. 2022; Sarathi-Serve, Agrawal et al. 2024): decodes first, then
prompts in chunks, under a budget of tokens a step. When the cache is full, the lowest in rank gives its blocks back and is
computed again later. Tokens do not depend on any of this: random numbers are counted by position (see sampler.py).
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from engine.errors import Internal, ResourceExhausted
from executor_svc.core import Batch, Emitted, Finish, Reason, Scheduled, SchedulerConfig, Sequence
from executor_svc.deadlines import Deadlines
from executor_svc.kv_cache import KVCache
from executor_svc.pace import Pace
from executor_svc.prefixes import Prefixes
from executor_svc.waiting import Waiting
from protos.logs import fields

log = logging.getLogger(__name__)


class Scheduler:
    """Sequences come by `add` and leave when their end has been emitted, by `cancel`, or when their deadline passes.

    A sequence waits or runs (holding cache blocks). Its blocks are given back when it has ended or was
    preempted AND no batch in flight holds it.

    Args:
        clock: of the deadlines, in seconds.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._deadlines = Deadlines()
        self._expired: list[Sequence] = []  # ended by their deadline, and nobody was told
        self._pace = Pace()
        self.cache = KVCache(config.num_blocks, config.block_size)
        self._prefixes = Prefixes(self.cache, enabled=config.prefix_cache)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._waiting = Waiting()
        self._leaving: list[Sequence] = []  # ended, but held by a batch in flight
        self._in_flight: deque[Batch] = deque()
        self._arrivals = 0
        self._steps = 0
        self._decoded = False  # in the last batch, where batches are not mixed

    @property
    def num_waiting(self) -> int:
        """Sequences that are not admitted."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting and not self._in_flight

    def queued_tokens(self) -> int:
        """Known tokens that are not computed yet."""
        waiting = sum(len(sequence.token_ids) for sequence in self._waiting.sequences)
        return waiting + sum(sequence.num_tokens - sequence.num_computed for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence.

        Raises:
            ResourceExhausted: too many wait (it says when to try again), or the cache could not hold it even alone.
        """
        # Those that have just come and can run at once wait too, until the next batch: so the batch's places count.
        if len(self.running) + len(self._waiting) >= self.config.max_batch_size + self.config.max_waiting:
            raise self._queue_full()
        longest = self._longest(sequence)
        if self.cache.blocks_for(longest) > self.config.num_blocks:
            raise ResourceExhausted(
                f"prompt and completion may need {longest} tokens of KV cache, this executor has "
                f"{self.config.num_blocks * self.config.block_size}: lower max_tokens or start it with more --kv-memory",
                reason="KV_CACHE_TOO_SMALL",
            )
        if self.idle:
            self._pace.restart(self._clock())
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.push(sequence)
        self._deadlines.add(sequence)

    def cancel(self, sequence: Sequence, reason: Reason = Reason.CANCELLED) -> bool:
        """Ends a sequence from outside; False if it had ended already. No token of it is emitted afterwards."""
        if sequence.finish is not None:
            return False
        self._end(sequence, Finish(reason))
        return True

    def schedule(self) -> Batch | None:
        """The next batch, or None if there is nothing that can run now. Nothing whose deadline has passed is in it."""
        for sequence in self._deadlines.passed(self._clock()):
            self._end(sequence, Finish(Reason.DEADLINE))
            self._expired.append(sequence)
        if len(self._in_flight) >= self.config.max_in_flight:
            return None
        items: list[Scheduled] = []
        decodes, prompts = self._ready()
        if self.config.mixed_batches:
            self._schedule_decodes(decodes, items)
            self._schedule_prompts(prompts, items)
        else:  # in turn, so that neither waits for the end of the other
            first, second = (self._schedule_decodes, decodes), (self._schedule_prompts, prompts)
            if self._decoded:
                first, second = second, first
            for schedule, ready in (first, second):
                if not items:
                    schedule(ready, items)
            self._decoded = bool(items) and items[0].sequence in decodes
        if not items:
            return None
        self._steps += 1
        batch = Batch(self._steps, tuple(items))
        self._in_flight.append(batch)
        return batch

    def take_expired(self) -> list[Sequence]:
        """The sequences that `schedule` has ended because their deadline had passed; each of them once."""
        expired, self._expired = self._expired, []
        return expired

    def commit(self, batch: Batch, tokens: list[int]) -> list[Emitted]:
        """Takes the tokens of the oldest batch in flight, one for each item that samples, in order.

        Returns:
            What happened to whom; nothing for sequences that ended meanwhile.
        """
        if not self._in_flight or self._in_flight.popleft() is not batch:
            raise Internal("batches must be committed in the order in which they were scheduled")
        emitted, supply = [], iter(tokens)
        for item in batch.items:
            sequence = item.sequence
            token = next(supply) if item.samples else None
            sequence.in_flight -= 1
            sequence.pending -= item.samples
            if sequence.finish is not None:
                if not sequence.in_flight:
                    self._leaving.remove(sequence)
                    self._release(sequence)
                continue
            self._prefixes.remember(item)
            if token is not None:
                sequence.token_ids.append(token)
                finish = self._finish(sequence, token)
                emitted.append(Emitted(sequence, token, finish, first=not sequence.emitted))
                sequence.emitted = True
                if finish:
                    self._end(sequence, finish)
        return emitted

    def check_integrity(self) -> None:
        """Raises Internal unless the bookkeeping holds together; called by tests after every step and when idle."""
        held = self.running + self._leaving
        self.cache.check_integrity([sequence.blocks for sequence in held])
        for sequence in held:
            if len(sequence.blocks) * self.config.block_size < sequence.num_computed:
                raise Internal("a sequence has computed more tokens than its blocks hold")
            if (
                sequence.num_computed > sequence.num_tokens and sequence.finish is None
            ):  # an ended one gets no more tokens
                raise Internal("a sequence has computed tokens that it does not have")
        waiting = self._waiting.sequences
        if len(waiting) != len(self._waiting) or any(sequence.blocks or sequence.num_computed for sequence in waiting):
            raise Internal("a waiting sequence is miscounted or holds blocks")
        if len(self.running) > self.config.max_batch_size:
            raise Internal("more sequences run than max_batch_size")

    # What follows is the scheduler's own.

    def _queue_full(self) -> ResourceExhausted:
        waiting, limit = len(self._waiting), self.config.max_waiting
        wait = self._pace.wait(waiting, self._clock())
        return ResourceExhausted(
            f"{waiting} requests are waiting and {len(self.running)} run; the limit is {limit} beside the "
            f"{self.config.max_batch_size} that can run (--max-waiting): try again in {wait:.0f} s",
            reason="QUEUE_FULL",
            metadata={"waiting": str(waiting), "max_waiting": str(limit)},
            retry_after=wait,
        )

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that can be in the next batch: those that lack one token, and those that lack more."""
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            if sequence.pending and not self.config.future_tokens:
                continue
            if (
                sequence.num_completion + sequence.pending >= sequence.max_tokens
                or sequence.num_tokens >= self.config.max_seq_len
            ):
                continue  # its last token is in flight
            (decodes if sequence.num_tokens - sequence.num_computed == 1 else prompts).append(sequence)
        return sorted(decodes, key=_rank), sorted(prompts, key=_rank)

    def _schedule_decodes(self, decodes: list[Sequence], items: list[Scheduled]) -> None:
        for sequence in decodes:
            if sequence.blocks and self._grow(sequence):  # a sequence without blocks was preempted just now
                self._take(sequence, 1, items)

    def _schedule_prompts(self, prompts: list[Sequence], items: list[Scheduled]) -> None:
        """Continues prompts, then admits new ones, until the budget is spent."""
        budget = self.config.max_num_tokens - sum(item.count for item in items)
        for sequence in prompts:
            if budget and sequence.blocks:
                budget -= self._take(sequence, budget, items)
        while budget and (admitted := self._admit()):
            budget -= self._take(admitted, budget, items)

    def _take(self, sequence: Sequence, budget: int, items: list[Scheduled]) -> int:
        """Puts as much of a sequence into the batch as the budget allows; the number of tokens."""
        start, left = sequence.num_computed, sequence.num_tokens - sequence.num_computed
        count = min(left, budget)
        items.append(Scheduled(sequence, start, count, samples=count == left))
        sequence.num_computed += count
        sequence.pending += count == left
        sequence.in_flight += 1
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a decoding sequence the block that its next token needs, at the cost of lower ranks; False if it cannot."""
        missing = self.cache.blocks_for(sequence.num_computed + 1) - len(sequence.blocks)
        while missing > 0 and not self.cache.can_allocate(missing):
            victims = [other for other in self.running if not other.in_flight]  # those in this batch count as in flight
            if not victims:
                return False
            victim = max(victims, key=_rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.blocks += self.cache.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        if sequence.track:
            log.debug("preempted", extra=fields(request_id=sequence.track.request_id, tokens=len(sequence.token_ids)))
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self._waiting.push(sequence)

    def _longest(self, sequence: Sequence) -> int:
        """Tokens that it can come to."""
        return min(sequence.prompt_len + sequence.max_tokens, self.config.max_seq_len)

    def _admit(self) -> Sequence | None:
        """The first of those that wait, with blocks for all its tokens, if there is room for it.

        A block is left free for every running sequence that may still need one: it would otherwise be taken from the one
        just admitted.
        """
        sequence = self._waiting.first()
        if sequence is None or len(self.running) >= self.config.max_batch_size:
            return None
        shared = self._prefixes.match(sequence)
        fresh = self.cache.blocks_for(len(sequence.token_ids)) - len(shared)
        growing = sum(len(other.blocks) < self.cache.blocks_for(self._longest(other)) for other in self.running)
        if not self.cache.can_allocate(fresh + growing, shared):
            return None
        self._waiting.pop()
        self.cache.share(shared)
        sequence.blocks = shared + self.cache.allocate(fresh)
        sequence.num_computed = len(shared) * self.config.block_size
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
        self.running.append(sequence)
        return sequence

    def _finish(self, sequence: Sequence, token: int) -> Finish | None:
        if token in sequence.eos_ids:
            return Finish(Reason.EOS, token)
        if token in sequence.stop_ids:
            return Finish(Reason.STOP, token)
        if sequence.num_completion >= sequence.max_tokens or len(sequence.token_ids) >= self.config.max_seq_len:
            return Finish(Reason.LENGTH)
        return None

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        if sequence in self.running:
            self._pace.ended(self._clock())
            self.running.remove(sequence)
            if sequence.in_flight:
                self._leaving.append(sequence)
            else:
                self._release(sequence)
        else:
            self._waiting.ended()

    def _release(self, sequence: Sequence) -> None:
        self.cache.free(sequence.blocks)
        sequence.blocks = []


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
