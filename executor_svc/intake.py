"""From a Submit message to a Sequence: every value of a caller is checked here, before anything is queued."""

import hashlib
import secrets
import time

from engine.errors import DeadlineExceeded, InvalidArgument
from engine.manifest import Manifest
from executor_svc.core import Sampling, Sequence
from protos.checks import check_sampling, check_stopping
from protos.v1.common_pb2 import SamplingParams
from protos.v1.executor_pb2 import Submit


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
    for token in (*prompt, *resumed, *submit.stopping.stop_token_ids):
        if token >= vocab_size:
            raise InvalidArgument(
                f"token id {token} is outside the vocabulary of {vocab_size}: use ids from 0 to {vocab_size - 1}",
                reason="TOKEN_ID_INVALID",
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
        sampling=to_sampling(submit.sampling),
        eos_ids=frozenset() if submit.stopping.ignore_eos else frozenset(manifest.model.eos_token_ids),
        stop_ids=frozenset(submit.stopping.stop_token_ids),
        priority=submit.priority,
        salt=hashlib.blake2b(submit.tenant.encode(), digest_size=16).digest(),
        deadline=deadline,
    )


def to_sampling(params: SamplingParams) -> Sampling:
    """Sampling settings with their defaults. Raises InvalidArgument."""
    check_sampling(params)
    temperature = params.temperature if params.HasField("temperature") else 1.0
    top_p = params.top_p if params.HasField("top_p") else 1.0
    seed = params.seed if params.HasField("seed") else secrets.randbits(64)
    return Sampling(temperature, params.top_k, top_p, seed)
