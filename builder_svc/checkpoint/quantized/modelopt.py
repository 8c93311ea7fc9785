"""FP8 as NVIDIA's ModelOpt writes it: hf_quant_config.json, or a quantization_config with quant_method "modelopt".

weight        float8_e4m3fn [out, in]
weight_scale  one for the tensor (FP8), or [out] (FP8_PER_CHANNEL_PER_TOKEN)

input_scale   one for the tensor (FP8)
"""

from builder_svc.checkpoint.quantized.fp8 import facts
from builder_svc.checkpoint.quantized.layers import Floats
from builder_svc.checkpoint.quantized.method import Method, one_of, texts
from builder_svc.models.fields import Fields

FILE = "hf_quant_config.json"
_LAYERS = {
    "FP8": Floats("tensor", activations="tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": Floats("channel", activations="token"),
}


def read(config: Fields) -> Method:
    """The object "quantization" of hf_quant_config.json, or the quantization_config."""
    nested = config.get("quantization", dict, {})
    config = Fields(nested or config.values, config.where)
    algorithm = str(one_of(config, "quant_algo", tuple(_LAYERS)))
    layer = _LAYERS[algorithm]
    excluded = (*texts(config, "exclude_modules"), *texts(config, "ignore"))
    files = (FILE,) if config.where.endswith(FILE) else ()
    return Method(
        "modelopt", {**facts(layer), "quant_algo": algorithm}, lambda _: layer, ("weight_scale",), excluded, files
    )
