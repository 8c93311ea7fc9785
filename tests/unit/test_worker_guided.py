"""A worker whose requests are guided, between its front and a runner of random logits."""

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.fingerprint import Fingerprint
from engine.manifest import Limits, Manifest, ModelFacts, Parallelism
from engine.token_table import TokenTable
from executor_svc.core import Batch, Sampled
from executor_svc.frames import FrameSocket, frame
from executor_svc.guides import Guides
from executor_svc.loop import Worker
from executor_svc.runner import Capabilities
from executor_svc.sampler import answer
from protos.v1.common_pb2 import FinishReason
from protos.v1.executor_pb2 import Cancel, StepOutput, Submit
from protos.v1.worker_pb2 import ClientGone, FromWorker, ToWorker

MANIFEST = Manifest(
    "0" * 64, {}, "", "", ModelFacts("X", 257, 1, 8, 1, 1, "float32", 8, (256,), 1), Limits(4, 64, 64), Parallelism(),
    Fingerprint("torch", "cpu"), (), (),
)  # fmt: skip
TABLE = TokenTable((*(bytes([byte]) for byte in range(256)), b"</s>"), (256,))
SLOW = {"json_schema": '{"type": "integer", "multipleOf": 9999991}'}


class RandomLogits:
    """A runner that is a batch ahead, as on a GPU, where it may."""

    def __init__(self) -> None:
        self.capabilities = Capabilities(64, 4, future_tokens=True, max_in_flight=2, overlaps=True)
        self._started: deque[Batch] = deque()

    def start(self, batch: Batch) -> None:
        self._started.append(batch)

    def finish(self) -> Sampled:
        batch = self._started.popleft()
        rows = sum(item.samples for item in batch.items)
        return answer(torch.randn(rows, 257, generator=torch.Generator().manual_seed(batch.step)), batch)


class Front:
    """What a client sends, and what has become of its requests."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours, self._frames = ours, FrameSocket(ours)
        self.texts: dict[int, bytes] = {}
        self.ends: dict[int, str] = {}

    def submit(self, handle: int, guide: dict[str, Any] | None = None, client: int = 1, **fields: Any) -> None:
        submit = Submit(**{"handle": handle, "token_ids": [5, 6], "guided_decoding": guide, **fields})
        self.send(submit=submit, client=client)

    def send(self, client: int = 1, **message: Any) -> None:
        self._ours.sendall(frame(ToWorker(client=client, **message).SerializeToString()))

    def wait(self, *handles: int) -> None:
        while not set(handles) <= self.ends.keys():
            for data in self._frames.receive(60):
                self._read(StepOutput.FromString(FromWorker.FromString(data).step_output))

    def _read(self, output: StepOutput) -> None:
        for handle, token in zip(output.handles, output.token_ids, strict=True):
            self.texts[handle] = self.texts.get(handle, b"") + (TABLE.tokens[token] if token < 256 else b"")
        for finished in output.finished:
            self.ends[finished.handle] = FinishReason.Name(finished.finish.reason).removeprefix("FINISH_REASON_")
        for failed in output.failed:
            self.ends[failed.handle] = failed.failure.reason


@contextmanager
def working(table: TokenTable | None = TABLE, seconds: float = 20) -> Iterator[tuple[Front, Worker]]:
    ours, theirs = socket.socketpair()
    guides = Guides(table, seconds)
    worker = Worker(FrameSocket(theirs), MANIFEST, RandomLogits(), guides=guides)
    errors: list[BaseException] = []

    def run(loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, args=(worker.run,))
    thread.start()
    try:
        yield Front(ours), worker
    finally:
        ours.close()
        thread.join(60)
        guides.close()
        theirs.close()
    assert [type(error) for error in errors] in ([ConnectionError], [ConnectionResetError], [BrokenPipeError])


def test_guided_and_free_requests_run_side_by_side() -> None:
    with working() as (front, worker):
        front.submit(1, {"regex": "[a-c]{4}x"})
        front.submit(2, stopping={"max_tokens": 9, "ignore_eos": True})
        front.submit(3, {"choices": {"choices": ["yes", "no"]}})
        front.submit(4, {"regex": "[a-c]{4}x"}, stopping={"max_tokens": 3})
        front.submit(5, {"regex": "[a-c]{4}x"}, resume_token_ids=list(b"abc"))
        front.wait(1, 2, 3, 4, 5)
        assert front.ends == {1: "STOP", 2: "LENGTH", 3: "STOP", 4: "LENGTH", 5: "STOP"}
        assert len(front.texts[1]) == 5 and set(front.texts[1][:4]) <= set(b"abc") and front.texts[1][4:] == b"x"
        assert front.texts[3] in (b"yes", b"no")
        assert len(front.texts[4]) == 3 and set(front.texts[4]) <= set(b"abc")
        assert front.texts[5][:-1].strip(b"abc") == b"" and front.texts[5][1:] == b"x"


def test_a_grammar_that_takes_its_time_blocks_nobody() -> None:
    with working(seconds=1) as (front, worker):
        front.submit(1, SLOW)
        front.submit(2, {"regex": "ab"})
        front.submit(3, stopping={"max_tokens": 5, "ignore_eos": True})
        front.wait(2, 3)
        assert 1 not in front.ends and worker.status().load.waiting == 1
        front.wait(1)
        assert front.ends == {1: "GUIDED_DECODING_TOO_COMPLEX", 2: "STOP", 3: "LENGTH"}
        assert worker.status().load.waiting == 0


def test_who_waits_for_a_grammar_can_be_cancelled_and_lost() -> None:
    with working(seconds=1) as (front, worker):
        front.submit(1, SLOW)
        front.submit(2, SLOW, client=2)
        front.send(cancel=Cancel(handles=[1]))
        front.wait(1)
        assert front.ends == {1: "CANCELLED"}
        front.send(client=2, client_gone=ClientGone())
        front.submit(3, {"regex": "ab"})
        front.wait(3)
        assert front.ends[3] == "STOP" and worker.status().load.waiting == 0


@pytest.mark.parametrize(
    ("table", "fields", "reason"),
    [
        (TABLE, {"guide": {"regex": "("}}, "GUIDED_DECODING_INVALID"),
        (TABLE, {"guide": {}}, "GUIDED_DECODING_INVALID"),
        (TABLE, {"guide": {"json_schema": "["}}, "GUIDED_DECODING_INVALID"),
        (TABLE, {"guide": {"regex": "a"}, "beam_search": {"width": 2}}, "BEAM_SEARCH_GUIDED"),
        (TABLE, {"guide": {"regex": "ab"}, "resume_token_ids": [98]}, "RESUME_TOKEN_IDS_INVALID"),
        (None, {"guide": {"regex": "ab"}}, "TOKEN_TABLE_MISSING"),
        (TokenTable((b"a", b"b", *[b""] * 255), (256,)), {"guide": {"regex": "ac"}}, "GUIDED_DECODING_DEAD_END"),
    ],
)
def test_what_is_refused(table: TokenTable | None, fields: dict[str, Any], reason: str) -> None:
    """And counted; others go on."""
    with working(table) as (front, _):
        front.submit(1, **fields)
        front.submit(2, stopping={"max_tokens": 2, "ignore_eos": True})
        front.wait(1, 2)
        assert front.ends == {1: reason, 2: "LENGTH"}
