"""Which tactic multiplies which shape fastest; us a product, weights not cached.

    python -m bench.products [--kind dense fp8 int4 int8 w8a8] [--rows 1 8 16 32 64] [--out FILE.json]

Llama-3.1-8B's shapes. Dense: bfloat16, with `silu_mul` in the time of gate and up. The floor: the weight at the speed of reading,
or the arithmetic at 716 T/s (of 16 bits) and 1,432 (of 8), whichever takes longer. int4 is in groups of 128; beside it and int8
the same product of bfloat16, by its rule, where packed ones are never to be slower.
"""

import argparse
from pathlib import Path

import torch

from bench.serving import save
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
FEW, MANY = [1, 2, 4, 8, 16, 32, 64], [128, 256, 512, 1024, 4096]
ROWS = {"dense": FEW, "fp8": FEW + MANY, "int4": FEW + MANY, "int8": FEW + MANY, "w8a8": FEW + MANY}
KINDS = {"int4": "int4/128"}  # as a table has them
WIDTHS = {"dense": 2, "int4": 0.5 + 2 / 128}  # bytes of a weight


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
    if tactic == tactics.LIBRARY:
        return tactic.kernel
    return f"{tactic.kernel} {form.n} x {form.k}, {form.stages}, {form.warps}" + (
        f" / {form.splits}" if form.splits > 1 else ""
    )


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
        width, peak = WIDTHS.get(kind, 1), 1432e6 if kind in tactics.EIGHT else 716e6
        for name, (outputs, columns) in SHAPES.items():
            if kind != "dense" and name == "head":  # which stays in 16 bits
                continue
            for rows in arguments.rows or ROWS[kind]:
                shape = Product(
                    rows, outputs, columns, "pair" if kind == "dense" and name == "gate_up" else KINDS.get(kind, kind)
                )
                found = measure(shape, tactics.candidates(shape), torch.bfloat16, alone=True)
                rule, best = found[tactics.choose(shape, {})], list(found.items())[:3]
                floor = max(width * outputs * columns / speed, 2 * rows * outputs * columns / peak)
                beside = ""
                if kind in ("int4", "int8"):
                    plain = Product(rows, outputs, columns, "dense")
                    took = measure(plain, [tactics.choose(plain, {})], torch.bfloat16, alone=True)
                    beside = f", bfloat16 {min(took.values()):.1f}"
                said = ", ".join(f"{name_of(tactic)} {us:.1f}" for tactic, us in best)
                print(
                    f"{kind:6} {name:8} {rows:4} rows, floor {floor:.1f}, rule {rule:.1f}{beside}: {said}", flush=True
                )
                told[f"{kind} {name} {rows}"] = {"floor": round(floor, 1)} | {
                    name_of(tactic): round(us, 1) for tactic, us in found.items()
                }
            save(arguments.out, {"us": told})


if __name__ == "__main__":
    main()
