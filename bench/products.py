"""Which tactic multiplies which shape fastest; us a product, weights not cached.

    python -m bench.products [--kind dense fp8] [--rows 1 8 16 32 64] [--out FILE.json]

Llama-3.1-8B's shapes. Dense: bfloat16, with `silu_mul` in the time of gate and up. The floor: the weight at the speed of reading,
or the arithmetic at 716 (dense) and 1,432 TFLOP/s (8 bits), whichever takes longer.
"""

import argparse
import json
from pathlib import Path

import torch

from executor_svc.kernels import tactics
from executor_svc.kernels.tactics import Product, Tactic
from executor_svc.kernels.tuning import measure, timed

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = {"dense": [1, 2, 4, 8, 16, 32, 64], "fp8": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]}


def read_speed() -> float:
    """Bytes a microsecond, of a sum over 4 GB."""
    data = torch.zeros(1 << 30, device="cuda")
    speed = data.nbytes / timed(lambda one: one.sum(), [data])
    del data
    torch.cuda.empty_cache()
    return speed


def name_of(tactic: Tactic) -> str:
    """As the table prints it."""
    form = tactic.form
    return tactic.kernel if tactic == tactics.LIBRARY else f"{tactic.kernel} {form.n} x {form.k}, {form.stages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    speed = read_speed()
    print(f"{torch.cuda.get_device_name()}, reading at {speed / 1e3:.0f} GB/s")
    told = {}
    for kind in arguments.kind:
        width, peak = (2, 716e6) if kind == "dense" else (1, 1432e6)
        for name, (outputs, columns) in SHAPES.items():
            if kind == "fp8" and name == "head":  # which stays in 16 bits
                continue
            for rows in arguments.rows or ROWS[kind]:
                shape = Product(rows, outputs, columns, "pair" if kind == "dense" and name == "gate_up" else kind)
                found = measure(shape, tactics.candidates(shape), torch.bfloat16, alone=True)
                rule, best = found[tactics.choose(shape, {})], list(found.items())[:3]
                floor = max(width * outputs * columns / speed, 2 * rows * outputs * columns / peak)
                said = ", ".join(f"{name_of(tactic)} {us:.1f}" for tactic, us in best)
                print(f"{kind:6} {name:8} {rows:4} rows, floor {floor:.1f}, rule {rule:.1f}: {said}", flush=True)
                told[f"{kind} {name} {rows}"] = {"floor": round(floor, 1)} | {
                    name_of(tactic): round(us, 1) for tactic, us in found.items()
                }
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "us": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
