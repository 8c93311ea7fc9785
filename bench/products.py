"""Which tactic multiplies which shape fastest: cuBLAS, `products.gemv` and `products.thin` in several forms; us a product.

    python -m bench.products [--rows 1 8 16 32 64]

Llama-3.1-8B's shapes in bfloat16; weights are not cached. Of gate and up, `silu_mul` of the product is part of what is timed.
"""

import argparse

import torch

from executor_svc.kernels import tactics
from executor_svc.kernels.tactics import Shape, Tactic

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}


def read_speed() -> float:
    """Bytes a microsecond, of a sum over 4 GB."""
    data = torch.zeros(1 << 30, device="cuda")
    return data.nbytes / tactics.timed(lambda one: one.sum(), [data])


def name_of(tactic: Tactic) -> str:
    """As the table prints it."""
    return (
        tactic.kernel
        if tactic == tactics.CUBLAS
        else f"{tactic.kernel} {tactic.form.n} x {tactic.form.k}, {tactic.form.stages}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    arguments = parser.parse_args()
    speed = read_speed()
    print(f"{torch.cuda.get_device_name()}, reading at {speed / 1e3:.0f} GB/s")
    for name, (outputs, columns) in SHAPES.items():
        for rows in arguments.rows:
            shape = Shape(rows, outputs, columns, name == "gate_up")
            found = tactics.measure(shape, tactics.candidates(shape), torch.bfloat16)
            rule = tactics.choose(shape, {})
            best = ", ".join(f"{name_of(tactic)} {us:.1f}" for tactic, us in list(found.items())[:3])
            floor = 2 * outputs * columns / speed
            print(
                f"{name:8} {rows:3} rows, floor {floor:.1f}, cuBLAS {found[tactics.CUBLAS]:.1f}, rule {found[rule]:.1f}: {best}",
                flush=True,
            )


if __name__ == "__main__":
    main()
