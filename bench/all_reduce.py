"""How long a sum over a tensor-parallel group takes: ours, alone and with the norm behind it, beside the library's (NCCL).

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.all_reduce [--columns 4096] [--rows 1 8 64 ...]
        [--per-warp 512] [--torch] [--timeout 120] [--out FILE.json]

Microseconds of one of 64 in a CUDA graph, in which one follows the other; medians of 30 replays, rank 0's. In bfloat16. --torch
adds torch's own one-shot kernel. It ends with status 3 after --timeout seconds: then a rank waits for what does not come.
Without a GPU, with TRITON_INTERPRET=1, all runs once, in float16, and the times say nothing.
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as in workers: no multicast
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
import torch.distributed as dist
from torch import Tensor

from bench.serving import save
from engine.manifest import Parallelism
from executor_svc.kernels import reduce, rows
from executor_svc.peers import make_buffers
from executor_svc.ranks import Ranks

IN_SEQUENCE = 64
REPLAYS = 30
EPS = 1e-5
ON_GPU = torch.cuda.is_available()


def join() -> Ranks:
    """The group that torchrun has started."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    address = os.environ["MASTER_ADDR"]
    store = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False)
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if ON_GPU else "cpu"
    return Ranks(rank, Parallelism(size, size, 1), store, address, device, here=here, host=address)


def microseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    run()
    if not ON_GPU:
        began = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(IN_SEQUENCE):
            run()
    took = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(1e3 * begin.elapsed_time(end) / IN_SEQUENCE)
    return statistics.median(took)


def one_shot(size: int, dtype: torch.dtype) -> Callable[[], Tensor] | None:
    """torch's kernel of the same kind, with memory of its own; None where there is none."""
    if not ON_GPU:
        return None
    try:
        import torch.distributed._symmetric_memory as symmetric

        name = dist.group.WORLD.group_name
        x = symmetric.empty(size, dtype=dtype, device=f"cuda:{torch.cuda.current_device()}").zero_()
        symmetric.rendezvous(x, name)
        return partial(torch.ops.symm_mem.one_shot_all_reduce, x, "sum", name)
    except Exception as error:
        print(f"no symmetric memory: {error}")
        return None


def measure(group: Ranks, count: int, columns: int, dtype: torch.dtype, beside: bool) -> dict[str, float]:
    """Of so many rows, by kind."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    buffers = make_buffers(group, count, columns, dtype, device)
    x, residual, weight = (
        torch.randn(part, device=device).to(dtype) for part in ((count, columns), (count, columns), columns)
    )
    zeros = torch.zeros_like(x)  # which stay what they are when NCCL sums them where they lie
    kinds: dict[str, Callable[[], object]] = {}
    if buffers:
        found, wanted = reduce.all_reduce(x, buffers), group.all_reduce(x.clone())
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
        kinds["ours"] = partial(reduce.all_reduce, x, buffers)
        kinds["ours_norm"] = partial(reduce.all_reduce_norm, x, residual, weight, EPS, buffers)
    kinds["library"] = partial(group.all_reduce, zeros)
    kinds["library_norm"] = lambda: rows.norm(group.all_reduce(zeros), residual, weight, EPS)
    if beside and (theirs := one_shot(count * columns, dtype)):
        kinds["torch_one_shot"] = theirs
    kinds["norm_alone"] = partial(rows.norm, x, residual, weight, EPS)
    return {kind: round(microseconds(run), 2) for kind, run in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 128, 256, 1024, 4096])
    parser.add_argument(
        "--per-warp", type=int, default=reduce.PER_WARP, help="numbers of a row that a warp has, at least"
    )
    parser.add_argument("--torch", action="store_true", help="with torch's kernel")
    parser.add_argument("--timeout", type=float, default=120, help="seconds")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    watch = threading.Timer(arguments.timeout, os._exit, (3,))
    watch.daemon = True
    watch.start()
    reduce.PER_WARP = arguments.per_warp
    group = join()
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for count in arguments.rows:
            here = measure(group, count, arguments.columns, dtype, arguments.torch)
            if group.rank == 0:
                if not found:
                    print(f"{'rows':>6}" + "".join(f"{kind:>16}" for kind in here))
                print(f"{count:6}" + "".join(f"{time:16.2f}" for time in here.values()), flush=True)
            found[str(count)] = here
    group.least(0)
    if group.rank == 0:
        save(arguments.out, {"ranks": group.size, "columns": arguments.columns, "us": found})
    os._exit(0)  # as a worker does: NCCL's threads would wait


if __name__ == "__main__":
    main()
