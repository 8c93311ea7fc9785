"""What gateway and executor both check of a request, in the same words. The ranges stand in common.proto."""

import math

from engine.errors import InvalidArgument
from protos.v1.common_pb2 import BeamSearch, EarlyStopping, OutputOptions, SamplingParams, StoppingCriteria

MAX_LOGPROBS = 20
MAX_WIDTH = 16
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_LENGTH_PENALTY = 10.0
MAX_TOKENS_NAMED = 1024  # stop ids, biased tokens, bad sequences: each of them is work at every step
MAX_BAD_LENGTH = 64  # tokens of a bad sequence


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidArgument for a value that means nothing; token ids are checked where the vocabulary is known."""
    temperature = params.temperature if params.HasField("temperature") else 1.0
    _check(
        math.isfinite(temperature) and temperature >= 0,
        f"temperature is {temperature:g}: give a finite number, at least 0 (0 is greedy)",
        "TEMPERATURE_INVALID",
    )
    top_p = params.top_p if params.HasField("top_p") else 1.0
    _check(
        0 < top_p <= 1,
        f"top_p is {top_p:g}: give a number above 0 and at most 1 (1 keeps all tokens)",
        "TOP_P_INVALID",
    )
    _check(
        0 <= params.min_p <= 1,
        f"min_p is {params.min_p:g}: give a number from 0 to 1 (0 keeps all tokens)",
        "MIN_P_INVALID",
    )
    repetition = params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
    _check(
        math.isfinite(repetition) and repetition > 0,
        f"repetition_penalty is {repetition:g}: give a finite number above 0 (1 is none)",
        "REPETITION_PENALTY_INVALID",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(params, name)
        _check(
            abs(penalty) <= MAX_PENALTY,
            f"{name} is {penalty:g}: give a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g} (0 is none)",
            f"{name.upper()}_INVALID",
        )
    _check_count("logit_bias", "tokens", len(params.logit_bias))
    for token, bias in params.logit_bias.items():
        _check(
            abs(bias) <= MAX_BIAS,
            f"logit_bias of token {token} is {bias:g}: give a number from -{MAX_BIAS:g} to {MAX_BIAS:g}",
            "LOGIT_BIAS_INVALID",
        )
    _check_count("bad_token_ids", "sequences", len(params.bad_token_ids))
    longest = max((len(word.ids) for word in params.bad_token_ids), default=0)
    _check(
        longest <= MAX_BAD_LENGTH,
        f"bad_token_ids holds a sequence of {longest} tokens: give at most {MAX_BAD_LENGTH} in each",
        "BAD_TOKEN_IDS_INVALID",
    )
    _check(
        all(word.ids for word in params.bad_token_ids),
        "bad_token_ids holds an empty sequence: give each at least one token id, or leave it out",
        "BAD_TOKEN_IDS_INVALID",
    )


def check_stopping(stopping: StoppingCriteria) -> None:
    """Raises InvalidArgument for a max_tokens of 0, a min_tokens above it, or too many stop ids."""
    _check_count("stop_token_ids", "tokens", len(stopping.stop_token_ids))
    if not stopping.HasField("max_tokens"):
        return
    _check(
        stopping.max_tokens > 0,
        "max_tokens is 0: give at least 1, or leave it out for as many as fit",
        "MAX_TOKENS_INVALID",
    )
    check_min_tokens(stopping.min_tokens, stopping.max_tokens)


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    """Raises InvalidArgument for a min_tokens that max_tokens, given or by default, does not allow."""
    _check(
        min_tokens <= max_tokens,
        f"min_tokens is {min_tokens}, max_tokens {max_tokens}: lower the one or raise the other",
        "MIN_TOKENS_INVALID",
    )


def check_output(output: OutputOptions) -> None:
    """Raises InvalidArgument for more alternatives than are told."""
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(output, name)
        _check(
            count <= MAX_LOGPROBS,
            f"{name} is {count}: ask for at most {MAX_LOGPROBS} alternatives a token",
            f"{name.upper()}_INVALID",
        )


def check_beam(beam: BeamSearch, output: OutputOptions) -> None:
    """Raises InvalidArgument for a beam search that means nothing, or that is asked for what it cannot tell."""
    if not beam.width:
        return
    _check(
        beam.width <= MAX_WIDTH,
        f"beam_search.width is {beam.width}: give 1 to {MAX_WIDTH}, or 0 for no beam search",
        "BEAM_WIDTH_INVALID",
    )
    _check(
        abs(beam.length_penalty) <= MAX_LENGTH_PENALTY,
        f"beam_search.length_penalty is {beam.length_penalty:g}: give a number from -{MAX_LENGTH_PENALTY:g} to "
        f"{MAX_LENGTH_PENALTY:g} (1 is the default, 0 is none)",
        "LENGTH_PENALTY_INVALID",
    )
    _check(
        beam.early_stopping in EarlyStopping.values(),
        f"beam_search.early_stopping is {beam.early_stopping}: give one of {', '.join(EarlyStopping.keys()[1:])}",
        "EARLY_STOPPING_INVALID",
    )
    _check(
        math.isfinite(beam.diversity_rate) and beam.diversity_rate >= 0,
        f"beam_search.diversity_rate is {beam.diversity_rate:g}: give a finite number, at least 0 (0 is none)",
        "DIVERSITY_RATE_INVALID",
    )
    for name in ("logprobs", "prompt_logprobs"):
        _check(
            not output.HasField(name),
            f"{name} is asked for beside beam_search, which tells each hypothesis' log-probability only: leave one of both out",
            "BEAM_SEARCH_LOGPROBS",
        )


def _check_count(name: str, what: str, count: int) -> None:
    _check(
        count <= MAX_TOKENS_NAMED,
        f"{name} has {count} {what}: give at most {MAX_TOKENS_NAMED}",
        f"{name.upper()}_INVALID",
    )


def _check(right: bool, message: str, reason: str) -> None:
    if not right:
        raise InvalidArgument(message, reason=reason)
