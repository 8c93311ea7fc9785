"""What ranks tell each other, and what they say when they do not fit together. tests/integration/test_ranks.py lets them run."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, Unavailable
from engine.fingerprint import Fingerprint, Node
from engine.manifest import FileRef, Limits, Manifest, ModelFacts, Parallelism, Rank
from enginehouse.cluster import hold_ports
from executor_svc import meeting
from executor_svc.frames import FrameSocket
from executor_svc.loader import begin_load, load_engine
from executor_svc.meeting import find_place, meet
from executor_svc.network import listen
from executor_svc.plans import pack, unpack
from executor_svc.ranks import _gather
from protos.v1.worker_pb2 import FromWorker
from tests.conftest import save_checkpoint
from tests.running import Engine, make_engine
from tests.unit.rank_harness import sequences

NODE = Node("cpu", {"torch": "2.13"})
RANK = Rank(FileRef("program.json", 0, "", ()), ())
MANIFEST = Manifest(
    "a" * 64, {}, "", "", ModelFacts("X", 100, 1, 8, 1, 1, "float32", 8, (), 1), Limits(4, 20, 8), Parallelism(2, 2, 1),
    Fingerprint("torch", "cpu"), (RANK, RANK), (),
)  # fmt: skip


def place(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def both(*manifests: Manifest) -> list[BaseException | None]:
    """What two ranks say that meet."""
    with listen("127.0.0.1") as server, ThreadPoolExecutor(2) as pool:
        port = server.getsockname()[1]
        met = [
            pool.submit(meet, manifest, "cpu", 60, place(rank, port), None if rank else server)
            for rank, manifest in enumerate(manifests)
        ]
        return [made.exception(timeout=60) for made in met]


def test_a_plan_arrives_as_it_was_told() -> None:
    plan = {
        "tokens": np.arange(5, dtype=np.int32), "table": np.arange(6, dtype=np.int32).reshape(2, 3),
        "slots": torch.arange(3) + (1 << 40), "nothing": np.empty((0, 2), dtype=np.int32),
        "lens": [3, 4], "count": 7, "drawn": True, "lengths": None,
    }  # fmt: skip
    told = unpack(pack(plan))
    assert list(told) == list(plan)
    for name in ("tokens", "table", "nothing"):
        assert told[name].dtype == np.int32 and told[name].shape == plan[name].shape
        assert (told[name] == plan[name]).all()
    assert told["slots"].dtype == np.int64 and told["slots"].tolist() == plan["slots"].tolist()
    assert torch.from_numpy(told["slots"]).add_(1)[0] == (1 << 40) + 1, "it can be written to"
    assert [told[name] for name in ("lens", "count", "drawn", "lengths")] == [[3, 4], 7, True, None]


def test_a_rank_that_does_not_come_is_named() -> None:
    began = time.monotonic()
    missing = r"of 2 ranks, these have not come to 127.0.0.1:\d+ within 1 s: 1;"
    with listen("127.0.0.1") as server, pytest.raises(Unavailable, match=missing) as caught:
        meet(MANIFEST, "cpu", 1, place(0, server.getsockname()[1]), server)
    assert caught.value.reason == "RANK_MISSING" and time.monotonic() - began < 30


def test_a_rank_that_does_not_find_the_first_says_where_it_has_looked() -> None:
    began = time.monotonic()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # so that nobody else listens there
        port = silent.getsockname()[1]
        with pytest.raises(Unavailable, match=f"rank 1 of 2 has not found rank 0 within 1 s.* at 127.0.0.1:{port}"):
            meet(MANIFEST, "cpu", 1, place(1, port))
    assert time.monotonic() - began < 30


def test_ranks_of_different_engines_do_not_run_together() -> None:
    first, second = both(MANIFEST, msgspec.structs.replace(MANIFEST, engine_id="b" * 64))
    assert isinstance(first, FailedPrecondition) and first.reason == "RANKS_DIFFER"
    assert "rank 0 runs engine aaaa" in first.message and "rank 1 runs engine bbbb" in first.message
    assert isinstance(second, FailedPrecondition | Unavailable), "the first may have gone before it has looked"


def test_ranks_of_different_releases_do_not_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    releases = iter(["0.1.0", "0.2.0"])
    monkeypatch.setattr(meeting, "version", lambda _: next(releases))
    first, _ = both(MANIFEST, MANIFEST)
    assert isinstance(first, FailedPrecondition) and "enginehouse 0.1.0 with torch" in first.message
    assert "enginehouse 0.2.0 with torch" in first.message and first.message.endswith("and one release")


def test_ranks_that_cannot_be_divided_among_machines() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(FailedPrecondition, match="has 2 ranks, which cannot be divided among 3 machines"):
        find_place(FrameSocket(theirs), MANIFEST, "cpu", None, machines=3)


def test_a_stranger_is_no_rank() -> None:
    """Whoever connects to rank 0 and does not know what the ranks have told each other is sent away."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    theirs = dist.TCPStore("127.0.0.1", store.port, is_master=False)
    with ThreadPoolExecutor(1) as pool:
        gathering = pool.submit(_gather, store, "127.0.0.1", 2)
        port, secret = theirs.get("plans").decode().split()
        for said in (b"", b"1", b"guess 1", f"{secret} 7".encode(), b"\xff\xff"):
            with socket.create_connection(("127.0.0.1", int(port))) as stranger:
                FrameSocket(stranger).send(said)
                assert not stranger.recv(1)
        with socket.create_connection(("127.0.0.1", int(port))) as rank:
            FrameSocket(rank).send(f"{secret} 1".encode())
            (follower,) = gathering.result(timeout=60)
            follower.send(b"a plan")
            assert FrameSocket(rank).receive(60) == [b"a plan"]
        follower._socket.close()


