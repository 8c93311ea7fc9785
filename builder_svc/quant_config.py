"""How a build is to quantize, by TensorRT-LLM's names. No torch here: command line and service read it, too."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.errors import InvalidArgument, Unimplemented

RECIPE_VERSION = 4  # raised when the same inputs give other quantized weights than before


class QuantAlgo(StrEnum):
    """An algorithm: bits of weights (W) and activations (A), and how they are found.

    W8A16 and W4A16 round weights to nearest; W4A16_GPTQ so that they make up for each other's errors; W4A16_AWQ scales and clips
    them before, by what activations are. FP8 has a scale for all activations of a linear, FP8_PER_CHANNEL_PER_TOKEN one for each
    token. W8A8_SQ_PER_CHANNEL is SmoothQuant. INT8 and FP8 are for KV caches. W4A8_AWQ is read from checkpoints that come so, and
    not made here.

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
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    INT8 = "INT8"


ALGORITHMS = (
    QuantAlgo.W8A16,
    QuantAlgo.W4A16,
    QuantAlgo.W4A16_GPTQ,
    QuantAlgo.W4A16_AWQ,
    QuantAlgo.FP8,
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
    QuantAlgo.W8A8_SQ_PER_CHANNEL,
)
"""Those that are made here, of weights."""
KV_ALGORITHMS = (QuantAlgo.INT8, QuantAlgo.FP8)
INT4 = (QuantAlgo.W4A16, QuantAlgo.W4A16_GPTQ, QuantAlgo.W4A16_AWQ)
GROUP_SIZES = (32, 64, 128)


@dataclass
class QuantConfig:
    """What is to be quantized. By default nothing is. Checkpoints that are quantized already say so themselves, and need none.

    Attributes:
        quant_algo: of weights and activations; a QuantAlgo or its name.
        kv_cache_quant_algo: of the KV cache, INT8 or FP8, by scales that are calibrated.
        group_size: 32, 64 or 128 input columns of int4 weights that share a scale.
        smoothquant_val: how much of the activations' range SmoothQuant moves into the weights, 0 to 1.
        clamp_val: bounds of activations: not supported.
        has_zero_point: int4 weights are not symmetric around 0: each group has a zero point, too.
        pre_quant_scale: taken, without effect: what activations are scaled by is folded into what makes them.
        exclude_modules: names of linears that stay as they are, ours ("layers.0.mlp.down") or the checkpoint's
            ("model.layers.0.mlp.down_proj"): whole ones, parts of them ("mlp", "lm_head"), or patterns with *. Linears that are
            one product here, as those of queries, keys and values, stay together.
        quantize_lm_head: the head, too, unless it is tied to the embedding.

    Raises:
        InvalidArgument: (a ValueError) a value that cannot be; the message names it and what is allowed.

    Example:
        >>> from enginehouse import QuantConfig
        >>> QuantConfig(quant_algo="FP8").quant_algo
        <QuantAlgo.FP8: 'FP8'>
    """

    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: QuantAlgo | None = None
    group_size: int = 128
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None
    quantize_lm_head: bool = False

    def __post_init__(self) -> None:
        for name in ("quant_algo", "kv_cache_quant_algo"):
            value = getattr(self, name)
            if value is not None:
                try:
                    setattr(self, name, QuantAlgo(value))
                except ValueError:
                    raise InvalidArgument(f"{name} is {value!r}: choose one of {', '.join(QuantAlgo)}") from None

    @property
    def asks(self) -> bool:
        """Whether anything is to be quantized."""
        return bool(self.quant_algo or self.kv_cache_quant_algo)

    @property
    def calibrates(self) -> bool:
        """Whether what is asked for depends on activations, so that text must be run through the model."""
        by_weights = (None, QuantAlgo.W8A16, QuantAlgo.W4A16, QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN)
        return self.kv_cache_quant_algo is not None or self.quant_algo not in by_weights

    def check(self) -> None:
        """Raises InvalidArgument for a value that cannot be, Unimplemented for one that is not made here."""
        QuantConfig.__post_init__(self)  # attributes may have been set
        algo, cache = self.quant_algo, self.kv_cache_quant_algo
        if algo is not None and algo not in ALGORITHMS:
            raise Unimplemented(
                f"quant_algo {algo}: it is not made here, choose one of {', '.join(ALGORITHMS)}, or build a checkpoint that is "
                "quantized so already (docs/models.md)",
                reason="QUANTIZATION_UNSUPPORTED",
            )
        if cache is not None and cache not in KV_ALGORITHMS:
            raise InvalidArgument(f"kv_cache_quant_algo is {cache}: choose one of {', '.join(KV_ALGORITHMS)}")
        if self.clamp_val is not None:
            raise Unimplemented("clamp_val is not supported: leave it out", reason="QUANTIZATION_UNSUPPORTED")
        if self.group_size not in GROUP_SIZES:
            raise InvalidArgument(
                f"group_size is {self.group_size!r}: choose one of {', '.join(map(str, GROUP_SIZES))}"
            )
        if self.has_zero_point and algo not in INT4:
            raise InvalidArgument(f"has_zero_point is for int4 weights ({', '.join(INT4)}), not for {algo}")
        if not isinstance(self.smoothquant_val, int | float) or not 0 <= self.smoothquant_val <= 1:
            raise InvalidArgument(f"smoothquant_val is {self.smoothquant_val!r}: give a number from 0 to 1")
        names = self.exclude_modules or []
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InvalidArgument(f"exclude_modules is {names!r}: give a list of names")

    def facts(self) -> dict[str, Any]:
        """What of it decides the result, as JSON values."""
        algo, cache = self.quant_algo, self.kv_cache_quant_algo
        found: dict[str, Any] = {
            "quant_algo": algo and algo.value,
            "kv_cache_quant_algo": cache and cache.value,
            "exclude_modules": sorted(set(self.exclude_modules or [])),
            "quantize_lm_head": self.quantize_lm_head,
        }
        if algo in INT4:
            found |= {"group_size": self.group_size, "has_zero_point": self.has_zero_point}
        if algo is QuantAlgo.W8A8_SQ_PER_CHANNEL:
            found["smoothquant_val"] = float(self.smoothquant_val)
        return found


