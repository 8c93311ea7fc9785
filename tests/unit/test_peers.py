"""Ranks that sum by themselves, through memory that they share: here by Triton's interpreter, each rank a process."""

import os
from pathlib import Path

import pytest
import torch
from test_fp8 import CONFIGS, SCALES, floats, make, no_head, save_quantized

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import blobs
from engine.directory import DirectoryStore
from engine.errors import InvalidArgument
from engine.manifest import Parallelism
from executor_svc import peer_memory
from executor_svc.group import ALONE, Group
from executor_svc.ranks import Ranks
from tests.conftest import save_checkpoint

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on the device")
fuse = pytest.importorskip("executor_svc.kernels.fuse")
peers = pytest.importorskip("executor_svc.peers")
harness = pytest.importorskip("tests.unit.peers_harness")
archives = pytest.importorskip("executor_svc.kernel_archive")


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 3), pytest.param(4, 2, marks=pytest.mark.drill)])
def test_sums_equal_the_references(ranks: int, rounds: int) -> None:
    assert harness.run_ranks(ranks, ["tests.unit.peers_harness", "cpu", str(rounds)]) == ["the same\n"] * ranks


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 64,
    }
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", **size)


def test_what_is_fused(plain: Path, tmp_path: Path) -> None:
    _, half = make(plain, tmp_path / "store", dtype="float16", tp_size=2)
    assert [op.op for op in fuse.fuse(half, sums=True).ops] == [
        *("rope_table", "embedding_shard", "all_reduce", "rms_norm", "linear", "split", "rope_attention", "linear"),
        *("all_reduce_add_rms_norm", "linear_silu_mul", "linear", "all_reduce", "gather", "gather", "add_rms_norm", "linear"),
        "all_gather",
    ]  # fmt: skip
    assert [op.op for op in fuse.fuse(half).ops].count("all_reduce") == 3
    config, shape, _ = CONFIGS["by token"]
    save_quantized(plain, tmp_path / "checkpoint", config, no_head(floats(None, shape)), **SCALES)
    _, small = make(tmp_path / "checkpoint", tmp_path / "store", dtype="float16", tp_size=2)
    (fused,) = [op for op in fuse.fuse(small, sums=True).ops if op.op == "all_reduce_add_rms_norm_fp8"]
    (summed,) = [op for op in fuse.fuse(small).ops if op.op == "add_rms_norm_fp8"]
    assert fused.inputs[1:] == summed.inputs[1:] and fused.outputs == summed.outputs and fused.attrs == summed.attrs


class Pair(Group):
    """Of two ranks, whose memory this one can reach; a GPU's is not here."""

    def most_shared(self) -> int:
        return peer_memory.most_bytes(2)

    def share(self, size: int, fill: int) -> list[int]:
        return [1 << 40, (1 << 40) + size]


def test_who_sums_by_itself(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = make(plain, tmp_path / "store", dtype="float16", tp_size=2)
    pair = Pair(1, Parallelism(2, 2, 1))
    device = torch.device("cpu")
    buffers = peers.open_buffers(program, pair, 1 << 30, device)
    assert (buffers.rank, buffers.columns, buffers.dtype, buffers.rows) == (1, 64, torch.float16, 1 << 19)
    row = torch.empty(1, 64, dtype=torch.float16)
    assert buffers.take(row) and buffers.take(row.expand(1 << 19, 64))
    others = (row.expand(1 + (1 << 19), 64), row.expand(0, 64), row.float(), torch.empty(1, 32, dtype=torch.float16))
    assert not any(map(buffers.take, others))
    assert peers.open_buffers(program, pair, 300, device).rows == 300
    assert peers.open_buffers(program, ALONE, 300, device) is None
    assert [peer_memory.default_bytes(ranks) >> 10 for ranks in (1, 2, 4, 8)] == [65536, 65536, 2730, 1170]
    for value in ("-1", "much", str(1 << 30)):
        monkeypatch.setenv("ENGINEHOUSE_ALL_REDUCE_BYTES", value)
        with pytest.raises(InvalidArgument, match=f"{value}', expected bytes up to 67108864, or 0 for NCCL alone"):
            peers.open_buffers(program, pair, 300, device)
    for name, value in (("ENGINEHOUSE_ALL_REDUCE_BYTES", "0"), ("NCCL_P2P_DISABLE", "1")):
        monkeypatch.delenv("ENGINEHOUSE_ALL_REDUCE_BYTES", raising=False)
        monkeypatch.setenv(name, value)
        assert peers.open_buffers(program, pair, 300, device) is None


@pytest.mark.parametrize(
    ("tp", "pp", "here", "shared"), [(2, 2, 2, True), (4, 1, 2, False), (2, 1, 1, False), (1, 2, 2, False)]
)
def test_a_group_on_several_machines_leaves_it_to_nccl(
    tp: int, pp: int, here: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks.__new__(Ranks)
    Group.__init__(ranks, 0, Parallelism(tp * pp, tp, pp))
    ranks.here = here
    monkeypatch.setattr(ranks, "least", lambda number: number)  # all say the same
    assert bool(ranks.most_shared()) is shared


@pytest.mark.drill
def test_kernels_travel_for_both_ways(plain: Path, tmp_path: Path) -> None:
    """With memory that the ranks share, and without."""
    limits = {"max_batch_size": 1, "max_seq_len": 32, "max_num_tokens": 16}
    options = BuildConfig(
        device="cuda", dtype="bfloat16", compute_capability="9.0", tp_size=2, dummy_weights=True, **limits
    )
    store = DirectoryStore(tmp_path / "store")
    one, other = (rank.kernels[0] for rank in build(plain, options, store=store).manifest.ranks)
    assert one == other
    archives.unpack(blobs.read(store, one), tmp_path)
    assert len([*tmp_path.glob("*/_reduce.cubin")]) == 2, "alone, and with the norm behind it"
    assert len([*tmp_path.glob("*/_norm.cubin")]) == 2, "behind the embedding, and of a residual"
