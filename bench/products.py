"""Which kernel multiplies which shape fastest: cuBLAS, `products.gemv` and `products.thin` in several forms; us a product.

    python -m bench.products [--rows 1 8 16 32 64] [--dry]

Weights are not cached. Of gate and up, `silu_mul` of the product is part of what is timed.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.kernels import products, rows
from executor_svc.kernels.products import Form

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}


def timed(function: Callable[[Any], Tensor], sets: list[Any]) -> float:
    """us a call, by a graph of a call with each of the sets."""
    for one in sets:
        function(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in sets:
            function(one)
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times)[3] / len(sets)


def read_speed() -> float:
    """bytes a microsecond of a sum over 4 GB."""
    data = torch.zeros(1 << 30, device="cuda")
    return 4 * 2**30 / timed(lambda one: one.sum(), [data])


def candidates(size: int, pair: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Of a number of rows: name -> product of x with a weight."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cublas": F.linear}
    if pair:
        found = {"cublas": lambda x, w: rows.silu_mul(F.linear(x, w))}
    if size <= 4:
        for block in (1024, 2048):
            found[f"gemv {block}"] = lambda x, w, block=block: products.gemv(x, w, None, pair=pair, block=block)
        if pair:
            found["gemv, silu_mul"] = lambda x, w: rows.silu_mul(products.gemv(x, w, None))
    forms = itertools.product((32, 64), (128, 256), (3, 4, 5), (4,), (False, True))
    for form in itertools.starmap(Form, forms):
        found[str(tuple(form))] = lambda x, w, form=form: products.thin(x, w, None, form, pair=pair)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--forms", action="store_true", help="print all forms, not the best three")
    parser.add_argument("--dry", action="store_true", help="compile and check, time nothing")
    arguments = parser.parse_args()
    speed = read_speed()
    print(f"reading: {speed / 1e3:.0f} GB/s")
    for name, (outputs, columns) in SHAPES.items():
        count = max(2, int(400e6 / (2 * outputs * columns)))
        weights = [torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(count)]
        floor = 2 * outputs * columns / speed
        for size in arguments.rows:
            x = torch.randn(size, columns, device="cuda", dtype=torch.bfloat16)
            found, wanted = {}, None
            for form, product in candidates(size, name == "gate_up").items():
                try:
                    made = product(x, weights[0])
                    wanted = made if wanted is None else wanted
                    if (made - wanted).norm() / wanted.norm() > 0.02:
                        print(f"{name} {size} rows: {form} is WRONG")
                    elif not arguments.dry:
                        found[form] = timed(lambda w, x=x, product=product: product(x, w), weights)
                except Exception as failed:  # a form that needs more shared memory than there is
                    found.setdefault(f"{type(failed).__name__}", float("inf"))
            best = sorted(found.items(), key=lambda pair: pair[1])[: None if arguments.forms else 4]
            said = ", ".join(f"{form} {us:.1f}" for form, us in best)
            print(f"{name:8} {size:3} rows, floor {floor:.1f}, cublas {found.get('cublas', 0):.1f}: {said}", flush=True)


if __name__ == "__main__":
    main()
