"""Which kernel multiplies how: a table by the number of rows and the shape of the weight, measured where an engine is built.

Without a table, or for a shape that it has not, a rule that was right on an H100 and an H200 (bench/products.py).
"""

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_svc.kernels import fp8, fp8_gemv, integers, products, rows
from executor_svc.kernels.integers import Packed
from executor_svc.kernels.products import Form
from executor_svc.kernels.target import capability

MOST_ROWS = 64  # with more, dense products take as long as their arithmetic, and cuBLAS is fastest

FEW_ROWS = 16  # up to which warps by themselves multiply with integers, and not the four of a warpgroup
FEW_TILES = 256  # rows up to which a product of 8 bits may have fewer tiles than the device has multiprocessors


class Product(NamedTuple):
    """A product: up to so many rows, a power of 2, with a weight [outputs, columns].

    kind: "dense", "pair" (`silu_mul` of the product), "fp8" (`product_fp8`), "w8a8" (`product_int8`), "int8" (`linear_int8`) or
    "int4/" and the inputs that a tile may take at once (`linear_int4`).
    """

    rows: int
    outputs: int
    columns: int
    kind: str


class Tactic(NamedTuple):
    """kernel: "library" (cuBLAS, or torch's for 8 bits; of integers with a matrix that is made of them).

    For dense weights "gemv", of one row, by blocks of form.k columns, and "thin"; for 8 bits and fewer "tiles" and "bulk", and
    for one row of float8, of a multiple of 16 inputs, "gemv".
    """

    kernel: str
    form: Form = Form()


Table = dict[Product, Tactic]
_SHARED = 227 << 10  # bytes of shared memory that a program may have on Hopper
EIGHT = ("fp8", "w8a8")  # whose input is of 8 bits, too
RULE: Table = {}  # no table: the rule alone
LIBRARY = Tactic("library")
# Of integers: kernel, n, k, stages and warps, the rule's first. Of few rows tiles take several groups, of more one.
_WIDE = (("tiles", 64, 512, 2, 4), ("tiles", 64, 256, 2, 4), ("tiles", 64, 256, 2, 2), ("tiles", 128, 512, 2, 4))
_BYTES = (("tiles", 64, 256, 4, 4), ("tiles", 32, 256, 4, 2), ("tiles", 128, 256, 3, 4), ("tiles", 32, 128, 8, 2))
_NARROW = (("tiles", 64, 128, 5, 2), ("tiles", 32, 128, 8, 2))
_MANY = (("bulk", 128, 128, 4, 8), ("bulk", 256, 128, 3, 8), ("tiles", 64, 128, 4, 4))
_BLOCKS = ((128, 3), (128, 4), (128, 5), (128, 8), (256, 3), (256, 5))
# Of float8 one row: rows of the weight and inputs of a block, warps; few rows: inputs of a tile, stages and splits.
_LINES = ((2, 1024, 1), (1, 1024, 1), (2, 512, 1), (2, 1024, 2))
_TILES = (
    (256, 5, 1), (256, 6, 1), (512, 4, 1), (512, 3, 1), (256, 5, 2), (256, 6, 2), (256, 3, 4), (128, 5, 1), (128, 3, 1),
)  # fmt: skip


def shape_of(x: Tensor, weight: Tensor, kind: str) -> Product:
    """Of a product with at least one row."""
    return Product(power(len(x)), *weight.shape, kind)


def power(rows: int) -> int:
    """The power of 2 that a table has these rows under."""
    return 1 << (rows - 1).bit_length()


def choose(shape: Product, table: Table) -> Tactic:
    """The table's, or the rule's."""
    if found := table.get(shape):
        return found
    if shape.kind.startswith("int"):
        return _rule_packed(shape)
    return _rule_fp8(shape) if shape.kind in EIGHT else _rule(shape)


def _rule(shape: Product) -> Tactic:
    elements = shape.outputs * shape.columns
    large = elements > 100_000_000
    if shape.rows == 1:
        return Tactic("gemv", Form(k=2048 if large else 1024))
    if large:
        return Tactic("thin", Form(stages=3 if elements > 400_000_000 or shape.rows > 32 else 4))
    if shape.rows <= 16:
        return Tactic("thin", Form(k=256) if shape.outputs <= 4096 else Form())
    return Tactic("thin") if shape.rows <= 32 and shape.columns <= 8192 else LIBRARY


def _rule_fp8(shape: Product) -> Tactic:
    if shape.rows > MOST_ROWS:
        return LIBRARY
    large = shape.outputs * shape.columns > 100_000_000
    if not large and (lines := _lines(shape)):
        return lines[0]
    halves = shape.outputs <= 4096 <= shape.columns
    return Tactic("tiles", Form(k=128 if large and shape.rows > 32 else 256, splits=2 if halves else 1))


def _lines(shape: Product) -> list[Tactic]:
    """Of products that `fp8_gemv` takes."""
    takes = shape.rows == 1 and shape.kind == "fp8" and shape.columns % 16 == 0
    return [Tactic("gemv", Form(n, k, warps=warps)) for n, k, warps in _LINES] if takes else []


def _rule_packed(shape: Product) -> Tactic:
    if shape.rows > MOST_ROWS:
        return LIBRARY
    kernel, n, k, stages, warps = _packed(shape)[0]
    return Tactic(kernel, Form(n, k, stages, warps, _splits(shape, n, warps)))


