"""Log-probabilities and penalties through scheduler and runner; and what the worker writes on the wire."""

import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import executor_svc.prompt_rows as prompt_rows
from executor_svc.core import Batch, Logprobs, PromptTold, Sampled, Sampling, SchedulerConfig, Sequence
from executor_svc.frames import FrameSocket
from executor_svc.loader import LoadedEngine
from executor_svc.loop import Worker
from executor_svc.runner import TorchRunner
from executor_svc.scheduler import Scheduler
from protos.v1 import common_pb2 as common
from protos.v1.executor_pb2 import Cancel, StepOutput, Submit
from protos.v1.worker_pb2 import ClientGone, FromWorker, ToWorker
from tests.running import Engine, make_engine

PROMPT = [7, 91, 15, 200, 33, 4, 4, 18, 77, 120, 121, 122, 9, 10, 11, 12, 13, 14] * 3
COUNT = 60


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    return make_engine(checkpoint, tmp_path_factory.mktemp("store"), max_batch_size=8, max_num_tokens=24)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def requests(**fields: Any) -> list[Sequence]:
    """Six of mixed settings."""
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4}
    settings_ = [
        Sampling(0.0, **penalties),
        Sampling(0.9, top_p=0.95, seed=1, **penalties),
        Sampling(1.2, 30, min_p=0.02, seed=2, frequency_penalty=1.0, logit_bias=((5, 2.0), (6, -4.0))),
        Sampling(1.0, seed=3, bad_words=((9, 10), (4,), (200, 33, 4))),
        Sampling(0.0),
        Sampling(1.0, seed=4),
    ]
    lengths = (54, 20, 33, 54, 41, 7)
    return [
        Sequence(0, row, PROMPT[:length], length, COUNT, sampling, min_tokens=12 * (row % 2), **fields)
        for row, (sampling, length) in enumerate(zip(settings_, lengths, strict=True))
    ]


def test_seeds_give_one_text_in_any_batch_across_preemption_and_resume(loaded: LoadedEngine) -> None:
    ends = {"eos_ids": frozenset({1, 272}), "stop_ids": frozenset({231})}
    together, alone, tight, resumed = (requests(**ends) for _ in range(4))
    Engine(loaded).run(together)
    assert len({sequence.num_completion for sequence in together}) > 2, "some end early"
    for sequence in alone:
        Engine(loaded).run([sequence])
    engine = Engine(loaded, kv_blocks=16)
    engine.run(tight)
    assert engine.scheduler.num_preemptions > 0
    for sequence, whole in zip(resumed, together, strict=True):
        sequence.token_ids += whole.token_ids[sequence.prompt_len : sequence.prompt_len + 8]
    Engine(loaded).run(resumed)
    texts = [sequence.token_ids for sequence in together]
    for others in (alone, tight, resumed):
        assert [sequence.token_ids for sequence in others] == texts


def run(engine: Engine, sequences: list[Sequence]) -> tuple[dict[Sequence, Logprobs], dict[Sequence, list[PromptTold]]]:
    """To their end; what was told of each one's tokens and of its prompt."""
    emitted: dict[Sequence, Logprobs] = {}
    told: dict[Sequence, list[PromptTold]] = {}
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while not engine.scheduler.idle:
        batch = engine.scheduler.schedule()
        assert batch is not None
        assert sum(len(item.prompt_rows) for item in batch.items) <= prompt_rows.MAX_PROMPT_ROWS
        engine.runner.start(batch)
        for news in engine.scheduler.commit(batch, engine.runner.finish()):
            if news.logprobs:
                columns = emitted.setdefault(news.sequence, Logprobs([], news.logprobs.top, [], []))
                columns.logprobs.extend(news.logprobs.logprobs)
                columns.top_token_ids.extend(news.logprobs.top_token_ids)
                columns.top_logprobs.extend(news.logprobs.top_logprobs)
        for part in engine.scheduler.take_prompt_logprobs():
            told.setdefault(part.sequence, []).append(part)
    return emitted, told


