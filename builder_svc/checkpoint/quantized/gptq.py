"""GPTQ (Frantar et al. 2023) as AutoGPTQ and GPTQModel write it.

qweight int32 [in * bits / 32, out]      an output's codes, packed from the lowest bit on
qzeros  int32 [groups, out * bits / 32]  zero points, packed likewise; less one in format "gptq", as they are in "gptq_v2"
scales  [groups, out]
g_idx   int32 [in]                       each input's group
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from builder_svc.checkpoint.quantized.layers import FLOATS, Expected, Integers, Layer, Read, Scheme, unpack_bits
from builder_svc.checkpoint.quantized.method import Method, compiled, group_size, one_of, said, texts
from builder_svc.models.fields import Fields


@dataclass(frozen=True)
class Gptq(Integers):
    """A layer; `offset` is what the stored zero points are short of."""

    offset: int = 1
    marker = main = "qweight"
    scale = "scales"

    def size(self, read: Read) -> tuple[int, int]:
        words, rows = read("qweight").shape
        return rows, words * 32 // self.bits

    def tensors(self, rows: int, columns: int) -> dict[str, Expected]:
        groups = self.groups(columns)
        return {
            "qweight": Expected(((-(-columns * self.bits // 32), rows),), ("int32",)),
            "qzeros": Expected(((groups, -(-rows * self.bits // 32)),), ("int32",)),
            "scales": Expected(((groups, rows),), FLOATS),
            "g_idx": Expected(((columns,),), ("int32", "int64")),
        }

    def problem(self, layer: Layer) -> tuple[str, str] | None:
        group = layer.read("g_idx").long()
        if self.act_order and not 0 <= int(group.min()) <= int(group.max()) < self.groups(layer.columns):
            return (
                "g_idx",
                f"names groups that are not among the {self.groups(layer.columns)} of {self.group_size} inputs",
            )
        if not self.act_order and not torch.equal(group, super().group_of(layer)):
            return "g_idx", 'has another order than the inputs, but the config says "desc_act": false'
        if self.symmetric and not bool((self.zeros(layer) == 2 ** (self.bits - 1)).all()):
            return "qzeros", f'holds other zero points than {2 ** (self.bits - 1)}, but the config says "sym": true'
        return None

    def codes(self, layer: Layer) -> Tensor:
        return unpack_bits(layer.read("qweight").T, self.bits, layer.columns)

    def scales(self, layer: Layer) -> Tensor:
        return layer.read("scales").T

    def zeros(self, layer: Layer) -> Tensor:
        """A zero point that does not fit after its one is added starts again at 0, as in AutoGPTQ's own arithmetic."""
        stored = unpack_bits(layer.read("qzeros"), self.bits, layer.rows).T
        zeros: Tensor = stored + self.offset & 2**self.bits - 1
        return zeros

    def group_of(self, layer: Layer) -> Tensor:
        return layer.read("g_idx").long()


def read(config: Fields) -> Method:
    """The quantization_config of quant_method "gptq"."""
    stored = one_of(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    one_of(config, "pack_dtype", ("int32",), "int32")
    one_of(config, "is_marlin_format", (False,), False)
    whole = _scheme(config, Gptq(4, 0, True, False, int(stored == "gptq")))
    dynamic = Fields(config.get("dynamic", dict, {}), f"{config.where}: dynamic")
    changes = [
        (
            compiled(dynamic, pattern.removeprefix("-:").removeprefix("+:")),
            None
            if pattern.startswith("-:")
            else _scheme(
                Fields({**config.values, **dynamic.require(pattern, dict)}, f"{dynamic.where} {pattern!r}"), whole
            ),
        )
        for pattern in dynamic.values
    ]

    def scheme(module: str) -> Scheme | None:
        for pattern, changed in changes:
            if pattern.match(module):
                return changed
        return whole

    excluded = () if config.get("lm_head", bool, False) else ("lm_head",)
    facts = {**said(whole), "act_order": whole.act_order, "checkpoint_format": stored}
    return Method("gptq", facts, scheme, ("qweight",), (*excluded, *texts(config, "modules_to_not_convert")))


def _scheme(config: Fields, like: Gptq) -> Gptq:
    bits = int(one_of(config, "bits", (2, 3, 4, 8)))
    size = group_size(config)
    # With one group a row, every order is the same.
    act_order = config.get("desc_act", bool, False) and bool(size)
    symmetric = config.get("sym", bool, True)
    return replace(like, bits=bits, group_size=size, symmetric=symmetric, act_order=act_order)
