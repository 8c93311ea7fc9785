"""What a caller may choose about a build."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder_svc.quant_config import CalibConfig, QuantConfig, checked
from builder_svc.tensorrt_names import PluginConfig, also_takes
from engine.errors import InvalidArgument
from engine.tensorrt import FLAVOURS, check_target

Progress = Callable[[str, int, int, str], None]
"""Called with (phase, done, total, unit) as a build goes on.

The phases are "download" (of a checkpoint that is not here yet), "checkpoint", "quantize" (in layers, if it is asked for),
"program", "weights", "plan" (of TensorRT, a step at a time), "upload" and "publish"; the unit is "bytes", "steps" or "".
"""

RECIPE_VERSION = 3  # raised when the same inputs give another engine than before
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
KV_CACHE_DTYPES = ("auto", "fp8")
BACKENDS = ("torch", *FLAVOURS)


# What TensorRT must know to set memory aside or to choose kernels: an engine here takes any prompt that max_seq_len leaves
# room for, and beam searches of up to 16, as they come.
_TUNING = (
    "opt_batch_size", "opt_num_tokens", "max_input_len", "max_beam_width", "max_encoder_input_len", "strongly_typed",
    "builder_opt", "force_num_profiles", "profiling_verbosity", "enable_debug_output", "input_timing_cache",
    "output_timing_cache", "plugin_config", "kv_cache_type", "auto_parallel_config", "visualize_network", "monitor_memory",
)  # fmt: skip
_ABSENT = {
    "max_prompt_embedding_table_size": 0,
    "gather_context_logits": False,
    "gather_generation_logits": False,
    "max_draft_len": 0,
    "speculative_decoding_mode": 1,
    "use_refit": False,
    "use_strip_plan": False,
    "lora_config": None,
    "weight_sparsity": False,
    "dry_run": False,
    "use_mrope": False,
}


@also_takes(ignored=_TUNING, off=_ABSENT)
@dataclass
class BuildConfig:
    """What decides an engine beside its checkpoint.

    TensorRT-LLM's other options are taken, too: those that tune TensorRT have no effect, and those that ask for what
    is not there raise Unimplemented (docs/migrating-from-tensorrt-llm.md lists them).

    Attributes:
        dtype: of weights and activations. "auto" is the checkpoint's own on CUDA and float32 on the CPU.
        device: "cpu" or "cuda", where the engine will run; "auto" is "cuda" where the build finds a GPU.
        compute_capability: of the GPU, such as "9.0": the engine brings its kernels, compiled for that; None when any will do.
            "tensorrt_rtx" needs it, "tensorrt" takes that of the GPU which is here.
        max_batch_size: requests in one step.
        max_seq_len: tokens of a prompt and its completion together; None takes the checkpoint's limit.
        max_num_tokens: tokens in one step over all requests; longer prompts are computed in chunks.
        dummy_weights: read no weights; executors make random ones.
        tp_size: ranks that each layer is divided among (tensor parallelism).
        pp_size: groups of ranks that the layers are divided among (pipeline parallelism). Where a model has a mapping of its own,
            both say the same, or are left at 1.
        backend: what runs the engine: "torch"; or "tensorrt" or "tensorrt_rtx", for which it is a plan (docs/tensorrt.md).
        weight_streaming: whether a plan may keep its weights in main memory while it runs.
        kv_cache_dtype: "auto" is that of activations, or what the model was quantized for; "fp8" float8_e4m3fn, by the
            checkpoint's scales where it has any.
        quant_config: how to quantize the model before; by default not at all.
        calib_config: the text for that; by default the one that is bundled.

    Raises:
        InvalidArgument: (a ValueError) names the value and what is allowed.

    Example:
        >>> from enginehouse import BuildConfig
        >>> BuildConfig(max_batch_size=8, max_seq_len=512, strongly_typed=True).max_batch_size
        8
    """

    dtype: str = "auto"
    device: str = "auto"
    compute_capability: str | None = None
    max_batch_size: int = 64
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    dummy_weights: bool = False
    kv_cache_dtype: str = "auto"
    tp_size: int = 1
    pp_size: int = 1
    quant_config: QuantConfig | None = None
    calib_config: CalibConfig | None = None
    backend: str = "torch"
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.quant_config, dict):  # of to_dict
            self.quant_config = QuantConfig(**self.quant_config)
        if isinstance(self.calib_config, dict):
            self.calib_config = CalibConfig(**self.calib_config)
        self.check()

    @property
    def plugin_config(self) -> PluginConfig:
        """Takes any setting, and has no effect."""
        return PluginConfig()

    @property
    def target(self) -> str:
        """The device, of "auto" the one that is meant."""
        if self.backend != "torch":
            return "cuda"
        if self.device != "auto":
            return self.device
        if not Path("/dev/nvidiactl").exists():  # to ask torch takes seconds
            return "cpu"
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @staticmethod
    def from_dict(options: dict[str, Any]) -> "BuildConfig":
        """Of the constructor's keywords; raises what it raises."""
        return BuildConfig(**options)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return asdict(self)

    def check(self) -> None:
        """Raises InvalidArgument for a value that cannot be; `build` calls it, since attributes may have been set."""
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise InvalidArgument(f"device {self.device!r}: choose one of {', '.join(DEVICES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise InvalidArgument(f"kv_cache_dtype {self.kv_cache_dtype!r}: choose one of {', '.join(KV_CACHE_DTYPES)}")
        self._check_backend()
        checked(self.quant_config)
        if not isinstance(self.calib_config, CalibConfig | None):
            raise InvalidArgument(f"calib_config is {self.calib_config!r}: give a CalibConfig")
        if self.compute_capability is not None:
            if self.device != "cuda" and self.backend == "torch":
                raise InvalidArgument(
                    f"compute capability {self.compute_capability} needs device 'cuda', not {self.device!r}"
                )
            if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", self.compute_capability):
                raise InvalidArgument(f"compute capability {self.compute_capability!r}: write it like 9.0")
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "tp_size", "pp_size"):
            value = getattr(self, name)
            if name == "max_seq_len" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise InvalidArgument(f"{name} is {value!r}: it must be at least 1")
        if self.max_num_tokens < self.max_batch_size:
            raise InvalidArgument(
                f"max_num_tokens is {self.max_num_tokens}, less than max_batch_size {self.max_batch_size}: "
                "a step must hold a token of every request"
            )

    def _check_backend(self) -> None:
        if self.backend not in BACKENDS:
            raise InvalidArgument(f"backend {self.backend!r}: choose one of {', '.join(BACKENDS)}")
        if self.backend == "torch":
            if self.weight_streaming:
                raise InvalidArgument(f"weight_streaming needs backend {' or '.join(FLAVOURS)}, not 'torch'")
            return
        if self.device == "cpu":
            raise InvalidArgument(f"backend {self.backend!r} makes engines for GPUs, not for device 'cpu'")
        if self.dummy_weights:
            raise InvalidArgument(
                f"dummy_weights are made by executors, but a plan of backend {self.backend!r} holds its weights: choose one"
            )
        check_target(self.backend, self.compute_capability)