def _packed(shape: Product) -> tuple[tuple[str, int, int, int, int], ...]:
    """Forms for products with integers."""
    if shape.rows > FEW_ROWS:
        return _MANY if shape.rows <= MOST_ROWS else ()
    return _BYTES if shape.kind == "int8" else _WIDE if shape.rows <= 4 else _NARROW


def _splits(shape: Product, n: int, warps: int) -> int:
    """As many parts as bring 16 warps to each multiprocessor of an H100, of 512 inputs at least.

    And so few that writing and reading their sums, in the cache, is at most as much as the weight if it is of 4 bits.
    """
    wanted, most = 16 // warps * 132 * n // shape.outputs, min(shape.columns // 512, shape.columns // (16 * shape.rows))
    return 1 << max(0, min(wanted, most, 8).bit_length() - 1)


def candidates(shape: Product) -> list[Tactic]:
    """What could be fastest."""
    forms: list[tuple[str, Form]] = []
    if shape.kind.startswith("int"):
        forms += [(kernel, Form(*form, splits)) for kernel, *form in _packed(shape) for splits in (1, 2, 4, 8)]
        return [LIBRARY, *(Tactic(*form) for form in forms)]
    if shape.kind not in EIGHT:
        forms += [("gemv", Form(k=k)) for k in (1024, 2048) if shape.rows == 1]
        forms += [("thin", Form(k=k, stages=stages)) for k, stages in _BLOCKS]
        forms += [("thin", Form(128, 128, 4, 8))] if shape.rows > 32 else []
        if shape.kind == "dense" and shape.rows > 1:
            forms += [("thin", Form(k=k, stages=stages, splits=2)) for k, stages in ((128, 5), (256, 3))]
        return [LIBRARY, *(Tactic(*form) for form in forms)]
    if shape.rows > MOST_ROWS:
        blocks = [Form(128, 128, 4, 8), Form(256, 128, 3, 8), Form(64, 128, 4, 8)]
        if shape.rows <= FEW_TILES:  # more on their way, of tiles that are too few for the device
            blocks += [Form(64, 128, 8, 8, splits) for splits in (1, 2, 4)] + [
                Form(128, 128, 6, 8, 2),
                Form(64, 128, 8, 4, 2),
            ]
        return [LIBRARY, *(Tactic("bulk", form) for form in blocks)]
    bytes_of = 64 + max(16, shape.rows)  # of an input, in a tile of both
    forms += _lines(shape)
    forms += [
        ("tiles", Form(64, k, stages, splits=splits))
        for k, stages, splits in _TILES
        if k * stages * bytes_of <= _SHARED
    ]
    return [Tactic(*form) for form in forms]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, tactic: Tactic, *, pair: bool) -> Tensor:
    """`linear`, and of a pair `silu_mul` of it."""
    if tactic.kernel == "gemv" and len(x) == 1:
        return products.gemv(x, weight, bias, pair=pair, block=tactic.form.k)
    if tactic.kernel == "thin":
        return products.thin(x, weight, bias, tactic.form, pair=pair)
    return rows.silu_mul(F.linear(x, weight, bias)) if pair else F.linear(x, weight, bias)


def multiply_fp8(
    q: Tensor, q_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype, tactic: Tactic
) -> Tensor:
    """float8_e4m3fn, or int8, [T, in] and [out, in], with a scale a row each ([T, 1] and [out, 1] float32) -> [T, out].

    Torch has no product of int8 that scales: for those `bulk` is the library. That of float8 is rounded before a bias is added,
    the others' behind it.
    """
    kernel, form = tactic
    whole = not any(size % 16 for size in weight.shape)
    if kernel == "library" and whole and capability() and dtype is torch.bfloat16 and q.dtype is torch.float8_e4m3fn:
        y = fp8.library(q, q_scales, weight, scales)
        return y if bias is None else y.add_(bias)
    if kernel == "gemv":
        return fp8_gemv.gemv(q, q_scales, weight, scales, bias, dtype, n=form.n, k=form.k, warps=form.warps)
    if kernel in ("library", "bulk") and weight.shape[1] % 16 == 0:
        form = form if kernel == "bulk" else Form(128, 128, 4, 8)
        return fp8.bulk(
            q, q_scales, weight, scales, bias, dtype,
            n=form.n, k=form.k, stages=form.stages, warps=form.warps, splits=form.splits,
        )  # fmt: skip
    return fp8.tiles(
        q, q_scales, weight, scales, bias, dtype,
        n=form.n, k=form.k, stages=form.stages, warps=form.warps, splits=form.splits,
    )  # fmt: skip


def multiply_packed(x: Tensor, packed: Packed, bias: Tensor | None, tactic: Tactic) -> Tensor:
    """linear of x [T, in] of 16 bits, contiguous, with a weight of integers."""
    kernel, form = tactic
    if kernel == "library":
        return F.linear(x, integers.expand(packed, x.dtype), bias)
    return integers.tiles(
        x, packed, bias,
        n=form.n, k=form.k, stages=form.stages, warps=form.warps, splits=form.splits, bulk=kernel == "bulk",
    )  # fmt: skip


def to_json(table: Table) -> bytes:
    """As an engine carries it."""
    return json.dumps([[*shape, tactic.kernel, *tactic.form] for shape, tactic in sorted(table.items())]).encode()


def from_json(data: bytes) -> Table:
    """Reads what `to_json` wrote."""
    return {Product(*row[:4]): Tactic(row[4], Form(*row[5:])) for row in json.loads(data)}
