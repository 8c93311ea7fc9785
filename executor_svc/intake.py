"""From a Submit message to a Sequence: every value of a caller is checked here, before anything is queued."""

import hashlib
import secrets
import time

from engine.errors import DeadlineExceeded, InvalidArgument
from engine.manifest import Manifest
from executor_svc.beams import BeamSearch, EarlyStopping
from executor_svc.core import Sampling, Sequence
from protos.checks import check_beam, check_min_tokens, check_output, check_sampling, check_stopping
from protos.guidance import check_guided
from protos.v1 import common_pb2
from protos.v1.executor_pb2 import Submit

_EARLY_STOPPING = {
    common_pb2.EARLY_STOPPING_UNSPECIFIED: EarlyStopping.HEURISTIC,
    common_pb2.EARLY_STOPPING_ENOUGH: EarlyStopping.ENOUGH,
    common_pb2.EARLY_STOPPING_HEURISTIC: EarlyStopping.HEURISTIC,
    common_pb2.EARLY_STOPPING_NEVER: EarlyStopping.NEVER,
}

MAX_BEAM_STOPS = 64  # stop ids of a beam search, each of which is one more candidate of every beam


def to_sequence(client: int, submit: Submit, manifest: Manifest, arrived: float | None = None) -> Sequence:
    """The request as the scheduler wants it.

    Args:
        arrived: time.monotonic() seconds at which its timeout begins; None is now.

    Raises:
        InvalidArgument: names the value and what is allowed.
        DeadlineExceeded: its time is over already.
    """
    vocab_size, max_seq_len = manifest.model.vocab_size, manifest.limits.max_seq_len
    prompt, resumed = list(submit.token_ids), list(submit.resume_token_ids)
    if not prompt:
        raise InvalidArgument("the prompt is empty; give at least one token id", reason="PROMPT_EMPTY")
    check_stopping(submit.stopping)
    check_output(submit.output)
    if submit.HasField("guided_decoding"):
        check_guided(submit.guided_decoding, submit.beam_search)
    room = max_seq_len - len(prompt)
    max_tokens = submit.stopping.max_tokens if submit.stopping.HasField("max_tokens") else max(room, 1)
    if max_tokens > room:  # before the ids: what is far too long is not looked through
        fix = f"lower max_tokens to at most {room}" if room > 0 else f"shorten it to at most {max_seq_len - 1}"
        raise InvalidArgument(
            f"{len(prompt)} prompt tokens and max_tokens {max_tokens} exceed the engine's max_seq_len of {max_seq_len}: "
            f"{fix}",
            reason="CONTEXT_TOO_LONG",
        )
    if len(resumed) >= max_tokens:
        raise InvalidArgument(
            f"{len(resumed)} resume_token_ids leave nothing of max_tokens {max_tokens}: they count as completion, raise it",
            reason="MAX_TOKENS_INVALID",
        )
    check_min_tokens(submit.stopping.min_tokens, max_tokens)
    sampling = to_sampling(submit.sampling)
    for token in (
        *prompt,
        *resumed,
        *submit.stopping.stop_token_ids,
        *submit.sampling.logit_bias,
        *(token for word in sampling.bad_words for token in word),
    ):
        if token >= vocab_size:
            raise InvalidArgument(
                f"token id {token} is outside the vocabulary of {vocab_size}: use ids from 0 to {vocab_size - 1}",
                reason="TOKEN_ID_INVALID",
            )
    eos_ids = frozenset() if submit.stopping.ignore_eos else frozenset(manifest.model.eos_token_ids)
    stop_ids = frozenset(submit.stopping.stop_token_ids)
    never = {word[0] for word in sampling.bad_words if len(word) == 1}
    if len(never | (eos_ids | stop_ids if submit.stopping.min_tokens else frozenset())) >= vocab_size:
        raise InvalidArgument(
            f"bad_token_ids, with what min_tokens excludes, leave none of {vocab_size} tokens: give fewer",
            reason="BAD_TOKEN_IDS_INVALID",
        )
    deadline = None
    if submit.HasField("timeout"):
        timeout = submit.timeout.seconds + submit.timeout.nanos / 1e9
        now = time.monotonic()
        deadline = (now if arrived is None else arrived) + timeout
        if timeout <= 0 or deadline <= now:
            raise DeadlineExceeded(
                f"the deadline passed before the request was started: give it more time than {timeout:g} s"
            )
    return Sequence(
        client=client,
        handle=submit.handle,
        token_ids=prompt + resumed,
        prompt_len=len(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        stop_ids=stop_ids,
        priority=submit.priority,
        salt=hashlib.blake2b(submit.tenant.encode(), digest_size=16).digest(),
        deadline=deadline,
        min_tokens=submit.stopping.min_tokens,
        logprobs=submit.output.logprobs if submit.output.HasField("logprobs") else None,
        prompt_logprobs=submit.output.prompt_logprobs if submit.output.HasField("prompt_logprobs") else None,
    )


def to_beam_search(submit: Submit) -> BeamSearch | None:
    """What a request searches for, with its defaults; None for one that samples. Raises InvalidArgument."""
    beam = submit.beam_search
    check_beam(beam, submit.output)
    if not beam.width:
        return None
    if submit.resume_token_ids:
        raise InvalidArgument(
            f"{len(submit.resume_token_ids)} resume_token_ids beside beam_search, which cannot be resumed: send it again whole",
            reason="BEAM_SEARCH_RESUME",
        )
    if len(submit.stopping.stop_token_ids) > MAX_BEAM_STOPS:
        raise InvalidArgument(
            f"{len(submit.stopping.stop_token_ids)} stop_token_ids beside beam_search, whose beams look beyond all of them: "
            f"give at most {MAX_BEAM_STOPS}",
            reason="STOP_TOKEN_IDS_INVALID",
        )
    length_penalty = beam.length_penalty if beam.HasField("length_penalty") else 1.0
    return BeamSearch(beam.width, length_penalty, _EARLY_STOPPING[beam.early_stopping], beam.diversity_rate)


def to_sampling(params: common_pb2.SamplingParams) -> Sampling:
    """Sampling settings with their defaults. Raises InvalidArgument."""
    check_sampling(params)
    temperature = params.temperature if params.HasField("temperature") else 1.0
    top_p = params.top_p if params.HasField("top_p") else 1.0
    seed = params.seed if params.HasField("seed") else secrets.randbits(64)
    return Sampling(
        temperature,
        params.top_k,
        top_p,
        seed,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple(sorted(params.logit_bias.items())),
        bad_words=tuple(tuple(word.ids) for word in params.bad_token_ids),
    )
