"""compressed-tensors, as llm-compressor writes it; a group of the config names the layers that are stored alike.

    pack-quantized    weight_packed int32 [out, ceil(in * bits / 32)], codes from the lowest bit on; weight_shape [2];
                      weight_zero_point int32 [ceil(out * bits / 32), groups], packed along the rows; weight_g_idx [in]
                      with act-order
    int-quantized     weight int8 [out, in], signed; weight_zero_point int8 [out, groups]
    float-quantized   weight float8_e4m3fn [out, in]
    naive-quantized   either, by the type of the weights

weight_scale is [out, groups], of one column by channel, or one number for the tensor; for blocks it is [rows, columns] of them.
input_scale is one number, where activations of a float-quantized layer are quantized and not "dynamic".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from builder_svc.checkpoint.quantized.fp8 import block_size, facts
from builder_svc.checkpoint.quantized.layers import FLOATS, Expected, Floats, Integers, Layer, Read, Scheme, unpack_bits
from builder_svc.checkpoint.quantized.method import Method, compiled, group_size, one_of, said, texts, unsupported
from builder_svc.models.fields import Fields

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Compressed(Integers):
    """What both kinds of integers have in common.

    Attributes:
        per_tensor: one scale for all.
    """

    per_tensor: bool = False
    scale = "weight_scale"

    def scale_tensors(self, rows: int, columns: int, zeros: Expected) -> dict[str, Expected]:
        shapes = ((1,), (), (1, 1)) if self.per_tensor else ((rows, self.groups(columns)),)
        found = {"weight_scale": Expected(shapes, FLOATS)}
        if not self.symmetric:
            found["weight_zero_point"] = zeros
        if self.act_order:
            found["weight_g_idx"] = Expected(((columns,),), ("int32", "int64"))
        return found

    def problem(self, layer: Layer) -> tuple[str, str] | None:
        if self.act_order:
            group = layer.read("weight_g_idx")
            if not 0 <= int(group.min()) <= int(group.max()) < self.groups(layer.columns):
                return (
                    "weight_g_idx",
                    f"names groups that are not among the {self.groups(layer.columns)} of {self.group_size} inputs",
                )
        return None

    def scales(self, layer: Layer) -> Tensor:
        found = layer.read("weight_scale")
        return found.reshape(1, 1).expand(layer.rows, 1) if self.per_tensor else found

    def group_of(self, layer: Layer) -> Tensor:
        return layer.read("weight_g_idx").long() if self.act_order else super().group_of(layer)


@dataclass(frozen=True)
class PackedInts(Compressed):
    """pack-quantized."""

    marker = main = "weight_packed"

    def size(self, read: Read) -> tuple[int, int]:
        """weight_shape knows how many codes the last word of a row holds."""
        rows, words = read("weight_packed").shape
        fullest = words * 32 // self.bits
        try:
            _, columns = read("weight_shape").tolist()
        except (KeyError, ValueError, TypeError):  # which `tensors` will tell
            columns = fullest
        return rows, columns if 0 <= fullest - columns < 32 // self.bits else fullest

    def tensors(self, rows: int, columns: int) -> dict[str, Expected]:
        zeros = Expected(((-(-rows * self.bits // 32), self.groups(columns)),), ("int32",))
        return {
            "weight_packed": Expected(((rows, -(-columns * self.bits // 32)),), ("int32",)),
            "weight_shape": Expected(((2,),), ("int64", "int32")),
            **self.scale_tensors(rows, columns, zeros),
        }

    def problem(self, layer: Layer) -> tuple[str, str] | None:
        held = layer.read("weight_shape").tolist()
        if held != [layer.rows, layer.columns]:
            return "weight_shape", f"says {held}, but the layer is [{layer.rows}, {layer.columns}]"
        return super().problem(layer)

    def codes(self, layer: Layer) -> Tensor:
        return unpack_bits(layer.read("weight_packed"), self.bits, layer.columns)

    def zeros(self, layer: Layer) -> Tensor:
        return unpack_bits(layer.read("weight_zero_point").T, self.bits, layer.rows).T


@dataclass(frozen=True)
class PlainInts(Compressed):
    """int-quantized: signed, so that the code of 0 is 2^(bits - 1)."""

    marker = "weight_scale"
    main = "weight"

    def size(self, read: Read) -> tuple[int, int]:
        rows, columns = read("weight").shape
        return rows, columns

    def tensors(self, rows: int, columns: int) -> dict[str, Expected]:
        shapes = ((1,), (), (1, 1)) if self.per_tensor else ((rows, self.groups(columns)),)
        return {
            "weight": Expected(((rows, columns),), ("int8",)),
            **self.scale_tensors(rows, columns, Expected(shapes, ("int8",))),
        }

    def codes(self, layer: Layer) -> Tensor:
        return self._unsigned(layer.read("weight"))

    def zeros(self, layer: Layer) -> Tensor:
        found = self._unsigned(layer.read("weight_zero_point"))
        return found.reshape(1, 1).expand(layer.rows, 1) if self.per_tensor else found

    def _unsigned(self, signed: Tensor) -> Tensor:
        wide: Tensor = signed.to(torch.int16) + 2 ** (self.bits - 1)
        return wide.to(torch.uint8)


def read(config: Fields) -> Method:
    """The quantization_config of quant_method "compressed-tensors"."""
    sparsity = config.get("sparsity_config", dict, {}).get("format", "dense")
    if sparsity != "dense":
        raise unsupported(config, f"sparsity format {sparsity!r}", "dense weights")
    if config.get("transform_config", dict, {}).get("config_groups"):
        raise unsupported(config, "a transform_config", "weights without transforms")
    status = config.get("quantization_status", str, "compressed")
    if status not in ("compressed", "frozen"):
        raise unsupported(config, f"quantization_status {status!r}", "compressed")
    groups = [
        (texts(group.filled(targets=["Linear"]), "targets"), _scheme(config, group))
        for group in (
            Fields(_object(fields), f"{config.where}: {name}")
            for name, fields in config.require("config_groups", dict).items()
        )
    ]
    ignored = texts(config, "ignore")
    patterns = {
        text: compiled(config, text.removeprefix("re:"))
        for text in [*ignored, *(target for targets, _ in groups for target in targets)]
        if text.startswith("re:")
    }

    def matches(text: str, module: str) -> bool:
        return patterns[text].match(module) is not None if text in patterns else text == module

    def scheme(module: str) -> Scheme | None:
        if any(matches(pattern, module) for pattern in ignored):
            return None
        for named in (True, False):  # by name before by class
            for targets, layer in groups:
                if any(matches(target, module) if named else target == "Linear" for target in targets):
                    return layer
        return None

    told = [{**(said(layer) if isinstance(layer, Integers) else facts(layer)), "targets": to} for to, layer in groups]
    return Method("compressed-tensors", {"groups": told}, scheme, ("weight_packed", "weight_scale"))


def _activations(group: Fields) -> str:
    """How the inputs of a float-quantized layer are; what is dynamic by tensor is here by token, which is finer."""
    found = _object(group.values.get("input_activations"))
    if found.get("type") != "float" or found.get("num_bits") != 8 or found.get("strategy") not in ("token", "tensor"):
        return ""
    return "token" if found.get("dynamic") or found["strategy"] == "token" else "tensor"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _scheme(config: Fields, group: Fields) -> Integers | Floats:
    field = group if group.values.get("format") is not None else config
    stored = one_of(field, "format", _FORMATS)
    weights = Fields(group.require("weights", dict), f"{group.where}: weights")
    kind = one_of(weights, "type", ("int", "float"), "int")
    size = group_size(weights, -1)
    strategy = one_of(weights, "strategy", ("tensor", "channel", "group", "block"), "group" if size else "tensor")
    if kind == "float":
        if stored in ("pack-quantized", "int-quantized") or strategy == "group":
            raise unsupported(
                weights,
                f"type float, strategy {strategy}, in format {stored!r}",
                "float-quantized by tensor, channel, block",
            )
        one_of(weights, "num_bits", (8,))
        blocks = block_size(weights, "block_structure") if strategy == "block" else None
        kept = blocks or ("channel" if strategy == "channel" else "tensor")
        return Floats(kept, activations="" if blocks else _activations(group))
    if stored == "float-quantized" or strategy == "block":
        raise unsupported(
            weights,
            f"type int, strategy {strategy}, in format {stored!r}",
            "pack-quantized and int-quantized by tensor, channel, group",
        )
    bits = int(one_of(weights, "num_bits", (4, 8)))
    order = weights.values.get("actorder")
    symmetric = weights.get("symmetric", bool, True)
    made = PackedInts if stored == "pack-quantized" else PlainInts
    act_order = order in ("group", "dynamic", True) and strategy == "group"
    if made is PackedInts and not symmetric and strategy == "tensor":
        raise unsupported(weights, "an asymmetric scheme by tensor in format 'pack-quantized'", "channel and group")
    return made(bits, size if strategy == "group" else 0, symmetric, act_order, strategy == "tensor")
