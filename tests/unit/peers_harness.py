"""One rank of several that sum by `kernels/reduce.py`, by Triton's interpreter or on a GPU each: peers_harness.py DEVICE ROUNDS

The environment says which rank. Each knows what the others give, and checks what comes against the references. Prints "the same".
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from engine.manifest import Parallelism
from engine.ops import add_rms_norm
from enginehouse.cluster import hold_ports
from executor_svc.group import Group
from executor_svc.kernels import fp8
from executor_svc.kernels.reduce import EMPTY, Buffers, all_reduce, all_reduce_norm, all_reduce_norm_small
from executor_svc.meeting import meet
from executor_svc.peers import make_buffers
from executor_svc.ranks import Ranks
from tests.unit.test_executor_ranks import MANIFEST, RANK

ROWS = 1100 if torch.cuda.is_available() else 11  # more than all programs send before they wait for the first
SIZES = [(torch.float32, 48), (torch.float16, 1000), (torch.bfloat16, 4096)]  # the interpreter adds nothing in bfloat16
EPS = 1e-5


def run_ranks(ranks: int, module: Sequence[str], patience: float = 300) -> list[str]:
    """What a module prints that runs as each of the ranks, in processes that are given so many seconds."""
    (held,) = hold_ports(1)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
    told |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    places = [{**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    command = [sys.executable, "-m", *module]
    running = [subprocess.Popen(command, env=place, stdout=subprocess.PIPE, text=True) for place in places]
    try:
        return [rank.communicate(timeout=patience)[0] for rank in running]
    finally:
        for rank in running:
            rank.kill()
            rank.wait()
        held.close()


def given(rank: int, rows: int, columns: int, dtype: torch.dtype, turn: int) -> Tensor:
    """A rank's numbers, with zeros of both signs, and at times what is no number."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(64 * turn + rank))
    x[:, ::7] = 0.0
    x[:, 1::7] = -0.0
    if turn % 5 == 4:
        x[0, 2:4] = torch.tensor([float("nan"), float("inf")])
    return x.to(dtype)


def summed(parts: list[Tensor]) -> Tensor:
    """In the order of the ranks, in float32."""
    total = torch.zeros(parts[0].shape)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)


def same(found: Tensor, wanted: Tensor, tolerance: float = 0.0) -> None:
    found, wanted = found.cpu().float(), wanted.cpu().float()
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def late(rank: int, turn: int, device: str) -> None:
    """At each turn other ranks are behind."""
    if (rank + turn) % 2:
        torch.cuda._sleep(100_000) if device == "cuda" else time.sleep(0.003)


def check_sums(buffers: Buffers, group: Group, rounds: int, device: str) -> None:
    """Of changing numbers of rows, alone and with what follows."""
    for turn in range(rounds):
        rows, ranks = 1 + turn * 307 % ROWS, group.tp_size
        parts = [given(rank, rows, buffers.columns, buffers.dtype, turn) for rank in range(ranks + 2)]
        wanted = summed(parts[:ranks])
        residual, weight = (part.nan_to_num(0, 1).to(device) for part in (parts[ranks], parts[ranks + 1][0]))
        x = parts[buffers.rank].to(device)
        late(buffers.rank, turn, device)
        same(all_reduce(x, buffers), wanted)
        normed, total = add_rms_norm(wanted.to(device), residual, weight, eps=EPS)
        late(buffers.rank, turn // 2, device)
        found = all_reduce_norm(x, residual, weight, EPS, buffers)
        same(found[1], total)
        same(found[0], normed, 0.01)
        if not fp8.able() or buffers.dtype is torch.float32 or not wanted.isfinite().all():
            continue
        for kind, input_scale in ((torch.int8, None), (fp8.F8, None), (fp8.F8, torch.tensor([0.02], device=device))):
            small = all_reduce_norm_small(x, residual, weight, input_scale, EPS, kind, buffers)
            q, scales, _ = fp8.norm(wanted.to(device), residual, weight, input_scale, EPS, kind)
            ours, theirs = (small[0].float() * small[1]).cpu(), (q.float() * scales).cpu()
            same(ours, theirs, 0.13)  # a sum in another order may round a number to the next one
            assert torch.isclose(ours, theirs, rtol=0.02, atol=0.02).float().mean() > 0.99
            same(small[2], total)


def check_graph(buffers: Buffers, group: Group, rounds: int) -> None:
    """Of three sums, so that each replay begins with the other half of the buffers."""
    ranks, rows = group.tp_size, ROWS
    x, residual = (torch.zeros(rows, buffers.columns, dtype=buffers.dtype, device="cuda") for _ in range(2))
    weight = torch.ones(buffers.columns, dtype=buffers.dtype, device="cuda")

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        first = all_reduce(x, buffers)
        normed, total = all_reduce_norm(x, residual, weight, EPS, buffers)
        return first, total, all_reduce(normed, buffers)

    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = compute()
    for turn in range(rounds):
        parts = [given(rank, rows, buffers.columns, buffers.dtype, turn) for rank in range(ranks + 1)]
        x.copy_(parts[buffers.rank])
        residual.copy_(parts[ranks])
        late(buffers.rank, turn, "cuda")
        graph.replay()
        wanted = summed(parts[:ranks]).cuda()
        normed, total = add_rms_norm(wanted, residual, weight, eps=EPS)
        same(found[0], wanted)
        same(found[1], total)
        same(found[2], summed([normed.cpu()] * ranks), 0.02)


def refused(group: Ranks, device: str) -> bool:
    """Whether all ranks do without where the last one has no memory to give."""
    if device == "cuda":
        return make_buffers(group, 1 << 26, 1 << 14, torch.bfloat16, torch.device(device)) is None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == group.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    buffers = make_buffers(group, ROWS, 8, torch.float32, torch.device(device))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return buffers is None


def main(device: str, rounds: int) -> None:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks = int(os.environ["WORLD_SIZE"])
    manifest = msgspec.structs.replace(MANIFEST, mapping=Parallelism(ranks, ranks, 1), ranks=(RANK,) * ranks)
    group = meet(manifest, device, 60)
    assert refused(group, device)
    with torch.inference_mode():
        for dtype, columns in SIZES[: 3 if device == "cuda" else 2]:
            buffers = make_buffers(group, ROWS, columns, dtype, torch.device(device))
            assert buffers is not None
            check_sums(buffers, group, rounds, device)
            if device == "cuda":
                check_graph(buffers, group, rounds)
            group.least(0)  # all of them have ended
            if device == "cpu":
                assert (group._shared[-1]._kept[0] == EMPTY[dtype] - (1 << 32)).all(), (
                    "a place is left that is not empty"
                )
    print("the same", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    os._exit(0)
