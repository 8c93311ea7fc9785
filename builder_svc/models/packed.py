"""How a linear of the decoder holds its weight, where that is quantized: the operator, its tensors and attributes."""

from dataclasses import dataclass
from typing import Any

WHOLE = 0  # a group or block that is as long as the row


@dataclass(frozen=True)
class Int4:
    """`linear_int4`.

    Attributes:
        group_size: inputs of a row that share a scale.
        zeros: whether each group has a zero point of its own.
        scales: their dtype.
    """

    group_size: int
    zeros: bool
    scales: str
    operator = "linear_int4"
    inputs = ("weight", "scales", "zeros")

    def attrs(self, columns: int) -> dict[str, Any]:
        """The operator's attributes for rows of that many inputs."""
        return {"group_size": self.group_size or columns}

    @property
    def units(self) -> dict[str, tuple[int, int]]:
        """Name of a tensor -> how many rows and columns of the matrix an element is for; WHOLE for all of them."""
        groups = (1, self.group_size)
        return {"weight": (1, 2), "scales": groups} | ({"zeros": groups} if self.zeros else {})

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape, for a matrix [rows, columns]."""
        groups = (rows, -(-columns // (self.group_size or columns)))
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("uint8", (rows, columns // 2)),
            "scales": (self.scales, groups),
        }
        return found | ({"zeros": ("uint8", groups)} if self.zeros else {})

    def __str__(self) -> str:
        group = f"groups of {self.group_size}" if self.group_size else "a scale a row"
        return f"int4, {group}, {'zero points' if self.zeros else 'symmetric'}"


@dataclass(frozen=True)
class Int8:
    """`linear_int8`; scales as above.

    Attributes:
        activations: how the operator's input is quantized: "token", by a scale for each token; "tensor", by one that was
            calibrated (`input_scale`); "" for not at all.
    """

    scales: str
    activations: str = ""
    operator = "linear_int8"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return ("weight", "scales", "input_scale") if self.activations == "tensor" else ("weight", "scales")

    def attrs(self, columns: int) -> dict[str, Any]:
        """As above."""
        del columns
        return {"per_token": self.activations == "token"}

    @property
    def units(self) -> dict[str, tuple[int, int]]:
        """As above."""
        rows = {"weight": (1, 1), "scales": (1, WHOLE)}
        return rows | ({"input_scale": (WHOLE, WHOLE)} if self.activations == "tensor" else {})

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As above."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("int8", (rows, columns)),
            "scales": (self.scales, (rows,)),
        }
        return found | ({"input_scale": ("float32", (1,))} if self.activations == "tensor" else {})

    def __str__(self) -> str:
        return "int8, a scale a row, symmetric" + (f", activations by {self.activations}" if self.activations else "")


@dataclass(frozen=True)
class Fp8:
    """`linear_fp8`, with a scale for each block of so many rows and columns.

    Attributes:
        activations: how the operator's input is quantized: "token", by a scale for each token; "tensor", by one of the
            checkpoint's; "" for not at all.
    """

    block_rows: int = 1
    block_columns: int = WHOLE
    activations: str = ""
    operator = "linear_fp8"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return ("weight", "scales", "input_scale") if self.activations == "tensor" else ("weight", "scales")

    def attrs(self, columns: int) -> dict[str, Any]:
        """The operator's attributes for rows of that many inputs."""
        return {
            "block_rows": self.block_rows,
            "block_columns": self.block_columns or columns,
            "per_token": self.activations == "token",
        }

    @property
    def units(self) -> dict[str, tuple[int, int]]:
        """As above."""
        blocks = {"weight": (1, 1), "scales": (self.block_rows, self.block_columns)}
        return blocks | ({"input_scale": (WHOLE, WHOLE)} if self.activations == "tensor" else {})

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As above."""
        blocks = (-(-rows // self.block_rows), -(-columns // (self.block_columns or columns)))
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("float8_e4m3fn", (rows, columns)),
            "scales": ("float32", blocks),
        }
        return found | ({"input_scale": ("float32", (1,))} if self.activations == "tensor" else {})

    def __str__(self) -> str:
        blocks = f"blocks of {self.block_rows} x {self.block_columns}" if self.block_columns else "a scale a row"
        return f"float8_e4m3fn, {blocks}" + (f", activations by {self.activations}" if self.activations else "")


Packed = Int4 | Int8 | Fp8
