"""A client's request, checked, as the Submit that an executor gets. Nothing is queued before all of it is right."""

import secrets
from collections.abc import Sequence

from engine.errors import InvalidArgument
from gateway.models import Model
from protos.checks import check_sampling, check_stopping
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import GenerateRequest

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters


def check(request: GenerateRequest) -> None:
    """Raises InvalidArgument for what can be seen without the model."""
    _check_prompt(request)
    check_sampling(request.sampling)
    check_stopping(request.stopping)
    _check_stops(request.stop)


def submission(request: GenerateRequest, model: Model, prompt: Sequence[int]) -> Submit:
    """The executor's form of a checked request: with a limit and a seed, so that it could go on elsewhere as it began.

    Raises InvalidArgument for what does not fit the model.
    """
    check_token_ids(prompt, model)
    check_token_ids(request.stopping.stop_token_ids, model, "stop_token_ids")
    if not prompt:
        raise InvalidArgument("the prompt has no tokens: give more text", reason="PROMPT_EMPTY")
    sampling, stopping = SamplingParams(), StoppingCriteria()
    sampling.CopyFrom(request.sampling)
    stopping.CopyFrom(request.stopping)
    stopping.max_tokens = _max_tokens(request.stopping, model, len(prompt))
    if not sampling.HasField("seed"):
        sampling.seed = secrets.randbits(64)
    return Submit(
        engine_id=model.engine_id, token_ids=prompt, sampling=sampling, stopping=stopping, priority=request.priority
    )


def check_token_ids(token_ids: Sequence[int], model: Model, name: str = "token_ids") -> None:
    """Raises InvalidArgument unless the model knows them all."""
    highest = max(token_ids, default=0)
    if highest >= model.vocab_size:
        raise InvalidArgument(
            f"{name} holds {highest}, but model {model.name!r} has {model.vocab_size} tokens: "
            f"use ids from 0 to {model.vocab_size - 1}",
            reason="TOKEN_ID_INVALID",
            metadata={"token_id": str(highest), "vocab_size": str(model.vocab_size)},
        )


def _max_tokens(stopping: StoppingCriteria, model: Model, prompt: int) -> int:
    room = model.max_seq_len - prompt
    facts = {"prompt_tokens": str(prompt), "max_seq_len": str(model.max_seq_len)}
    if room <= 0:
        raise InvalidArgument(
            f"the prompt has {prompt} tokens, but model {model.name!r} takes {model.max_seq_len} with the completion: "
            f"shorten it to at most {model.max_seq_len - 1}",
            reason="CONTEXT_TOO_LONG",
            metadata=facts,
        )
    if not stopping.HasField("max_tokens"):
        return room
    if stopping.max_tokens > room:
        raise InvalidArgument(
            f"prompt ({prompt} tokens) and max_tokens ({stopping.max_tokens}) are more than the {model.max_seq_len} "
            f"that model {model.name!r} takes: lower max_tokens to at most {room}, or leave it out",
            reason="CONTEXT_TOO_LONG",
            metadata=facts,
        )
    return stopping.max_tokens


def _check_prompt(request: GenerateRequest) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidArgument("no prompt: set one of `text`, `token_ids` and `chat`", reason="PROMPT_MISSING")
    if not (request.text or request.token_ids.ids or request.chat.messages):
        raise InvalidArgument(
            f"the prompt is empty: give some {kind}, or as token_ids the token to begin with", reason="PROMPT_EMPTY"
        )
    if not all(message.role for message in request.chat.messages):
        raise InvalidArgument(
            "a chat message has no role: give each one, such as system, user or assistant", reason="CHAT_INVALID"
        )


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidArgument(f"{len(stops)} stop strings: give at most {MAX_STOPS}", reason="STOP_INVALID")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise InvalidArgument(
                f"a stop string has {len(stop)} characters: give 1 to {MAX_STOP_LENGTH}, or leave it out",
                reason="STOP_INVALID",
            )
