"""Which form of attention is fastest: prompts that begin (`prompt`, paged `prefill`, torch's libraries), and decodes; us a layer.

    python -m bench.attention [--out FILE.json] [--dry]

Llama-3.1-8B's heads (32 of 128, 8 of keys), bfloat16, decodes over caches of 8 bits, too; pages of 16 in random order. Each form
is checked against torch's SDPA.
--dry compiles and checks, and times nothing.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.serving import save
from executor_svc.kernels import paged, prompt
from executor_svc.kernels.decodes import decode
from executor_svc.kernels.paged import Form
from executor_svc.kernels.tuning import timed

HEADS, GROUPS, DIM, PAGE = 32, 8, 128, 16
SCALE = DIM**-0.5
PROMPTS = {
    "4096": [4096],
    "8 x 512": [512] * 8,
    "4 x 128": [128] * 4,
    "16 x 32-512": [32 * number for number in range(1, 17)],
}
DECODES = {
    "1 x 256": (1, 256),
    "8 x 256": (8, 256),
    "64 x 256": (64, 256),
    "256 x 256": (256, 256),
    "256 x 1024": (256, 1024),
}
SETS = 8  # of caches, so that what is read is not in the cache of the device


def ints(values: list[int]) -> Tensor:
    """int32 [n]."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def tiles(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Tiles of TILE queries, those with the most keys first."""
    at = [(first, row) for row, length in enumerate(lengths) for first in range(0, length, paged.TILE)]
    at.sort(key=lambda pair: -pair[0])
    return ints([row for _, row in at]), ints([first for first, _ in at])


