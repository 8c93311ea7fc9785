"""What gateway and executor both check of a request, in the same words."""

import math

from engine.errors import InvalidArgument
from protos.v1.common_pb2 import BeamSearch, OutputOptions, SamplingParams, StoppingCriteria

MAX_LOGPROBS = 20  # alternatives a token
MAX_BEAMS = 16


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidArgument for a temperature or top_p that means nothing."""
    temperature = params.temperature if params.HasField("temperature") else 1.0
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InvalidArgument(
            f"temperature is {temperature:g}: give a finite number, at least 0 (0 is greedy)",
            reason="TEMPERATURE_INVALID",
        )
    top_p = params.top_p if params.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise InvalidArgument(
            f"top_p is {top_p:g}: give a number above 0 and at most 1 (1 keeps all tokens)", reason="TOP_P_INVALID"
        )


def check_stopping(stopping: StoppingCriteria) -> None:
    """Raises InvalidArgument for a max_tokens of 0."""
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        raise InvalidArgument(
            "max_tokens is 0: give at least 1, or leave it out for as many as fit", reason="MAX_TOKENS_INVALID"
        )


def check_output(output: OutputOptions) -> None:
    """Raises InvalidArgument for more alternatives than are told."""
    for name in ("logprobs", "prompt_logprobs"):
        if (count := getattr(output, name)) > MAX_LOGPROBS:
            raise InvalidArgument(
                f"{name} is {count}: give 0 to {MAX_LOGPROBS} alternatives a token", reason="LOGPROBS_INVALID"
            )


def check_beam(beam: BeamSearch) -> None:
    """Raises InvalidArgument for a beam search that means nothing."""
    if beam.width > MAX_BEAMS:
        raise InvalidArgument(f"beam width is {beam.width}: give 1 to {MAX_BEAMS}", reason="BEAM_WIDTH_INVALID")
    if not math.isfinite(beam.length_penalty):
        raise InvalidArgument(
            f"length_penalty is {beam.length_penalty:g}: give a finite number", reason="LENGTH_PENALTY_INVALID"
        )
    if not (math.isfinite(beam.diversity_rate) and beam.diversity_rate >= 0):
        raise InvalidArgument(
            f"diversity_rate is {beam.diversity_rate:g}: give a finite number, at least 0",
            reason="DIVERSITY_RATE_INVALID",
        )
