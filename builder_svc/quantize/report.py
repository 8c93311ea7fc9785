"""What quantizing a model has cost and gained: sizes, perplexity on text that it was not calibrated with, errors by linear."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from builder_svc.build_config import Progress
from builder_svc.causal_lm import CausalLM
from builder_svc.quant_config import CalibConfig, QuantConfig
from builder_svc.quantize.measure import held_out, perplexity
from builder_svc.quantize.run import LinearError

_STANDS_OUT = 2.0  # times the median error


@dataclass(frozen=True)
class Report:
    """Before and after.

    Attributes:
        facts: how it was quantized (`quantize/plan.py`).
        bytes_before, bytes_after: of all weights, in the model's dtype and as they are saved.
        tokens: of the held-out text, on which the perplexities were measured.
        linears: what each has lost, in the order of the model.
        exclude: names of those whose error stands out, the largest first: what to keep as it is, if the loss is too large.
        exclude_bytes: what the checkpoint would be larger by then.
    """

    facts: dict[str, Any]
    bytes_before: int
    bytes_after: int
    perplexity_before: float
    perplexity_after: float
    tokens: int
    linears: tuple[LinearError, ...]
    exclude: tuple[str, ...]
    exclude_bytes: int

    @property
    def loss(self) -> float:
        """By how much the perplexity has grown, relative."""
        return self.perplexity_after / self.perplexity_before - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "loss": self.loss}


def quantize_and_report(
    model: CausalLM,
    quant_config: QuantConfig,
    calib: CalibConfig,
    output_dir: Path,
    tokens: int,
    progress: Progress = lambda *_: None,
) -> Report:
    """Quantizes a model, and measures it before and after.

    Args:
        tokens: of the held-out text, at most.

    Raises:
        What `CausalLM.quantize` and `held_out` raise.
    """
    plan = model.plan(quant_config, calib, measures=True)
    sequences, start = held_out(model, tokens)
    before = perplexity(model, sequences, start, calib.device, progress)
    errors = model.write_quantized(plan, output_dir, progress)
    made = type(model).from_checkpoint(output_dir)
    after = perplexity(made, sequences, start, calib.device, progress)
    dense = model.declared()
    exclude = standing_out(errors)
    grown = sum(dense[f"{one.name}.weight"].nbytes - one.nbytes for one in errors if one.name in exclude)
    return Report(
        plan.facts,
        sum(declared.nbytes for declared in dense.values()),
        sum(declared.nbytes for declared in made.declared().values()),
        before.value,
        after.value,
        before.tokens,
        tuple(errors),
        exclude,
        grown,
    )


def standing_out(errors: Sequence[LinearError]) -> tuple[str, ...]:
    """Names of linears whose error is more than twice the median, the largest first."""
    found = {one.name: one.error for one in errors if one.error is not None}
    if not found:
        return ()
    bound = _STANDS_OUT * median(found.values())
    return tuple(sorted((name for name, error in found.items() if error > bound), key=lambda name: -found[name]))
