"""AWQ (Lin et al. 2024) as AutoAWQ writes it in its version "gemm".

qweight int32 [in, out / 8]      an input's codes of 4 bits; in each word outputs 0 2 4 6 1 3 5 7, from the lowest bit on
qzeros  int32 [groups, out / 8]  zero points, packed likewise
scales  [groups, out]
"""

from dataclasses import dataclass

from torch import Tensor

from builder_svc.checkpoint.quantized.layers import FLOATS, Expected, Integers, Layer, Read, unpack_bits
from builder_svc.checkpoint.quantized.method import Method, group_size, one_of, said, texts, unsupported
from builder_svc.models.fields import Fields

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of outputs 0 ... 7 in a word


@dataclass(frozen=True)
class Awq(Integers):
    """A layer. Zero points are always stored."""

    marker = main = "qweight"
    scale = "scales"

    def size(self, read: Read) -> tuple[int, int]:
        columns, words = read("qweight").shape
        return words * 8, columns

    def tensors(self, rows: int, columns: int) -> dict[str, Expected]:
        groups = self.groups(columns)
        return {
            "qweight": Expected(((columns, -(-rows // 8)),), ("int32",)),
            "qzeros": Expected(((groups, -(-rows // 8)),), ("int32",)),
            "scales": Expected(((groups, rows),), FLOATS),
        }

    def codes(self, layer: Layer) -> Tensor:
        return _unpack(layer.read("qweight"), layer.rows)

    def scales(self, layer: Layer) -> Tensor:
        return layer.read("scales").T

    def zeros(self, layer: Layer) -> Tensor:
        return _unpack(layer.read("qzeros"), layer.rows)


def _unpack(words: Tensor, rows: int) -> Tensor:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    in_words = unpack_bits(words, 4, 8 * words.shape[1]).view(*words.shape, 8)
    return in_words[..., _PLACES].flatten(1)[:, :rows].T


def read(config: Fields) -> Method:
    """The quantization_config of quant_method "awq"."""
    field = "version" if config.values.get("version") is not None else "format"
    named = config.get(field, str, "gemm")
    one_of(Fields({field: named.lower()}, config.where), field, ("gemm",))
    one_of(config, "bits", (4,), 4)
    if config.values.get("backend") == "llm-awq":  # the others are kernels for the same tensors
        raise unsupported(config, "backend 'llm-awq'", "autoawq")
    layer = Awq(4, group_size(config), symmetric=False)
    facts = {**said(layer), "version": "gemm"}
    excluded = ("lm_head", *texts(config, "modules_to_not_convert"))
    return Method("awq", facts, lambda _: layer, ("qweight",), excluded)
