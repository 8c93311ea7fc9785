"""The loop of rank 0's worker. It repeats four beats: receive, schedule, compute, report."""

import logging
import time
from collections import deque

from engine.errors import DeadlineExceeded, EnginehouseError, InvalidArgument
from engine.manifest import Manifest
from executor_svc.beams import BeamGroup
from executor_svc.core import Batch, Emitted, Finish, Reason, SchedulerConfig, Sequence
from executor_svc.frames import FrameSocket
from executor_svc.guides import Guides
from executor_svc.intake import to_beam_search, to_sequence
from executor_svc.outbox import Outbox
from executor_svc.runner import Runner
from executor_svc.scheduler import Scheduler
from executor_svc.tally import Tally
from protos.logs import check_request_id, fields
from protos.rpc import to_failure
from protos.v1.executor_pb2 import EngineLoad, EngineState, EngineStatus, Submit
from protos.v1.worker_pb2 import Drained, FromWorker, ToWorker

_IDLE_CHECK = 1.0  # seconds of idleness after which the scheduler's integrity is checked
_LOAD_INTERVAL = 0.1  # seconds between reports of the load to the front, while there is work
_LEAST_WAITING, _WAITING_BATCHES = 1024, 16  # requests that may wait, where nobody says how many: the larger

log = logging.getLogger(__name__)


def scheduler_config(
    runner: Runner, manifest: Manifest, max_waiting: int | None = None, block_reuse: bool = True
) -> SchedulerConfig:
    """The engine's limits and the runner's capabilities, as the scheduler takes them.

    By default a dataset may be sent at once; far beyond that, a client hears sooner that it should come back later.
    """
    limits, can = manifest.limits, runner.capabilities
    return SchedulerConfig(
        num_blocks=can.num_blocks,
        block_size=can.block_size,
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        max_seq_len=limits.max_seq_len,
        max_in_flight=can.max_in_flight,
        places=can.places,
        future_tokens=can.future_tokens,
        mixed_batches=can.mixed_batches,
        prefix_cache=can.prefix_cache and block_reuse,
        max_waiting=(
            max(_LEAST_WAITING, _WAITING_BATCHES * limits.max_batch_size) if max_waiting is None else max_waiting
        ),
        rope=can.rope,
    )


