"""The order of the worker's beats, as its runner and its front see it; and worker processes that wait for their engine."""

import socket
import sys
from collections import deque
from pathlib import Path

import pytest

from engine.fingerprint import Fingerprint
from engine.manifest import Limits, Manifest, ModelFacts, Parallelism
from executor_svc.core import Batch, Sampled
from executor_svc.frames import FrameSocket, frame
from executor_svc.launch import Spares
from executor_svc.loop import Worker
from executor_svc.runner import Capabilities
from protos.v1.executor_pb2 import StepOutput, Submit
from protos.v1.worker_pb2 import FromWorker, ToWorker

MANIFEST = Manifest(
    "0" * 64, {}, "", "", ModelFacts("X", 100, 1, 8, 1, 1, "float32", 8, (), 1), Limits(4, 20, 8), Parallelism(),
    Fingerprint("torch", "cpu"), (), (),
)  # fmt: skip


class Recorder:
    """A runner that notes when it is used and what the front has heard by then.

    It fails at the batch `broken`; behind the third the front is gone.
    """

    def __init__(self, ours: socket.socket, overlaps: bool, broken: int, places: int) -> None:
        self.capabilities = Capabilities(
            num_blocks=16, block_size=4, overlaps=overlaps, max_in_flight=places, places=places
        )
        self.events: list[str] = []
        self._ours, self._front, self._broken = ours, FrameSocket(ours), broken
        self._started: deque[Batch] = deque()

    def start(self, batch: Batch) -> None:
        self.listen()
        self.events.append(f"start {batch.step}")
        self._started.append(batch)

    def finish(self) -> Sampled:
        self.listen()
        batch = self._started.popleft()
        self.events.append(f"finish {batch.step}")
        if batch.step == 3:
            self._ours.shutdown(socket.SHUT_WR)
        if batch.step == self._broken:
            raise RuntimeError("the device is lost")
        return Sampled([7 for item in batch.items if item.samples])

    def listen(self) -> None:
        for data in self._front.receive(0):
            message = FromWorker.FromString(data)
            if message.HasField("step_output"):
                output = StepOutput.FromString(message.step_output)
                self.events.append(f"tokens {output.step}")


def run(overlaps: bool, broken: int = 0, places: int = 1) -> list[str]:
    """Three batches for a request, or one for each place of a pipeline, then the front is gone."""
    ours, theirs = socket.socketpair()
    for handle in range(1, places + 1):
        submit = Submit(handle=handle, token_ids=[5, 6])
        submit.stopping.max_tokens = 3
        ours.sendall(frame(ToWorker(client=1, submit=submit).SerializeToString()))
    with ours:
        runner = Recorder(ours, overlaps, broken, places)
        worker = Worker(FrameSocket(theirs), MANIFEST, runner)
        with pytest.raises(RuntimeError if broken else ConnectionError):
            worker.run()
        theirs.close()
        with pytest.raises(ConnectionError):
            while True:
                runner.listen()
    return runner.events


def test_a_runner_that_overlaps_has_its_next_batch_before_the_tokens_are_sent() -> None:
    assert run(overlaps=True) == [
        *("start 1", "finish 1", "start 2", "tokens 1", "finish 2", "start 3", "tokens 2", "finish 3"),
        "tokens 3",
    ]


def test_tokens_are_sent_before_a_runner_computes_in_start() -> None:
    assert run(overlaps=False) == [
        *("start 1", "finish 1", "tokens 1", "start 2", "finish 2", "tokens 2", "start 3", "finish 3"),
        "tokens 3",
    ]


def test_a_pipeline_has_as_many_batches_under_way_as_places() -> None:
    """Both prompts fit into the first one; from then on each has a batch of its own, and one is begun before the other ends."""
    events = [event for event in run(overlaps=False, places=2) if not event.startswith("tokens")]
    assert events == ["start 1", "finish 1", "start 2", "start 3", "finish 2", "start 4", "finish 3"]


def test_what_a_batch_fails_with_ends_the_loop() -> None:
    assert run(overlaps=True, broken=2) == ["start 1", "finish 1", "start 2", "tokens 1", "finish 2"]


def waiting(tmp_path: Path) -> Spares:
    """Spares that answer what they are told, and end with their socket."""
    program = tmp_path / "program.py"
    program.write_text(
        "import socket, sys\n"
        "end = socket.socket(fileno=int(sys.argv[2]))\n"
        "while data := end.recv(100):\n    end.sendall(data + sys.argv[3].encode())\n"
    )
    return Spares(["!"], program=[str(program)])


def test_a_spare_is_taken_once_and_a_dead_one_is_not(tmp_path: Path) -> None:
    spares = waiting(tmp_path)
    spares.prepare(1)
    (first,) = spares._waiting
    first.process.kill()
    first.process.wait()
    second, third = spares.take(), spares.take()
    assert len({first.process.pid, second.process.pid, third.process.pid}) == 3
    for process, connection in (second, third):
        connection.sendall(b"hello")
        assert connection.recv(100) == b"hello!"
        connection.close()
        assert process.wait(60) == 0


def test_spares_end_with_their_front(tmp_path: Path) -> None:
    spares = waiting(tmp_path)
    spares.prepare(2)
    processes = [launched.process for launched in spares._waiting]
    spares.close()
    assert [process.returncode for process in processes] == [-9, -9]


def test_a_process_that_cannot_be_started_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        Spares([]).prepare(1)
