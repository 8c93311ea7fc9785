"""What gateway and executor both check of a request, in the same words."""

import math

from engine.errors import InvalidArgument
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria


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
