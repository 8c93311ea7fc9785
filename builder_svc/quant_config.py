"""How a build is to quantize, by TensorRT-LLM's names."""

from dataclasses import dataclass
from enum import StrEnum

from engine.errors import InvalidArgument, Unimplemented


class QuantAlgo(StrEnum):
    """An algorithm: bits of weights (W) and activations (A), and how they are found.

    Example:
        >>> from enginehouse import QuantAlgo
        >>> QuantAlgo("W4A16_AWQ")
        <QuantAlgo.W4A16_AWQ: 'W4A16_AWQ'>
    """

    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A8_AWQ = "W4A8_AWQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W8A8_SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"
    FP8 = "FP8"
    INT8 = "INT8"


@dataclass
class QuantConfig:
    """What is to be quantized. By default nothing is.

    Checkpoints that are quantized already say so themselves, and need none. This release quantizes nothing itself: whatever
    takes a QuantConfig raises Unimplemented (a NotImplementedError) if it asks for something.

    Attributes:
        quant_algo: of weights and activations; a QuantAlgo or its name.
        kv_cache_quant_algo: of the KV cache, INT8 or FP8.
        group_size: input columns that share a scale.
        smoothquant_val: how much of the activations' range SmoothQuant moves into the weights, 0 to 1.
        clamp_val: bounds of activations.
        has_zero_point: weights are not symmetric around 0.
        pre_quant_scale: activations are scaled before they are quantized.
        exclude_modules: names of linears that stay as they are.

    Raises:
        InvalidArgument: (a ValueError) no algorithm of that name.

    Example:
        >>> from enginehouse import QuantConfig
        >>> QuantConfig(quant_algo="FP8").quant_algo
        <QuantAlgo.FP8: 'FP8'>
    """

    quant_algo: QuantAlgo | str | None = None
    kv_cache_quant_algo: QuantAlgo | str | None = None
    group_size: int = 128
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("quant_algo", "kv_cache_quant_algo"):
            value = getattr(self, name)
            if value is not None:
                try:
                    setattr(self, name, QuantAlgo(value))
                except ValueError:
                    raise InvalidArgument(f"{name} is {value!r}: choose one of {', '.join(QuantAlgo)}") from None


def check_not_asked(quant_config: QuantConfig | None) -> None:
    """Raises Unimplemented for one that asks for something, InvalidArgument for what is none."""
    if not isinstance(quant_config, QuantConfig | None):
        raise InvalidArgument(f"quant_config is {quant_config!r}: give a QuantConfig")
    asked = quant_config and (quant_config.quant_algo or quant_config.kv_cache_quant_algo)
    if asked:
        raise Unimplemented(
            f"quant_config asks for {asked}: this release quantizes nothing itself. Build a checkpoint that is quantized "
            "already (docs/models.md), or leave it out",
            reason="QUANTIZATION_UNSUPPORTED",
        )
