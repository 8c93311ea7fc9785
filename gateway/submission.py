"""A client's request, checked, as the Submit that an executor gets. Nothing is queued before all of it is right."""

import secrets
from collections.abc import Sequence

from engine.errors import FailedPrecondition, InvalidArgument
from gateway.bad_words import bad_token_ids, check_bad_words
from gateway.models import Model
from gateway.tokenizer import Tokenizer
from protos.checks import check_beam, check_min_tokens, check_output, check_sampling, check_stopping
from protos.guidance import check_guided
from protos.v1.common_pb2 import StoppingCriteria
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import GenerateRequest, TokenizeRequest

MAX_COMPLETIONS = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters

_PROMPTS = ("text", "token_ids", "chat")
_SHOWN = 40  # characters of a prompt in an error


def check(request: GenerateRequest, max_bytes: int | None = None) -> None:
    """Raises InvalidArgument for what can be seen without the model, and for a prompt's text of more bytes."""
    kind = check_prompt(request, max_bytes)
    if not (request.text or request.token_ids.ids or request.chat.messages):
        raise InvalidArgument(
            f"the prompt is empty: give some {kind}, or as token_ids the token to begin with", reason="PROMPT_EMPTY"
        )
    check_sampling(request.sampling)
    check_stopping(request.stopping)
    check_output(request.output)
    check_beam(request.beam_search, request.output)
    if request.HasField("guided_decoding"):
        check_guided(request.guided_decoding, request.beam_search)
    _check_stops(request.stop)
    check_bad_words(request.bad_words)
    _check_completions(request)


def check_prompt(request: GenerateRequest | TokenizeRequest, max_bytes: int | None = None) -> str:
    """Which one of its prompts a request has: "text", "token_ids" or "chat".

    Raises InvalidArgument for none or several, or for a text of more bytes than anybody should make tokens of.
    """
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
    if max_bytes is not None and (size := _bytes_of_text(request)) > max_bytes:
        raise InvalidArgument(
            f"the prompt has {size} bytes of text, and this gateway takes {max_bytes}: shorten it, or start the gateway with a "
            "higher --max-prompt-bytes",
            reason="PROMPT_TOO_LONG",
        )
    return given[0]


def num_completions(request: GenerateRequest) -> tuple[int, int]:
    """How many completions a checked request is given, and how many are made for that."""
    given = request.n if request.HasField("n") else 1
    return given, request.best_of if request.HasField("best_of") else given


def submission(request: GenerateRequest, model: Model, prompt: Sequence[int], tokenizer: Tokenizer) -> Submit:
    """The executor's form of a checked request: with a limit and a seed, so that it could go on elsewhere as it began.

    Of several completions, the first: `sibling` makes the others.

    Raises InvalidArgument for what does not fit the model, FailedPrecondition for what needs a tokenizer that is not there.
    """
    if not prompt:
        raise InvalidArgument(
            f"the prompt gives no tokens with the tokenizer of model {model.name!r}: {_shown(request)}. "
            "Give other text, or as token_ids the token to begin with",
            reason="PROMPT_EMPTY",
        )
    if request.stop and not model.has_tokenizer:
        raise FailedPrecondition(
            f"model {model.name!r} has no tokenizer, so that no stop string can be found: give stop_token_ids",
            reason="TOKENIZER_MISSING",
        )
    if request.HasField("guided_decoding") and not model.has_token_table:
        raise FailedPrecondition(
            f"the engine of model {model.name!r} does not tell the bytes of its tokens, by which output is guided: build it "
            "again with this release, of a checkpoint with a tokenizer",
            reason="TOKEN_TABLE_MISSING",
        )
    max_tokens = _max_tokens(request.stopping, model, len(prompt))  # first: what is far too long is not looked through
    check_min_tokens(request.stopping.min_tokens, max_tokens)
    check_token_ids(prompt, model)
    check_token_ids(request.stopping.stop_token_ids, model, "stop_token_ids")
    check_token_ids(list(request.sampling.logit_bias), model, "logit_bias")
    for bad in request.sampling.bad_token_ids:
        check_token_ids(bad.ids, model, "bad_token_ids")
    submit = Submit(
        engine_id=model.engine_id,
        token_ids=prompt,
        sampling=request.sampling,
        stopping=request.stopping,
        priority=request.priority,
    )
    submit.stopping.max_tokens = max_tokens
    if not submit.sampling.HasField("seed"):
        submit.sampling.seed = secrets.randbits(64)
    for ids in bad_token_ids(request.bad_words, tokenizer):
        submit.sampling.bad_token_ids.add(ids=ids)
    if request.HasField("output"):
        submit.output.CopyFrom(request.output)
    if request.HasField("best_of") and not submit.output.HasField("logprobs"):
        submit.output.logprobs = 0  # what they are ranked by
    if request.HasField("guided_decoding"):
        submit.guided_decoding.CopyFrom(request.guided_decoding)
    if request.beam_search.width:
        submit.beam_search.CopyFrom(request.beam_search)
    return submit


def sibling(first: Submit, index: int) -> Submit:
    """The request for completion `index`: the first's with a seed of its own, which follows from it.

    The prompt's log-probabilities are the first's alone: an executor that computes them again cannot use its prefix cache.
    """
    submit = Submit()
    submit.CopyFrom(first)
    submit.sampling.seed = (first.sampling.seed + index) % 2**64
    submit.output.ClearField("prompt_logprobs")
    return submit


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


def _bytes_of_text(request: GenerateRequest | TokenizeRequest) -> int:
    """As it came: UTF-8."""
    return len(request.text.encode()) + request.chat.ByteSize()


def _check_completions(request: GenerateRequest) -> None:
    given, made = num_completions(request)
    if not 1 <= given <= MAX_COMPLETIONS:
        raise InvalidArgument(f"n is {given}: give 1 to {MAX_COMPLETIONS}", reason="N_INVALID")
    if request.beam_search.width:
        if request.HasField("best_of"):
            raise InvalidArgument(
                "best_of and beam_search exclude each other: a beam search ranks its own hypotheses, n of which are given",
                reason="BEST_OF_INVALID",
            )
        if given > request.beam_search.width:
            raise InvalidArgument(
                f"n is {given}, but a beam search of width {request.beam_search.width} has no more hypotheses than that: "
                "lower n or raise the width",
                reason="N_INVALID",
            )
    if not given <= made <= MAX_COMPLETIONS:
        raise InvalidArgument(
            f"best_of is {made}: give at least n, which is {given}, and at most {MAX_COMPLETIONS}",
            reason="BEST_OF_INVALID",
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