BUNDLED = ""
"""The dataset that is in this package: prose in the public domain (builder_svc/quantize/texts)."""


@dataclass
class CalibConfig:
    """The text by which activations are measured, and where that runs.

    Attributes:
        device: "cpu" or "cuda"; "auto" is "cuda" where there is a GPU.
        calib_dataset: a text file (documents end with form feeds), a .jsonl file (a "text" in each line), or a directory of
            these; by default the text that is bundled.
        calib_batches, calib_batch_size: their product is the number of sequences; fewer are taken where the text has no more.
        calib_max_seq_length: tokens of each.
        random_seed: of the choice of sequences.

    Raises:
        InvalidArgument: (a ValueError) names the value and what is allowed.

    Example:
        >>> from enginehouse import CalibConfig
        >>> CalibConfig(calib_batches=16).samples
        16
    """

    device: str = "auto"
    calib_dataset: str = BUNDLED
    calib_batches: int = 128
    calib_batch_size: int = 1
    calib_max_seq_length: int = 512
    random_seed: int = 1234

    def __post_init__(self) -> None:
        if isinstance(self.calib_dataset, Path):
            self.calib_dataset = str(self.calib_dataset)
        self.check()

    @property
    def samples(self) -> int:
        """Sequences."""
        return self.calib_batches * self.calib_batch_size

    def check(self) -> None:
        """Raises InvalidArgument for a value that cannot be."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise InvalidArgument(f"device {self.device!r}: choose one of auto, cpu, cuda")
        if not isinstance(self.calib_dataset, str):
            raise InvalidArgument(f"calib_dataset is {self.calib_dataset!r}: give the path of a file or directory")
        for name in ("calib_batches", "calib_batch_size", "calib_max_seq_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidArgument(f"{name} is {value!r}: it must be at least 1")
        if type(self.random_seed) is not int or not 0 <= self.random_seed < 2**63:
            raise InvalidArgument(f"random_seed is {self.random_seed!r}: give a number from 0 to 2^63 - 1")


def checked(quant_config: QuantConfig | None) -> QuantConfig | None:
    """The config if it asks for something. Raises what `QuantConfig.check` raises, InvalidArgument for what is none."""
    if not isinstance(quant_config, QuantConfig | None):
        raise InvalidArgument(f"quant_config is {quant_config!r}: give a QuantConfig")
    if quant_config is None or not quant_config.asks:
        return None
    quant_config.check()
    return quant_config
