"""Writers of quantized layers: each format by its own formula, from known numbers, with Python's integers.

A writer gives the tensors of a layer [rows, columns] by their last names, and the weight that they stand for.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[int, int], Written]


def codes(rows: int, columns: int, bits: int, low: int = 0) -> np.ndarray:
    return np.random.randint(low, 2**bits, (rows, columns))


def scales(rows: int, groups: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(rows, groups) * 0.02 + 0.004).to(dtype)


def to_int32(words: list[list[int]]) -> Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32).copy())


def dense_bits(numbers: np.ndarray, bits: int) -> Tensor:
    """Each row one long number whose lowest bits are its first code, cut into words. [n, count] -> int32 [n, words]."""
    rows = []
    for row in numbers.tolist():
        whole = sum(code << bits * at for at, code in enumerate(row))
        rows.append([whole >> 32 * word & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return to_int32(rows)


def weight(numbers: np.ndarray, zeros: np.ndarray | int, of_groups: Tensor, group: np.ndarray) -> Tensor:
    """(code - zero) * scale in float64, rounded to float32."""
    zero = zeros if isinstance(zeros, int) else zeros[:, group]
    return torch.from_numpy((numbers - zero) * of_groups.double().numpy()[:, group]).float()


def awq(size: int) -> Writer:
    def pack(numbers: np.ndarray) -> Tensor:  # [n, out] -> [n, out / 8]
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return to_int32(
            [
                [
                    sum(row[at + output] << 4 * place for place, output in enumerate(order))
                    for at in range(0, len(row), 8)
                ]
                for row in numbers.tolist()
            ]
        )

    def write(rows: int, columns: int) -> Written:
        groups = columns // size
        numbers, zeros, of_groups = codes(rows, columns, 4), codes(rows, groups, 4), scales(rows, groups)
        tensors = {"qweight": pack(numbers.T), "qzeros": pack(zeros.T), "scales": of_groups.T.contiguous()}
        return tensors, weight(numbers, zeros, of_groups, np.arange(columns) // size)

    return write


def gptq(
    bits: int, size: int, *, symmetric: bool = True, act_order: bool = False, offset: int = 1, bias: bool = False
) -> Writer:
    def write(rows: int, columns: int) -> Written:
        of = size if size > 0 else columns
        group = np.arange(columns) // of
        if act_order:
            np.random.shuffle(group)
        groups = -(-columns // of)
        numbers, of_groups = codes(rows, columns, bits), scales(rows, groups)
        zeros = np.full((rows, groups), 2 ** (bits - 1)) if symmetric else codes(rows, groups, bits, offset)
        tensors = {
            "qweight": dense_bits(numbers.T.copy().T, bits).T.contiguous(),
            "qzeros": dense_bits(zeros.T - offset, bits),
            "scales": of_groups.T.contiguous(),
            "g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        if bias:
            tensors["bias"] = torch.zeros(rows, dtype=torch.float16)
        return tensors, weight(numbers, zeros, of_groups, group)

    return write


def packed_ints(bits: int, size: int, *, symmetric: bool = True, act_order: bool = False) -> Writer:
    def write(rows: int, columns: int) -> Written:
        of = size or columns
        group = np.arange(columns) // of
        if act_order:
            np.random.shuffle(group)
        groups = columns // of
        numbers, of_groups = codes(rows, columns, bits), scales(rows, groups, torch.bfloat16)
        zeros = np.full((rows, groups), 2 ** (bits - 1)) if symmetric else codes(rows, groups, bits)
        tensors = {
            "weight_packed": dense_bits(numbers, bits),
            "weight_scale": of_groups,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = dense_bits(zeros.T, bits).T.contiguous()
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
        return tensors, weight(numbers, zeros, of_groups, group)

    return write


def plain_ints(*, symmetric: bool = True) -> Writer:
    def write(rows: int, columns: int) -> Written:
        numbers, of_rows = codes(rows, columns, 7, -128), scales(rows, 1, torch.bfloat16)
        zeros = np.zeros((rows, 1), dtype=np.int64) if symmetric else codes(rows, 1, 5, -9)
        tensors = {"weight": torch.from_numpy(numbers.astype(np.int8)), "weight_scale": of_rows}
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
        return tensors, weight(numbers, zeros, of_rows, np.zeros(columns, dtype=np.int64))

    return write


def floats(blocks: tuple[int, int] | None, shape: str = "", scale: str = "weight_scale") -> Writer:
    """float8_e4m3fn; shape "tensor", "channel" or "column" (of channels), for those without blocks."""

    def write(rows: int, columns: int) -> Written:
        stored = (torch.randn(rows, columns) * 40).to(torch.float8_e4m3fn)
        values = stored.double()
        if blocks:
            of_blocks = scales(-(-rows // blocks[0]), -(-columns // blocks[1]), torch.float32)
            for row in range(0, rows, blocks[0]):
                for column in range(0, columns, blocks[1]):
                    of_block = of_blocks[row // blocks[0], column // blocks[1]].double()
                    values[row : row + blocks[0], column : column + blocks[1]] *= of_block
            return {"weight": stored, scale: of_blocks}, values.float()
        of_rows = scales(1 if shape == "tensor" else rows, 1, torch.float32)
        kept = {"tensor": of_rows.squeeze(), "channel": of_rows, "column": of_rows.flatten()}[shape]
        return {"weight": stored, scale: kept}, (values * of_rows.double()).float()

    return write


def save_quantized(
    dense: Path, path: Path, quantization: dict[str, Any], writer: Callable[[str], Writer | None], **more: Tensor
) -> dict[str, Tensor]:
    """Writes a checkpoint's linear layers quantized.

    Args:
        writer: of a module, by its name; None leaves it as it is.
        more: other tensors, with "/" for the dots of their names.

    Returns:
        The checkpoint's weights by name, those dequantized.
    """
    shutil.copytree(dense, path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    weights = load_file(path / "model.safetensors")
    stored = {name.replace("/", "."): tensor for name, tensor in more.items()}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        linear = tensor.dim() == 2 and "embed" not in name
        chosen = writer(module) if linear else None
        if chosen is None:
            stored[name] = tensor
            continue
        tensors, weights[name] = chosen(*tensor.shape)
        if f"{module}.bias" in weights:
            tensors.pop("bias", None)
        stored |= {f"{module}.{last}": part.contiguous() for last, part in tensors.items()}
    save_file(stored, path / "model.safetensors")
    if "quant_method" in quantization:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    else:
        (path / "hf_quant_config.json").write_text(json.dumps(quantization))
    return weights
