"""Which tokens are computed next. Pure Python: no torch, no clock, no I/O but the log.

`schedule()` gives a batch, `commit()` takes its tokens, in the same order, with up to `max_in_flight` batches between.
Continuous batching with chunked prefill (Orca, Yu et al. 2022; Sarathi-Serve, Agrawal et al. 2024): decodes first, then
prompts in chunks, under a budget of tokens a step. When the cache is full, the lowest in rank gives its blocks back and is
computed again later; so does a sequence that grows to where all its keys are rotated differently (`RopeLengths`). Tokens do not
depend on any of this: random numbers are counted by position (see sampler.py).
"""

import bisect
import logging
import math
import time
from collections import deque
from collections.abc import Callable

from engine.errors import Internal, ResourceExhausted
from executor_svc.core import (
    Batch,
    Emitted,
    Finish,
    PromptTold,
    Reason,
    Sampled,
    Scheduled,
    SchedulerConfig,
    Sequence,
)
from executor_svc.deadlines import Deadlines
from executor_svc.kv_cache import KVCache
from executor_svc.pace import Pace
from executor_svc.prefixes import Prefixes
from executor_svc.prompt_rows import prompt_rows
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
        rope = config.rope
        self._switch = rope.original if rope and rope.begins_again else math.inf  # tokens beyond which keys are others
        self.running: list[Sequence] = []  # by rank
        self._growing = 0  # of those that run: they may need more blocks than they have
        self._queued = 0  # known tokens that are not computed yet
        self.num_preemptions = 0
        self._waiting = Waiting()
        self._leaving: list[Sequence] = []  # ended, but held by a batch in flight
        self._in_flight: deque[Batch] = deque()
        self._arrivals = 0
        self._told: list[PromptTold] = []  # and nobody has taken it
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
        return self._queued

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence.

        Raises:
            ResourceExhausted: too many wait (it says when to try again), or the cache could not hold it even alone.
        """
        # Those that have just come and can run at once wait too, until the next batch: so the batch's places count.
        if len(self.running) + len(self._waiting) >= self.config.max_batch_size + self.config.max_waiting:
            raise self._queue_full()
        self.check_size(sequence)
        if self.idle:
            self._pace.restart(self._clock())
        sequence.arrival = self._arrivals
        self._queue(sequence)

    def check_size(self, sequence: Sequence) -> None:
        """Notes what a sequence can come to. Raises ResourceExhausted for one that the cache could not hold even alone."""
        most_tokens = min(sequence.prompt_len + sequence.max_tokens, self.config.max_seq_len)
        sequence.most_tokens, sequence.most_blocks = most_tokens, self.cache.blocks_for(most_tokens)
        if sequence.most_blocks > self.config.num_blocks:
            raise ResourceExhausted(
                f"prompt and completion may need {most_tokens} tokens of KV cache, this executor has "
                f"{self.config.num_blocks * self.config.block_size}: lower max_tokens or start it with more --kv-memory",
                reason="KV_CACHE_TOO_SMALL",
            )

    def go_on(self, sequence: Sequence) -> None:
        """Queues the next step of a group whose first sequence was added, at the place of its `arrival`, in a full queue too."""
        self.check_size(sequence)
        self._queue(sequence)

    def group_ended(self) -> None:
        """To be called when a group has run to its end: it counts as one request in the pace."""
        self._pace.ended(self._clock())

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
        # In a pipeline other places compute the steps before meanwhile. What takes nothing of theirs comes first; what does is
        # queued, but no more of it than one step beyond what is computed at once: newcomers would wait behind it.
        for apart in range(self.config.places - 1, -1, -1):
            if len(self._in_flight) > apart + self.config.max_in_flight - self.config.places:
                break
            self._choose(items, apart)
            if items:
                break
        if not items:
            return None
        self._steps += 1
        batch = Batch(self._steps, tuple(items), self._apart(items))
        if self.config.places > 1:
            sampled_by = batch.step if batch.drawn else math.inf
            for item in items:
                item.sequence.sampled_by = sampled_by
        self._in_flight.append(batch)
        return batch

    def take_expired(self) -> list[Sequence]:
        """The sequences that `schedule` has ended because their deadline had passed; each of them once."""
        expired, self._expired = self._expired, []
        return expired

    def take_prompt_logprobs(self) -> list[PromptTold]:
        """What `commit` has learnt of prompts since the last call; to be told before the tokens that it gave."""
        told, self._told = self._told, []
        return told

    def commit(self, batch: Batch, sampled: Sampled) -> list[Emitted]:
        """Takes what was sampled of the oldest batch in flight.

        Returns:
            What happened to whom; nothing for sequences that ended meanwhile.
        """
        if not self._in_flight or self._in_flight.popleft() is not batch:
            raise Internal("batches must be committed in the order in which they were scheduled")
        emitted: list[Emitted] = []
        supply, block_size = enumerate(sampled.token_ids), self.config.block_size
        for index, item in enumerate(batch.items):
            sequence, start, count, samples, rows = item
            row, token = next(supply) if samples else (-1, None)
            sequence.in_flight -= 1
            sequence.pending -= samples
            if sequence.finish is not None:
                if not sequence.in_flight:
                    self._leaving.remove(sequence)
                    self._release(sequence)
                continue
            if start // block_size != (start + count) // block_size:
                self._prefixes.remember(item)
            if rows:
                self._told.append(PromptTold(sequence, rows.start + 1, sampled.prompt_logprobs[index]))
            if token is not None:
                token_ids = sequence.token_ids
                token_ids.append(token)
                finish, guide = None, sequence.guide
                complete = guide is not None and guide.accept(token)
                if (
                    complete
                    or len(token_ids) >= sequence.most_tokens
                    or token in sequence.eos_ids
                    or token in sequence.stop_ids
                ):
                    finish = self._finish(sequence, token, complete)
                    self._end(sequence, finish)
                emitted.append(Emitted(sequence, token, finish, not sequence.emitted, sampled.logprobs.get(row)))
                sequence.emitted = True
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
            if not sequence.rope_length and sequence.num_computed > self._switch:
                raise Internal("a sequence has outgrown the rotary frequencies of its keys")
        waiting = self._waiting.sequences
        if len(waiting) != len(self._waiting) or any(sequence.blocks or sequence.num_computed for sequence in waiting):
            raise Internal("a waiting sequence is miscounted or holds blocks")
        queued = sum(len(sequence.token_ids) for sequence in waiting)
        queued += sum(sequence.num_tokens - sequence.num_computed for sequence in self.running)
        growing = sum(len(sequence.blocks) < sequence.most_blocks for sequence in self.running)
        if (queued, growing) != (self._queued, self._growing):
            raise Internal(
                f"{queued} tokens are queued and {growing} sequences may grow, {self._queued} and {self._growing} are counted"
            )
        if self.running != sorted(self.running, key=_rank):
            raise Internal("those that run are out of order")
        if len(self.running) > self.config.max_batch_size:
            raise Internal("more sequences run than max_batch_size")

    # What follows is the scheduler's own.

    def _queue(self, sequence: Sequence) -> None:
        sequence.serial = self._arrivals
        self._arrivals += 1
        self._wait(sequence)
        self._deadlines.add(sequence)

    def _wait(self, sequence: Sequence) -> None:
        """Lets a sequence wait of which nothing is computed."""
        if self.config.rope:
            rope_length = self.config.rope.least(sequence.prompt_len, len(sequence.token_ids))
            if rope_length != sequence.rope_length:
                sequence.rope_length, sequence.hashes = rope_length, []
        self._queued += len(sequence.token_ids)
        self._waiting.push(sequence)

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

    def _choose(self, items: list[Scheduled], apart: int) -> None:
        """Fills the next batch, of what takes nothing that so many steps before it sample."""
        decodes, prompts = self._ready(self._steps - apart)
        if self._switch < math.inf:
            decodes = self._begin_grown_again(decodes)
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

    def _apart(self, items: list[Scheduled]) -> int:
        """So many steps before the newest sample nothing that its items take."""
        if self.config.places == 1:
            return 0
        apart: float = self.config.max_in_flight
        for sequence, start, count, _, _ in items:
            if start + count > len(sequence.token_ids):
                apart = min(apart, self._steps - 1 - sequence.sampled_by)
        return int(apart)

    def _ready(self, step: int) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that can be in the next batch, by rank: those that lack one token, and those that lack more.

        Their other tokens are known, or sampled up to a step.
        """
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        future = self.config.future_tokens
        for sequence in self.running:
            pending = sequence.pending
            if pending and (not future or sequence.needs_tokens or sequence.sampled_by > step):
                continue
            num_tokens = len(sequence.token_ids) + pending
            if num_tokens >= sequence.most_tokens:
                continue  # its last token is in flight
            (decodes if num_tokens - sequence.num_computed == 1 else prompts).append(sequence)
        return decodes, prompts

    def _begin_grown_again(self, decodes: list[Sequence]) -> list[Sequence]:
        """Those that may go on. Those that outgrow their keys begin again, as soon as their last token is known."""
        stay = []
        for sequence in decodes:
            if sequence.num_computed < self._switch or sequence.rope_length:
                stay.append(sequence)
            elif not sequence.in_flight:
                self._begin_again(sequence)
        return stay

    def _schedule_decodes(self, decodes: list[Sequence], items: list[Scheduled]) -> None:
        block_size = self.config.block_size
        places = self.config.places  # each has its share, which differ by one at most
        decodes = decodes[: max(1, (len(self.running) + places - 1 - self._steps % places) // places)]
        for sequence in decodes:
            start, room = sequence.num_computed, len(sequence.blocks) * block_size
            # A sequence without blocks was preempted just now.
            if start < room or (room and self._grow(sequence)):
                items.append(Scheduled(sequence, start, 1, True))
                sequence.num_computed = start + 1
                sequence.pending += 1
                sequence.in_flight += 1

    def _schedule_prompts(self, prompts: list[Sequence], items: list[Scheduled]) -> None:
        """Continues prompts, then admits new ones, until the budget is spent."""
        budget = self.config.max_num_tokens - len(items)  # so far they are decodes
        for sequence in prompts:
            if budget and sequence.blocks:
                budget -= self._take(sequence, budget, items)
        while budget and (admitted := self._admit()):
            budget -= self._take(admitted, budget, items)

    def _take(self, sequence: Sequence, budget: int, items: list[Scheduled]) -> int:
        """Puts as much of a sequence into the batch as the budget allows; the number of tokens."""
        start, left = sequence.num_computed, sequence.num_tokens - sequence.num_computed
        count, rows = min(left, budget), range(0)
        if sequence.tells_prompt:
            rows = prompt_rows(sequence, count, items)
            if rows.stop < sequence.prompt_len - 1:
                count = min(count, rows.stop - start)
            if not count:
                return 0
            sequence.prompt_told = rows.stop
        self._queued -= count - (count == left)
        items.append(Scheduled(sequence, start, count, count == left, rows))
        sequence.num_computed += count
        sequence.pending += count == left
        sequence.in_flight += 1
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a decoding sequence the block that its next token needs, at the cost of lower ranks; False if it cannot."""
        while not self.cache.can_allocate(1):
            victims = [other for other in self.running if not other.in_flight]  # those in this batch count as in flight
            if not victims:
                return False
            victim = victims[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.cache.allocate(1)
        self._growing -= len(sequence.blocks) == sequence.most_blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        if sequence.track:
            log.debug("preempted", extra=fields(request_id=sequence.track.request_id, tokens=len(sequence.token_ids)))
        self._begin_again(sequence)

    def _begin_again(self, sequence: Sequence) -> None:
        """Takes a sequence that no batch in flight holds back to those that wait, at its old place, without its keys."""
        self._leave(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self._wait(sequence)

    def _admit(self) -> Sequence | None:
        """The first of those that wait, with blocks for all its tokens, if there is room for it.

        A block is left free for every running sequence that may still need one: it would otherwise be taken from the one
        just admitted.
        """
        sequence = self._waiting.first()
        if sequence is None or len(self.running) >= self.config.max_batch_size:
            return None
        if not self.cache.can_allocate(1 + self._growing):  # it needs one at least: spares the look for its prefix
            return None
        shared = [] if sequence.tells_prompt else self._prefixes.match(sequence)
        fresh = self.cache.blocks_for(len(sequence.token_ids)) - len(shared)
        if not self.cache.can_allocate(fresh + self._growing, shared):
            return None
        self._waiting.pop()
        self.cache.share(shared)
        sequence.blocks = shared + self.cache.allocate(fresh)
        sequence.num_computed = len(shared) * self.config.block_size
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
        self._queued -= sequence.num_computed
        self._growing += len(sequence.blocks) < sequence.most_blocks
        bisect.insort(self.running, sequence, key=_rank)
        return sequence

    def _finish(self, sequence: Sequence, token: int, complete: bool) -> Finish:
        """Why a sequence ends with this token, which may make it all that it was to be."""
        if complete and sequence.guide.error is not None:
            return Finish(Reason.ERROR)
        if token in sequence.eos_ids:
            return Finish(Reason.EOS, token)
        if token in sequence.stop_ids:
            return Finish(Reason.STOP, token)
        return Finish(Reason.STOP if complete else Reason.LENGTH)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        if sequence.blocks:  # it runs
            if sequence.group is None:
                self._pace.ended(self._clock())
            self._leave(sequence)
            if sequence.in_flight:
                self._leaving.append(sequence)
            else:
                self._release(sequence)
        else:
            self._queued -= len(sequence.token_ids)
            self._waiting.ended()

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of those that run."""
        self.running.remove(sequence)
        self._queued -= sequence.num_tokens - sequence.num_computed
        self._growing -= len(sequence.blocks) < sequence.most_blocks

    def _release(self, sequence: Sequence) -> None:
        self.cache.free(sequence.blocks)
        sequence.blocks = []


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
