"""A client's request, checked, as the Submit that an executor gets. Nothing is queued before all of it is right."""

import secrets
from collections.abc import Sequence

from engine.errors import InvalidArgument
from gateway.models import Model
from protos.checks import check_sampling, check_stopping
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import GenerateRequest, TokenizeRequest

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters

_PROMPTS = ("text", "token_ids", "chat")
_SHOWN = 40  # characters of a prompt in an error


def check(request: GenerateRequest) -> None:
    """Raises InvalidArgument for what can be seen without the model."""
    kind = check_prompt(request)
    if not (request.text or request.token_ids.ids or request.chat.messages):
        raise InvalidArgument(
            f"the prompt is empty: give some {kind}, or as token_ids the token to begin with", reason="PROMPT_EMPTY"
        )
    check_sampling(request.sampling)
    check_stopping(request.stopping)
    _check_stops(request.stop)


def check_prompt(request: GenerateRequest | TokenizeRequest) -> str:
    """Which one of its prompts a request has: "text", "token_ids" or "chat". Raises InvalidArgument for none or several."""
    kinds = [kind for kind in _PROMPTS if kind in request.DESCRIPTOR.fields_by_name]
    given = [field.name for field, _ in request.ListFields() if field.name in kinds]
    if not given:
        raise InvalidArgument(f"no prompt: set one of {_listed(kinds)}", reason="PROMPT_MISSING")
    if len(given) > 1:
        raise InvalidArgument(
            f"the prompt is given {len(given)} times, as {_listed(given)}: set only one of {_listed(kinds)}",
            reason="PROMPT_AMBIGUOUS",
        )
    if not all(message.role for message in request.chat.messages):
        raise InvalidArgument(
            "a chat message has no role: give each one, such as system, user or assistant", reason="CHAT_INVALID"
        )
    return given[0]


def submission(request: GenerateRequest, model: Model, prompt: Sequence[int]) -> Submit:
    """The executor's form of a checked request: with a limit and a seed, so that it could go on elsewhere as it began.

    Raises InvalidArgument for what does not fit the model.
    """
    if not prompt:
        raise InvalidArgument(
            f"the prompt gives no tokens with the tokenizer of model {model.name!r}: {_shown(request)}. "
            "Give other text, or as token_ids the token to begin with",
            reason="PROMPT_EMPTY",
        )
    max_tokens = _max_tokens(request.stopping, model, len(prompt))  # first: what is far too long is not looked through
    check_token_ids(prompt, model)
    check_token_ids(request.stopping.stop_token_ids, model, "stop_token_ids")
    sampling, stopping = SamplingParams(), StoppingCriteria()
    sampling.CopyFrom(request.sampling)
    stopping.CopyFrom(request.stopping)
    stopping.max_tokens = max_tokens
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


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(kinds[:-1]) + " and " + kinds[-1]


def _shown(request: GenerateRequest) -> str:
    """The beginning of a text or of a conversation, for an error."""
    text = request.text or " ".join(message.content for message in request.chat.messages)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise InvalidArgument(f"{len(stops)} stop strings: give at most {MAX_STOPS}", reason="STOP_INVALID")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise InvalidArgument(
                f"a stop string has {len(stop)} characters: give 1 to {MAX_STOP_LENGTH}, or leave it out",
                reason="STOP_INVALID",
            )
