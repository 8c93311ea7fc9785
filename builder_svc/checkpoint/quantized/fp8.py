"""FP8 weights with scales: quant_method "fp8" (in blocks, as DeepSeek began it, or a scale a tensor) and "fbgemm_fp8".

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  [ceil(out / 128), ceil(in / 128)]     what a block is multiplied with, whatever its name says
    weight_scale      one for the tensor ("fp8" without blocks), or [out, 1] ("fbgemm_fp8")

    input_scale       one for the tensor, with activation_scheme "static"

By blocks, activations stay as they are. activation_scale_ub of "fbgemm_fp8", a bound of tokens' scales, is left out: larger
numbers are kept and not cut off.
"""

from typing import Any

from builder_svc.checkpoint.quantized.layers import Floats
from builder_svc.checkpoint.quantized.method import Method, one_of, texts, unsupported
from builder_svc.models.fields import Fields

_ACTIVATIONS = {"dynamic": "token", "static": "tensor"}


def read(config: Fields) -> Method:
    """The quantization_config of quant_method "fp8"."""
    one_of(config, "fmt", ("e4m3",), "e4m3")
    one_of(config, "expert_dtype", ("fp8",), "fp8")
    blocks = block_size(config, "weight_block_size")
    excluded = (*texts(config, "modules_to_not_convert"), *texts(config, "ignored_layers"), "lm_head")
    scheme = one_of(config, "activation_scheme", tuple(_ACTIVATIONS), "dynamic")
    layer = Floats(
        blocks or "tensor", "weight_scale_inv" if blocks else "weight_scale", "" if blocks else _ACTIVATIONS[scheme]
    )
    # Writers of a scale a tensor have taken either name.
    markers = ("weight_scale_inv",) if blocks else ("weight_scale", "weight_scale_inv")
    return Method("fp8", facts(layer), lambda _: layer, markers, excluded)


def read_fbgemm(config: Fields) -> Method:
    """The quantization_config of quant_method "fbgemm_fp8"."""
    layer = Floats("channel", activations="token")
    excluded = (*texts(config, "modules_to_not_convert"), "lm_head")
    return Method("fbgemm_fp8", facts(layer), lambda _: layer, ("weight_scale",), excluded)


def facts(layer: Floats) -> dict[str, Any]:
    """What the identity says."""
    scales = list(layer.blocks) if isinstance(layer.blocks, tuple) else layer.blocks
    return {"bits": 8, "type": "float8_e4m3fn", "scales": scales, "symmetric": True}


def block_size(config: Fields, field: str) -> tuple[int, int] | None:
    """[rows, columns] or "ROWSxCOLUMNS"; None where it is null."""
    value = config.values.get(field)
    if value is None:
        return None
    pair = [int(size) for size in value.split("x") if size.isdecimal()] if isinstance(value, str) else value
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(size) is int and size > 0 for size in pair):
        raise unsupported(config, f"{field} {value!r}", "two positive numbers, such as [128, 128]")
    return pair[0], pair[1]