@pytest.mark.parametrize("kv_blocks", [None, 16])
def test_log_probabilities_equal_transformers(
    loaded: LoadedEngine, reference: Any, kv_blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of completions, whatever was sampled how, and of prompts, in chunks and across preemption, each position once."""
    monkeypatch.setattr(prompt_rows, "MAX_PROMPT_ROWS", 17)
    engine = Engine(loaded, kv_blocks=kv_blocks)
    engine.run(requests())  # so that prefixes are cached
    sequences = [
        replace(sequence, logprobs=row, prompt_logprobs=None if row == 4 else 2 * row)
        for row, sequence in enumerate(requests())
    ]
    before = engine.scheduler.num_preemptions
    emitted, told = run(engine, sequences)
    assert engine.scheduler.num_preemptions > before or kv_blocks is None
    for row, sequence in enumerate(sequences):
        with torch.inference_mode():
            scores = torch.log_softmax(reference(torch.tensor([sequence.token_ids])).logits[0], -1)
        compare(emitted[sequence], scores, sequence.token_ids, sequence.prompt_len, top=row)
        if row == 4:
            assert sequence not in told and sequence.num_cached
            continue
        at = 1
        for part in told[sequence]:
            assert part.start == at
            at += len(part.logprobs.logprobs)
            compare(part.logprobs, scores, sequence.token_ids[:at], part.start, top=2 * row)
        assert at == sequence.prompt_len and sequence.num_cached == 0


def compare(found: Logprobs, scores: torch.Tensor, token_ids: list[int], start: int, top: int) -> None:
    """Against a row of log-probabilities for each of the tokens from `start` on."""
    rows = scores[start - 1 : len(token_ids) - 1]
    own = rows.gather(-1, torch.tensor(token_ids[start:])[:, None]).squeeze(-1)
    assert found.logprobs == pytest.approx(own.tolist(), abs=1e-4)
    best = rows.topk(top)
    assert found.top == top
    assert found.top_logprobs == pytest.approx(best.values.flatten().tolist(), abs=1e-4)
    assert found.top_token_ids == best.indices.flatten().tolist()


class CountingRunner:
    """Says which positions it was asked for."""

    def __init__(self) -> None:
        self.results: deque[Sampled] = deque()

    def start(self, batch: Batch) -> None:
        told = {}
        for index, item in enumerate(batch.items):
            rows = item.prompt_rows
            assert not rows or item.start <= rows.start and rows.stop <= item.start + item.count
            if rows:
                told[index] = Logprobs([float(at + 1) for at in rows], 0, [], [])
        self.results.append(Sampled([5] * sum(item.samples for item in batch.items), {}, told))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    in_flight=st.integers(1, 3),
    budget=st.integers(6, 40),
    rows=st.integers(1, 20),
    blocks=st.integers(18, 40),
    mixed=st.booleans(),
)
def test_each_position_of_a_prompt_is_told_once_in_order_before_the_first_token(
    lengths: list[int], in_flight: int, budget: int, rows: int, blocks: int, mixed: bool
) -> None:
    config = SchedulerConfig(blocks, 4, 6, budget, 70, max_in_flight=in_flight, future_tokens=True, mixed_batches=mixed)
    scheduler, runner = Scheduler(config), CountingRunner()
    sequences = [
        Sequence(0, row, [1] * length, length, 8, prompt_logprobs=0 if row % 3 else None)
        for row, length in enumerate(lengths)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    told: dict[Sequence, list[float]] = {sequence: [] for sequence in sequences}
    batches: deque[Batch] = deque()
    limit, prompt_rows.MAX_PROMPT_ROWS = prompt_rows.MAX_PROMPT_ROWS, rows
    try:
        for _ in range(2000):
            while batch := scheduler.schedule():
                assert sum(len(item.prompt_rows) for item in batch.items) <= rows
                runner.start(batch)
                batches.append(batch)
            if not batches:
                break
            emitted = scheduler.commit(batches.popleft(), runner.results.popleft())
            for part in scheduler.take_prompt_logprobs():
                assert part.logprobs.logprobs[0] == part.start
                told[part.sequence] += part.logprobs.logprobs
            for news in emitted:
                if news.sequence.prompt_logprobs is not None:
                    assert told[news.sequence] == list(range(1, news.sequence.prompt_len))
            scheduler.check_integrity()
    finally:
        prompt_rows.MAX_PROMPT_ROWS = limit
    assert scheduler.idle and scheduler.cache.num_free == blocks
    assert all(sequence.finish for sequence in sequences)


class Front:
    """The front's end of a worker that runs in a thread of this process."""

    def __init__(self, loaded: LoadedEngine, max_waiting: int | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.frames, self._sockets = FrameSocket(ours), (ours, theirs)
        runner = TorchRunner(loaded.program, loaded.weights, loaded.manifest.limits)
        self.worker = Worker(FrameSocket(theirs), loaded.manifest, runner, max_waiting)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with pytest.raises(ConnectionError):
            self.worker.run()

    def send(self, client: int = 1, **message: Any) -> None:
        self.frames.send(ToWorker(client=client, arrived=time.monotonic(), **message).SerializeToString())

    def steps(self) -> Iterator[StepOutput]:
        """What the clients are told, until nothing comes any more for as long as a test waits."""
        while messages := self.frames.receive(60):
            for data in messages:
                message = FromWorker.FromString(data)
                if message.HasField("step_output"):
                    yield StepOutput.FromString(message.step_output)

    def until_finished(self, *handles: int) -> list[StepOutput]:
        """Up to the step in which the last of them ends."""
        left, found = set(handles), []
        for step in self.steps():
            found.append(step)
            left -= {item.handle for item in (*step.finished, *step.failed)}
            if not left:
                return found
        raise AssertionError(f"{left} do not end")

    def close(self) -> None:
        self._sockets[0].shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for end in self._sockets:
            end.close()


@pytest.fixture(scope="module")
def front(loaded: LoadedEngine) -> Iterator[Front]:
    front = Front(loaded, max_waiting=3)
    yield front
    front.close()


def submit(handle: int, **fields: Any) -> Submit:
    given = {"sampling": {"temperature": 0.0}, "stopping": {"max_tokens": 6, "ignore_eos": True}, **fields}
    return Submit(handle=handle, token_ids=PROMPT[:40], **given)


def test_log_probabilities_on_the_wire(front: Front) -> None:
    front.send(submit=submit(1, output={"logprobs": 2, "prompt_logprobs": 1}))
    front.send(submit=submit(2))
    front.send(submit=submit(3, output={"logprobs": 0}))
    steps = front.until_finished(1, 2, 3)
    assert {row.handle for step in steps for row in step.logprobs} == {1, 3}
    tokens = [
        token for step in steps for handle, token in zip(step.handles, step.token_ids, strict=True) if handle == 1
    ]
    rows = [row.logprobs for step in steps for row in step.logprobs if row.handle == 1]
    assert [row.top for row in rows] == [2] * 6 and [list(row.top_token_ids)[0] for row in rows] == tokens
    assert all(list(row.logprobs)[0] == list(row.top_logprobs)[0] for row in rows), "greedy"
    assert all(row.logprobs.top == 0 for step in steps for row in step.logprobs if row.handle == 3)
    parts = [row for step in steps for row in step.prompt_logprobs]
    assert len(parts) > 1 and {row.handle for row in parts} == {1}
    assert sum(len(row.logprobs.logprobs) for row in parts) == 39
    first = next(step for step in steps if any(row.handle == 1 for row in step.prompt_logprobs))
    assert [item.handle for item in first.started if item.handle == 1] == [1], "its start comes with the first of them"
    assert sum(item.handle == 1 for step in steps for item in step.started) == 1


def test_a_beam_search_on_the_wire(front: Front, reference: Any) -> None:
    front.send(submit=submit(4, beam_search={"width": 3}))
    front.send(submit=submit(5))
    steps = front.until_finished(4, 5)
    told = [step for step in steps if 4 in step.handles or any(item.handle == 4 for item in step.started)]
    assert len(told) == 1, "not streamed"
    assert 4 not in told[0].handles and told[0].started[0].prompt_tokens == 40
    (result,) = told[0].beams
    ids = torch.tensor([PROMPT[:40]])
    wanted = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert [list(hypothesis.token_ids) for hypothesis in result.hypotheses] == wanted[:, 40:].tolist()
    best = result.hypotheses[0]
    assert best.score == pytest.approx(best.cumulative_logprob / 6)
    assert told[0].finished[0].finish.reason == best.finish.reason == common.FINISH_REASON_LENGTH


def test_a_group_is_one_place_of_the_queue_and_ends_as_one(front: Front) -> None:
    """Its beams are more than may wait; a cancel, a deadline and a lost client end all of them and free their blocks."""
    wide = {"beam_search": {"width": 16}, "stopping": {"max_tokens": 200, "ignore_eos": True}}
    front.send(submit=submit(6, **{**wide, "stopping": {"max_tokens": 3}}))
    (result,) = [result for step in front.until_finished(6) for result in step.beams]
    assert len(result.hypotheses) == 16
    late = submit(7, **wide)
    late.timeout.FromMilliseconds(150)
    front.send(submit=late)
    (failed,) = [failed for step in front.until_finished(7) for failed in step.failed]
    assert failed.failure.reason == "DEADLINE_EXCEEDED" and "the deadline passed after" in failed.failure.message
    front.send(submit=submit(8, **wide))
    front.send(client=2, submit=submit(8, **wide))
    front.send(submit=submit(9, stopping={"max_tokens": 2, "ignore_eos": True}))
    front.until_finished(9)
    front.send(cancel=Cancel(handles=[8]))
    front.send(client=2, client_gone=ClientGone())
    (step,) = [step for step in front.until_finished(8) if step.finished]
    assert step.finished[0].finish.reason == common.FINISH_REASON_CANCELLED and not step.beams
    front.send(submit=submit(10))
    load = front.until_finished(10)[-1].load
    assert (load.running, load.waiting) == (0, 0) and load.free_kv_blocks == load.total_kv_blocks


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"beam_search": {"width": 2}, "resume_token_ids": [3]}, "BEAM_SEARCH_RESUME"),
        ({"beam_search": {"width": 2}, "output": {"logprobs": 0}}, "BEAM_SEARCH_LOGPROBS"),
        ({"beam_search": {"width": 17}}, "BEAM_WIDTH_INVALID"),
    ],
)
def test_a_search_that_cannot_be_is_refused(front: Front, fields: dict[str, Any], reason: str) -> None:
    front.send(submit=submit(11, **fields))
    (step,) = front.until_finished(11)
    assert [failed.failure.reason for failed in step.failed] == [reason]
