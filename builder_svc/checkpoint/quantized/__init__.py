"""Pre-quantized checkpoints: weights that came quantized go into our packed operators as they are.

A module a format reads its config (`read`) and says how it stores a layer (a `Scheme`); `checkpoint.py` finds the layers, and
`resolve.py` chooses for each of the decoder's linears its packed form, or to dequantize it.
"""

import logging
from pathlib import Path

from builder_svc.checkpoint.huggingface import read_json
from builder_svc.checkpoint.quantized import awq, compressed_tensors, fp8, gptq, modelopt
from builder_svc.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from builder_svc.checkpoint.quantized.method import Method, unsupported
from builder_svc.checkpoint.reader import Checkpoint
from builder_svc.models.fields import Fields

log = logging.getLogger(__name__)

METHODS = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "modelopt": modelopt.read,
}


def find_method(config: Fields, directory: Path) -> Method | None:
    """What config.json, or a hf_quant_config.json beside it, says of quantization; None where they say nothing.

    Raises:
        Unimplemented: of a method, or of a kind of it, that we do not read: the message says the value and what is supported.
        InvalidArgument: a field is missing or of another type.
    """
    found = config.get("quantization_config", dict, {})
    if found:
        fields = Fields(found, f"{config.where}: quantization_config")
        name = fields.require("quant_method", str)
    elif (directory / modelopt.FILE).is_file():
        fields, name = Fields(read_json(directory / modelopt.FILE), str(directory / modelopt.FILE)), "modelopt"
    else:
        return None
    if name not in METHODS:
        raise unsupported(fields, f"quantization method {name!r}", (*sorted(METHODS), "weights in floating point"))
    return METHODS[name](fields)


def open_quantized(checkpoint: Checkpoint) -> Checkpoint | QuantizedCheckpoint:
    """The checkpoint as its quantization makes it; itself where it has none. Raises what `find_method` does."""
    method = find_method(checkpoint.config, checkpoint.path)
    if method is None:
        return checkpoint
    quantized = QuantizedCheckpoint(checkpoint, method)
    if not quantized.layers:
        log.warning("%s: its config says %s, but none of its weights is quantized", checkpoint.path, method.name)
        return checkpoint
    return quantized
