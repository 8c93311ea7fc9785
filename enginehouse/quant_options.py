"""What can be typed about quantizing, by the commands that do it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from builder_svc.quant_config import ALGORITHMS, GROUP_SIZES, KV_ALGORITHMS, CalibConfig, QuantAlgo, QuantConfig
from enginehouse.options import MOST

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Quantization:
    """What a person chose; None leaves it at the default."""

    quant: str | None = None
    kv_cache_quant: str | None = None
    group_size: int | None = None
    zero_points: bool = False
    smoothquant: float | None = None
    exclude: tuple[str, ...] = ()
    quantize_lm_head: bool = False
    calib_data: str | None = None
    calib_samples: int | None = None
    calib_length: int | None = None
    calib_seed: int | None = None

    @property
    def asked(self) -> bool:
        """Whether anything is to be quantized."""
        return bool(self.quant or self.kv_cache_quant)

    def config(self) -> QuantConfig:
        """For a build. Raises InvalidArgument, as QuantConfig does."""
        given = {"group_size": self.group_size, "smoothquant_val": self.smoothquant}
        return QuantConfig(
            QuantAlgo(self.quant) if self.quant else None,
            QuantAlgo(self.kv_cache_quant) if self.kv_cache_quant else None,
            has_zero_point=self.zero_points,
            exclude_modules=list(self.exclude) or None,
            quantize_lm_head=self.quantize_lm_head,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def calibration(self) -> CalibConfig:
        """For a build. Raises InvalidArgument, as CalibConfig does."""
        given = {
            "calib_dataset": self.calib_data,
            "calib_batches": self.calib_samples,
            "calib_max_seq_length": self.calib_length,
            "random_seed": self.calib_seed,
        }
        return CalibConfig(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


_OPTIONS = (
    click.option(
        "--quant",
        metavar="ALGORITHM",
        type=click.Choice([algo.value for algo in ALGORITHMS], case_sensitive=False),
        help=f"How weights are quantized: {', '.join(ALGORITHMS)}.  [default: not at all]",
    ),
    click.option(
        "--kv-cache-quant",
        type=click.Choice([algo.value for algo in KV_ALGORITHMS], case_sensitive=False),
        help="The KV cache in 8 bits, by calibrated scales.",
    ),
    click.option(
        "--group-size",
        type=click.Choice([str(size) for size in GROUP_SIZES]),
        callback=lambda _, __, value: int(value) if value else None,
        help="Inputs of int4 weights that share a scale.  [default: 128]",
    ),
    click.option("--zero-points", is_flag=True, help="Int4 groups have a zero point each, too."),
    click.option(
        "--smoothquant",
        type=click.FloatRange(0, 1),
        help="How much of activations' range SmoothQuant moves into weights.  [default: 0.5]",
    ),
    click.option(
        "--exclude",
        metavar="MODULE",
        multiple=True,
        help="A linear that stays as it is, or a pattern such as '*.down_proj'; may be repeated.",
    ),
    click.option("--quantize-lm-head", is_flag=True, help="The head, too, unless it is the embedding."),
    click.option(
        "--calib-data",
        metavar="PATH",
        help="Text to calibrate with: a text or .jsonl file, or a directory of them.  [default: a bundled text]",
    ),
    click.option("--calib-samples", type=click.IntRange(1, MOST), help="Sequences of it.  [default: 128]"),
    click.option("--calib-length", type=click.IntRange(1, MOST), help="Tokens of each.  [default: 512]"),
    click.option("--calib-seed", type=click.IntRange(0, MOST), help="Of the choice of them.  [default: 1234]"),
)
_NAMES = tuple(Quantization.__dataclass_fields__)


def with_quantization(function: _Function) -> Callable[..., Any]:
    """Adds the options; the function gets `quantization`. The others need --quant or --kv-cache-quant."""

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        chosen = Quantization(**{name: arguments.pop(name) for name in _NAMES})
        if not chosen.asked and chosen != Quantization():
            raise click.UsageError("say how to quantize, with --quant or --kv-cache-quant")
        return function(quantization=chosen, **arguments)

    for option in reversed(_OPTIONS):
        run = option(run)
    return run
