"""Which kernel multiplies in 8 bits fastest; us a product of an 8B's layers, weights not cached.

    python -m bench.products_fp8 [--rows 1 8 64] [--shapes qkv o gate_up down] [--forms] [--out FILE.json]

What `fp8.product` chooses now; torch's product with a scale a row, and with one scale for all, which is no answer but a bound;
`fp8.gemv`, `tiles` and `bulk` in several forms. The floor: the weight at 2,970 GB/s, or the arithmetic at 1,432 TFLOP/s,
whichever takes longer.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from executor_svc.kernels import fp8
from executor_svc.kernels.tactics import timed

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = [1, 2, 4, 8, 16, 64, 128, 256, 512, 4096]
BYTES = 400e6  # of weights that one graph reads: more than the caches hold
BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
Product = Callable[[Tensor], Tensor]


def products(size: int, weight: Tensor) -> tuple[Tensor, dict[str, Product]]:
    """The exact product, and kernels by name."""
    outputs, columns = weight.shape
    q = torch.randn(size, columns, device="cuda").to(F8)
    q_scales, scales = torch.rand(size, 1, device="cuda"), torch.rand(outputs, 1, device="cuda") / 64
    one = torch.ones((), device="cuda")
    rest = {"scales": scales, "bias": None, "dtype": BF16}
    found: dict[str, Product] = {
        "now": functools.partial(fp8.product, q, q_scales, **rest),
        "scaled_mm": functools.partial(fp8.library, q, q_scales, scales=scales),
        "scaled_mm slow": functools.partial(fp8.library, q, q_scales, scales=scales, fast=False),
        "one scale": lambda w: torch._scaled_mm(q, w.t(), one, one, out_dtype=BF16, use_fast_accum=True),
    }
    for out, block, warps in ((1, 2048, 4), (2, 2048, 4), (1, 4096, 4), (2, 4096, 8)):
        if size == 1 or (size in (2, 4) and out == 1):
            form = {"out": out, "block": block, "warps": warps}
            found[f"gemv {out} {block} {warps}"] = functools.partial(fp8.gemv, q, q_scales, **rest, **form)
    for n, k, stages in ((128, 128, 4), (256, 128, 3), (64, 128, 4)) if size > 64 else ():
        form = {"n": n, "k": k, "stages": stages}
        found[f"bulk {n} {k} {stages}"] = functools.partial(fp8.bulk, q, q_scales, **rest, **form)
    few = ((64, 64, 256, 5, 4), (64, 64, 256, 3, 4), (64, 64, 128, 5, 4), (64, 32, 256, 5, 4))
    for m, n, k, stages, warps in few if size <= 64 else ((128, 64, 128, 4, 4),):
        form = {"m": m, "n": n, "k": k, "stages": stages, "warps": warps}
        found[f"tiles {m} {n} {k} {stages} {warps}"] = functools.partial(fp8.tiles, q, q_scales, **rest, **form)
    return (((q.float() @ weight.float().T) * q_scales) * scales.view(-1)).to(BF16), found


def measure(exact: Tensor, kernels: dict[str, Product], weights: list[Tensor]) -> dict[str, float]:
    """us of those that are right; it says which are not, and how exact the others are."""
    found: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, product in kernels.items():
        try:
            wrong = (product(weights[0]).float() - exact.float()).norm() / exact.float().norm()
            if name == "one scale" or wrong < 0.03:
                errors[name], found[name] = float(wrong), timed(product, weights)
            else:
                print(f"  {name}: wrong by {wrong:.1e}", flush=True)
        except Exception as failed:  # more shared memory than there is, sizes that it does not take
            print(f"  {name}: {type(failed).__name__} {str(failed)[:100]}", flush=True)
    known = {name: errors[name] for name in ("now", "scaled_mm", "scaled_mm slow") if name in errors}
    if known:
        print("  errors: " + ", ".join(f"{name} {error:.1e}" for name, error in known.items()))
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--forms", action="store_true", help="print all forms, not the best three")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    told = {}
    for name in arguments.shapes:
        outputs, columns = SHAPES[name]
        count = max(2, int(BYTES / (outputs * columns)))
        weights = [torch.randn(outputs, columns, device="cuda", dtype=BF16).to(F8) for _ in range(count)]
        for size in arguments.rows:
            floor = max(outputs * columns / 2.97e6, 2 * size * outputs * columns / 1432e6)
            exact, kernels = products(size, weights[0])
            found = measure(exact, kernels, weights if size < 4096 else weights[:2])
            fixed = [form for form in ("now", "scaled_mm", "scaled_mm slow", "one scale") if form in found]
            best = sorted(found.keys() - set(fixed), key=found.__getitem__)[: None if arguments.forms else 3]
            said = ", ".join(f"{form} {found[form]:.1f}" for form in (*fixed, *best))
            print(f"{name:8} {size:4} rows, floor {floor:.1f}: {said}", flush=True)
            told[f"{name} {size}"] = {"floor": round(floor, 1)} | {form: round(us, 1) for form, us in found.items()}
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "us": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
