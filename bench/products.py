"""Which kernel multiplies which shape fastest: cuBLAS, and `rows.thin` in several forms; us a product, weights not cached.

python -m bench.products [--rows 8 16 32 64]
"""

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.kernels import rows

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}


def timed(function: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    """us a call, by a graph over all weights."""
    for weight in weights:
        function(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            function(weight)
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times)[3] / len(weights)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--forms", action="store_true", help="print all forms, not the best three")
    arguments = parser.parse_args()
    for name, (outputs, columns) in SHAPES.items():
        count = max(2, int(400e6 / (2 * outputs * columns)))
        weights = [torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(count)]
        floor = 2 * outputs * columns / 2.97e6
        for size in arguments.rows:
            x = torch.randn(size, columns, device="cuda", dtype=torch.bfloat16)
            wanted = F.linear(x, weights[0])
            found = {"cublas": timed(lambda w, x=x: F.linear(x, w), weights)}
            for n, k, stages, warps in itertools.product((16, 32, 64), (128, 256), (3, 5), (4, 8)):
                form = {"n": n, "k": k, "stages": stages, "warps": warps}
                try:
                    error = (rows.thin(x, weights[0], None, **form) - wanted).norm() / wanted.norm()
                    if error < 0.02:
                        found[str(tuple(form.values()))] = timed(
                            lambda w, x=x, form=form: rows.thin(x, w, None, **form), weights
                        )
                except Exception as failed:  # a form that needs more shared memory than there is
                    found.setdefault(f"{type(failed).__name__}", float("inf"))
            best = sorted(found.items(), key=lambda pair: pair[1])[: None if arguments.forms else 3]
            said = ", ".join(f"{form} {us:.1f}" for form, us in best)
            print(f"{name:8} {size:3} rows, floor {floor:.1f}, cublas {found['cublas']:.1f}: {said}", flush=True)


if __name__ == "__main__":
    main()
