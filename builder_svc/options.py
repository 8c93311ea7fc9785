"""What a caller may choose about a build."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import InvalidArgument

Progress = Callable[[str, int, int, str], None]
"""Called with (phase, done, total, unit) as a build goes on.

The phases are "download" (of a checkpoint that is not here yet), "checkpoint", "program", "weights", "upload" and "publish";
the unit is "bytes" or "".
"""

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class BuildOptions:
    """What decides an engine beside its checkpoint.

    Attributes:
        dtype: of weights and activations. "auto" is the checkpoint's own on CUDA and float32 on the CPU.
        device: "cpu" or "cuda", where the engine will run.
        compute_capability: of the GPU, such as "9.0"; None when any will do.
        max_batch_size: requests in one step.
        max_seq_len: tokens of a prompt and its completion together; None takes the checkpoint's limit.
        max_num_tokens: tokens in one step over all requests; longer prompts are computed in chunks.
        dummy_weights: read no weights; executors make random ones.

    Raises:
        InvalidArgument: names the value and what is allowed.
    """

    dtype: str = "auto"
    device: str = "cpu"
    compute_capability: str | None = None
    max_batch_size: int = 64
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    dummy_weights: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise InvalidArgument(f"device {self.device!r}: choose one of {', '.join(DEVICES)}")
        if self.compute_capability is not None:
            if self.device != "cuda":
                raise InvalidArgument(
                    f"compute capability {self.compute_capability} needs device 'cuda', not {self.device!r}"
                )
            if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", self.compute_capability):
                raise InvalidArgument(f"compute capability {self.compute_capability!r}: write it like 9.0")
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} is {value}: it must be at least 1")
        if self.max_num_tokens < self.max_batch_size:
            raise InvalidArgument(
                f"max_num_tokens is {self.max_num_tokens}, less than max_batch_size {self.max_batch_size}: "
                "a step must hold a token of every request"
            )