def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Each prompt by itself."""
    parts = []
    for queries, keys, values in zip(*(part.split(lengths) for part in (q, k, v)), strict=True):
        heads = [part.view(1, len(part), -1, DIM).transpose(1, 2) for part in (queries, keys, values)]
        made = F.scaled_dot_product_attention(*heads, is_causal=True, scale=SCALE, enable_gqa=True)
        parts.append(made.transpose(1, 2).reshape(len(queries), -1))
    return torch.cat(parts)


class Table:
    """What was measured, printed as it comes."""

    def __init__(self, dry: bool) -> None:
        self._dry = dry
        self.found: dict[str, dict[str, float]] = {}

    def row(self, case: str, name: str, call: Callable[[int], Tensor], wanted: Tensor, work: float, unit: str) -> None:
        """Of a call with the number of a set. work: of one call, in units a microsecond."""
        try:
            made = call(0)
            error = ((made - wanted).norm() / wanted.norm()).item()
            if error > 0.01:
                print(f"{case:16} {name:32} WRONG: relative error {error:.3f}", flush=True)
                return
            if self._dry:
                return
            us = timed(call, list(range(SETS)))
        except Exception as failed:  # a form that needs more shared memory than there is
            print(f"{case:16} {name:32} {type(failed).__name__}: {str(failed)[:80]}", flush=True)
            return
        self.found.setdefault(case, {})[name] = round(us, 2)
        print(f"{case:16} {name:32} {us:9.1f} us {work / us:9.0f} {unit}", flush=True)


def prompts(table: Table, case: str, lengths: list[int]) -> None:
    """Prompts that begin, whose keys are where the product left them."""
    total = sum(lengths)
    q = torch.randn(total, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    packed = torch.randn(total, (HEADS + 2 * GROUPS) * DIM, device="cuda", dtype=torch.bfloat16)
    k, v = packed.split([HEADS * DIM, GROUPS * DIM, GROUPS * DIM], 1)[1:]
    k = k.contiguous()  # as `rope_write` keeps it
    wanted = sdpa(q, k, v, lengths)
    out = torch.zeros_like(q)
    starts, places = ints([0, *itertools.accumulate(lengths)]), tiles(lengths)
    flops = sum(2 * HEADS * DIM * length * (length + 1) for length in lengths) / 1e6
    for rows, keys, warps, stages in [
        (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 3),
    ]:  # fmt: skip
        form = Form(keys, warps, stages)

        def ours(_: int, form: Form = form, rows: int = rows) -> Tensor:
            prompt.prompt(q, k, v, starts, places, out, head_dim=DIM, scale=SCALE, rows=rows, form=form)
            return out

        table.row(case, f"prompt {rows} x {keys}, {warps} warps, {stages}", ours, wanted, flops, "TFLOP/s")
    pages = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(pages), device="cuda").int()
    block_tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device="cuda")
    caches = [torch.zeros(sum(pages) * PAGE, GROUPS * DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for row, part in enumerate(order.split(pages)):
        block_tables[row, : len(part)] = part
        at = torch.arange(lengths[row], device="cuda")
        for cache, new in zip(caches, (k, v), strict=True):
            cache[part[at // PAGE].long() * PAGE + at % PAGE] = new[starts[row] : starts[row + 1]]
    k_cache, v_cache = (cache.view(-1, PAGE, GROUPS, DIM) for cache in caches)
    all_rows, sizes = ints(list(range(len(lengths)))), ints(lengths)

    def by_pages(_: int) -> Tensor:
        paged.prefill(
            q, k_cache, v_cache, None, block_tables, all_rows, starts, sizes, places, out, scale=SCALE, window=0, soft_cap=0.0
        )  # fmt: skip
        return out

    table.row(case, "paged", by_pages, wanted, flops, "TFLOP/s")
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        if len(set(lengths)) > 1:
            break
        shape = (len(lengths), lengths[0], -1, DIM)
        heads = [part.view(shape).transpose(1, 2) for part in (q, k, v)]

        def library(_: int, backend: SDPBackend = backend, heads: list[Tensor] = heads) -> Tensor:
            with sdpa_kernel(backend):
                made = F.scaled_dot_product_attention(*heads, is_causal=True, scale=SCALE, enable_gqa=True)
            return made.transpose(1, 2).reshape(q.shape)

        table.row(case, name, library, wanted, flops, "TFLOP/s")


def decodes(table: Table, case: str, rows: int, length: int, dtype: torch.dtype) -> None:
    """One query a sequence, over a cache of a dtype."""
    pages = -(-length // PAGE)
    shape = (rows * pages, PAGE, GROUPS, DIM)
    caches = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2)] for _ in range(SETS)
    ]
    q, block_tables = (
        torch.randn(rows, HEADS * DIM, device="cuda", dtype=torch.bfloat16),
        torch.randperm(rows * pages, device="cuda").int().view(rows, pages),
    )
    k, v = (
        cache.bfloat16()[block_tables.long()].view(rows, pages * PAGE, GROUPS, DIM)[:, :length].transpose(1, 2)
        for cache in caches[0]
    )
    wanted = F.scaled_dot_product_attention(
        q.view(rows, HEADS, 1, DIM).float(), k.float(), v.float(), scale=SCALE, enable_gqa=True
    )
    wanted = wanted.reshape(q.shape).bfloat16()
    del k, v
    all_rows, lengths = ints(list(range(rows))), ints([length] * rows)
    arrived, out = ints([0] * rows * GROUPS), torch.zeros_like(q)
    moved = rows * length * GROUPS * DIM * 2 * dtype.itemsize / 1e3
    for form in itertools.starmap(Form, itertools.product((32, 64, 128), (1, 2, 4), (2, 3, 4))):

        def ours(number: int, form: Form = form) -> Tensor:
            decode(
                q, *caches[number], None, block_tables, all_rows, lengths, arrived, out, scale=SCALE, window=0, soft_cap=0.0,
                form=form,
            )  # fmt: skip
            return out

        table.row(case, f"keys {form.keys}, {form.warps} warps, {form.stages}", ours, wanted, moved, "GB/s")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only", choices=["prompts", "decodes"])
    arguments = parser.parse_args()
    table = Table(arguments.dry)
    if arguments.only != "prompts":
        for case, (rows, length) in DECODES.items():
            decodes(table, case, rows, length, torch.bfloat16)
            decodes(table, f"{case}, fp8", rows, length, torch.float8_e4m3fn)
            save(arguments.out, table.found)
    if arguments.only != "decodes":
        for case, lengths in PROMPTS.items():
            prompts(table, case, lengths)
            save(arguments.out, table.found)


if __name__ == "__main__":
    main()