def test_an_engine_for_more_gpus_than_there_are_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(FailedPrecondition, match="needs 2 GPUs, this node has 1") as caught:
        find_place(FrameSocket(theirs), MANIFEST, "cuda", None)
    assert caught.value.reason == "DEVICES_TOO_FEW"


def test_a_manifest_whose_mapping_has_other_ranks_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(FailedPrecondition, match="has 2 ranks and a mapping of 3"):
        wrong = msgspec.structs.replace(MANIFEST, mapping=Parallelism(3, 3, 1))
        find_place(FrameSocket(theirs), wrong, "cpu", None)


def test_the_first_rank_asks_for_the_others() -> None:
    ours, theirs = socket.socketpair()
    with ours, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(find_place, FrameSocket(theirs), MANIFEST, "cpu", None)
        (message,) = FrameSocket(ours).receive(60)
        told = FromWorker.FromString(message)
        assert told.ranks == 2
        with pytest.raises(OSError, match="in use"):  # nobody can take the port before the others have come
            socket.create_server(("127.0.0.1", told.port))
        ours.shutdown(socket.SHUT_RDWR)
        assert isinstance(asked.exception(timeout=60), ConnectionError), "it waits for no front that is gone"
        theirs.close()


class CountingStore(DirectoryStore):
    """Counts the bytes of blobs that are read."""

    bytes_read = 0

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.bytes_read += len(buffer)
        super().read_into(key, offset, buffer)


def test_a_rank_reads_its_own_weights_alone(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build(checkpoint, BuildConfig(tp_size=2, pp_size=2), store=DirectoryStore(tmp_path)).manifest
    alone = build(checkpoint, BuildConfig(), store=DirectoryStore(tmp_path)).manifest
    for rank, files in enumerate(manifest.ranks):
        store = CountingStore(tmp_path)
        loaded = begin_load(store, manifest.engine_id, NODE, which=lambda _, rank=rank: rank)
        with loaded.arriving:
            own = sum(file.size for file in files.weights)
            assert own == loaded.size and store.bytes_read == own + files.program.size
            assert own < alone.weight_bytes() / 2
    with pytest.raises(FailedPrecondition, match="is for 4 ranks, and one is to be loaded here"):
        load_engine(CountingStore(tmp_path), manifest.engine_id, NODE)


@pytest.mark.drill
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_the_runner_for_cuda_gives_the_plain_runners_tokens(tp: int, pp: int, tmp_path: Path) -> None:
    """Each rank a process, with Triton's interpreter and gloo, which sums what has more than 3 rows."""
    checkpoint = save_checkpoint(tmp_path / "tiny", num_hidden_layers=pp)
    limits = {"max_seq_len": 48, "max_batch_size": 4, "max_num_tokens": 24}
    expected = sequences()
    Engine(make_engine(checkpoint, tmp_path / "store", **limits)).run(expected)
    options = BuildConfig(tp_size=tp, pp_size=pp, **limits)
    engine_id = build(checkpoint, options, store=DirectoryStore(tmp_path / "store")).manifest.engine_id
    (held,) = hold_ports(1)
    command = [sys.executable, "-m", "tests.unit.rank_harness", str(tmp_path / "store"), engine_id]
    environment = {**os.environ, "ENGINEHOUSE_ALL_REDUCE_BYTES": str(3 * 48 * 4)}
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, **place(rank, held.getsockname()[1])},
            stdout=None if rank else subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told, _ = ranks[0].communicate(timeout=300)
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        held.close()
    assert json.loads(told) == [one.token_ids for one in expected]


@pytest.mark.drill
def test_ranks_that_torchrun_starts(tmp_path: Path) -> None:
    """They meet at torchrun's own store."""
    checkpoint = save_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    limits = {"max_seq_len": 48, "max_batch_size": 4, "max_num_tokens": 24}
    expected = sequences()
    Engine(make_engine(checkpoint, tmp_path / "store", **limits)).run(expected)
    engine_id = build(checkpoint, BuildConfig(tp_size=2, **limits), store=DirectoryStore(tmp_path / "store")).engine_id
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "tests.unit.rank_harness", str(tmp_path / "store"), engine_id],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(done.stdout) == [one.token_ids for one in expected]