class Worker:
    """The loop between the front and a runner."""

    def __init__(
        self,
        front: FrameSocket,
        manifest: Manifest,
        runner: Runner,
        max_waiting: int | None = None,
        block_reuse: bool = True,
        memory: int = 0,
        guides: Guides | None = None,
    ) -> None:
        """`memory`: bytes of weights and KV cache, for the status."""
        self._memory = memory
        self._guides = guides or Guides(None)
        self._front, self._manifest, self._runner = front, manifest, runner
        self._scheduler = Scheduler(scheduler_config(runner, manifest, max_waiting, block_reuse))
        self._outbox = Outbox()
        self._tally = Tally(manifest.engine_id, self._scheduler.config.prefix_cache)
        self._live: dict[int, dict[int, Sequence]] = {}  # client -> handle -> sequence, or the request of a group
        self._done: set[int] = set()  # clients that will send no more
        self._batches: deque[Batch] = deque()  # in flight, oldest first
        self._checked = False  # the scheduler's integrity, since something last happened
        self._step = 0
        self._load, self._load_due = EngineLoad(), 0.0  # as the front knows it, and when it may hear again
        self._overlaps = runner.capabilities.overlaps

    def status(self) -> EngineStatus:
        """As the front tells it to callers."""
        limits = self._manifest.limits
        return EngineStatus(
            engine_id=self._manifest.engine_id,
            state=EngineState.ENGINE_STATE_READY,
            max_seq_len=limits.max_seq_len,
            max_batch_size=limits.max_batch_size,
            load=self._measure(),
            memory_bytes=self._memory,
        )

    def run(self) -> None:
        """Works until the front is gone, which raises ConnectionError.

        The next batch is scheduled when the last one's tokens are known, and not before: a new request would wait a step
        longer. A runner that computes behind `start` has its batch before the last one's tokens are sent.
        """
        while True:
            self._receive()
            self._take_guided()
            while batch := self._scheduler.schedule():
                self._tally.scheduled(batch)
                self._guides.prepare(batch)
                self._runner.start(batch)
                self._batches.append(batch)
            self._expire()
            if self._overlaps or not self._batches:
                self._report()
            if self._batches:
                batch = self._batches.popleft()
                self._step = batch.step
                news = self._scheduler.commit(batch, self._runner.finish())
                for told in self._scheduler.take_prompt_logprobs():
                    self._outbox.prompt(told)
                self._tally.emitted(news)
                for emitted in news:
                    if emitted.sequence.group is not None:
                        self._search(emitted.sequence.group, emitted)
                        continue
                    if emitted.finish and emitted.finish.reason is Reason.ERROR:
                        self._outbox.fail(
                            emitted.sequence.client, emitted.sequence.handle, emitted.sequence.guide.error
                        )
                    else:
                        self._outbox.token(emitted)
                    if emitted.finish:
                        self._forget(emitted.sequence)
            if not self._overlaps or self._scheduler.idle:
                self._report()

    def _receive(self) -> None:
        """Takes what has arrived; waits for something if there is nothing else to do."""
        idle = self._scheduler.idle
        wait = None if self._checked and not self._guides.num_pending else _IDLE_CHECK
        messages = self._front.receive(wait if idle else 0, self._guides)
        if idle and not messages and not self._checked:
            self._scheduler.check_integrity()  # after a while, so that no request waits for it
        self._checked = idle and not messages
        for data in messages:
            message = ToWorker.FromString(data)
            kind = message.WhichOneof("message")
            if kind == "submit":
                self._submit(message.client, message.submit, message.arrived)
            elif kind == "cancel":
                for handle in message.cancel.handles:
                    if sequence := self._live.get(message.client, {}).get(handle):
                        self._cancel(sequence)
            elif kind == "client_gone":
                for sequence in self._live.pop(message.client, {}).values():
                    self._end(sequence, Reason.CANCELLED)
                    self._tally.ended(sequence)
                self._done.discard(message.client)
            elif kind == "client_done":
                self._done.add(message.client)

    def _submit(self, client: int, submit: Submit, arrived: float) -> None:
        live = self._live.setdefault(client, {})
        if submit.handle in live:  # no answer under this handle could be told from the other request's
            message = f"handle {submit.handle} is in use by another live request of this stream"
            failure = to_failure(InvalidArgument(message, reason="HANDLE_IN_USE"))
            self._front.send(FromWorker(client=client, client_failure=failure).SerializeToString())
            return
        try:
            if submit.request_id:
                check_request_id(submit.request_id)
            sequence = to_sequence(client, submit, self._manifest, arrived)
            self._tally.arrived(sequence, submit, arrived)
            if beam_search := to_beam_search(submit):
                self._scheduler.check_size(sequence)
                self._scheduler.add(BeamGroup(sequence, beam_search).first())
            elif not submit.HasField("guided_decoding") or self._guides.begin(sequence, submit.guided_decoding):
                self._scheduler.add(sequence)
        except Exception as error:
            if not isinstance(error, EnginehouseError):
                log.exception("request failed", extra=fields(request_id=submit.request_id))
            self._tally.refused(submit.request_id, error, submit.trace_context)
            self._outbox.fail(client, submit.handle, error)
            return
        live[submit.handle] = sequence

    def _take_guided(self) -> None:
        """Adds the sequences whose grammars have been compiled, or tells why they cannot be."""
        for sequence, refusal in self._guides.take():
            try:
                if refusal:
                    raise refusal
                self._scheduler.add(sequence)
            except EnginehouseError as error:
                self._tally.refused(sequence.track.request_id if sequence.track else "", error)
                self._outbox.fail(sequence.client, sequence.handle, error)
                self._live.get(sequence.client, {}).pop(sequence.handle, None)

    def _search(self, group: BeamGroup, emitted: Emitted) -> None:
        """Takes a beam's step; queues the next ones, or tells the result."""
        for sequence in group.take(emitted):
            self._scheduler.go_on(sequence)
        if group.request.finish is not None:
            self._scheduler.group_ended()
            self._outbox.beams(group)
            self._forget(group.request)

    def _end(self, sequence: Sequence, reason: Reason) -> bool:
        """Ends a request from outside, with all beams of a group; False if it had ended already."""
        group = sequence.group
        if self._guides.forget(sequence):
            sequence.finish = Finish(reason)
            return True
        if group is None:
            return self._scheduler.cancel(sequence, reason)
        if group.request.finish is not None:
            return False
        group.request.finish = Finish(reason)
        for member in group.members:
            self._scheduler.cancel(member, reason)
        return True

    def _expire(self) -> None:
        """Tells of those that were dropped because their deadline had passed, while they ran or waited."""
        overdue = self._guides.take_overdue(time.monotonic()) if self._guides.num_pending else []
        for sequence in overdue:
            sequence.finish = Finish(Reason.DEADLINE)
        for sequence in [*self._scheduler.take_expired(), *overdue]:
            if sequence.group is not None and not self._end(sequence, Reason.DEADLINE):
                continue  # it was told with the first of its beams
            started = sequence.num_cached is not None
            when = f"after {sequence.num_completion} tokens" if started else "before the request was started"
            fix = "lower max_tokens" if started else f"come back when fewer than {self._scheduler.num_waiting + 1} wait"
            error = DeadlineExceeded(f"the deadline passed {when}: give it more time, or {fix}")
            self._outbox.fail(sequence.client, sequence.handle, error)
            self._forget(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        if self._end(sequence, Reason.CANCELLED):
            self._outbox.finish(sequence.client, sequence.handle, Finish(Reason.CANCELLED))
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._tally.ended(sequence)
        self._live.get(sequence.client, {}).pop(sequence.handle, None)

    def _report(self) -> None:
        load = self._measure()
        messages = []
        for client, output in self._outbox.flush(self._step, load):
            if client in self._live:
                messages.append(FromWorker(client=client, step_output=output).SerializeToString())
        for client in [client for client in self._done if not self._live.get(client)]:
            self._done.discard(client)
            self._live.pop(client, None)
            messages.append(FromWorker(client=client, drained=Drained()).SerializeToString())
        # Clients hear of the load with every step. The front only tells it to who asks: it need not know each one.
        now = time.monotonic()
        if load != self._load and (now >= self._load_due or self._scheduler.idle):
            self._load, self._load_due = load, now + _LOAD_INTERVAL
            messages.append(FromWorker(load=load).SerializeToString())
        if metrics := self._tally.take(self._scheduler.num_preemptions, self._scheduler.idle):
            messages.append(FromWorker(metrics=metrics).SerializeToString())
        if messages:
            self._front.send(*messages)

    def _measure(self) -> EngineLoad:
        scheduler = self._scheduler
        return EngineLoad(
            engine_id=self._manifest.engine_id,
            running=len(scheduler.running),
            waiting=scheduler.num_waiting + self._guides.num_pending,
            queued_tokens=scheduler.queued_tokens(),
            free_kv_blocks=scheduler.cache.num_free,
            total_kv_blocks=scheduler.config.num_blocks,
        )
