"""Every value of a Submit message is checked before anything is queued."""

import time
from typing import Any

import pytest

from engine.errors import DeadlineExceeded, InvalidArgument
from engine.fingerprint import Fingerprint
from engine.manifest import Limits, Manifest, ModelFacts, Parallelism
from executor_svc.core import Sampling
from executor_svc.intake import to_sequence
from protos.v1.executor_pb2 import Submit

MANIFEST = Manifest(
    "0" * 64, {}, "", "", ModelFacts("X", 100, 1, 8, 1, 1, "float32", 8, (2, 3), 1), Limits(4, 20, 8), Parallelism(),
    Fingerprint("torch", "cpu"), (), (),
)  # fmt: skip


def submit(**fields: Any) -> Submit:
    return Submit(**{"handle": 1, "token_ids": [5, 6], **fields})


def test_defaults() -> None:
    sequence = to_sequence(7, submit(), MANIFEST)
    assert (sequence.client, sequence.handle, sequence.token_ids) == (7, 1, [5, 6])
    assert sequence.max_tokens == 18 and sequence.eos_ids == {2, 3} and sequence.deadline is None
    assert (sequence.sampling.temperature, sequence.sampling.top_k, sequence.sampling.top_p) == (1.0, 0, 1.0)
    assert to_sequence(7, submit(), MANIFEST).sampling.seed != sequence.sampling.seed


def test_values_arrive() -> None:
    given = submit(
        sampling={"temperature": 0.0, "top_k": 3, "top_p": 0.5, "seed": 9},
        stopping={"max_tokens": 4, "stop_token_ids": [8], "ignore_eos": True},
        resume_token_ids=[10, 11],
        priority=-2,
        tenant="a",
    )
    sequence = to_sequence(7, given, MANIFEST)
    assert sequence.sampling == Sampling(0.0, 3, 0.5, 9)
    assert (sequence.token_ids, sequence.prompt_len, sequence.num_completion, sequence.max_tokens) == (
        [5, 6, 10, 11],
        2,
        2,
        4,
    )
    assert sequence.eos_ids == frozenset() and sequence.stop_ids == {8} and sequence.priority == -2
    assert sequence.salt != to_sequence(7, submit(tenant="b"), MANIFEST).salt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": []}, "the prompt is empty"),
        ({"token_ids": [5, 100]}, "token id 100 is outside the vocabulary of 100: use ids from 0 to 99"),
        ({"resume_token_ids": [101]}, "token id 101"),
        ({"stopping": {"stop_token_ids": [102]}}, "token id 102"),
        ({"stopping": {"max_tokens": 0}}, "max_tokens is 0"),
        (
            {"stopping": {"max_tokens": 19}},
            "2 prompt tokens and max_tokens 19 exceed the engine's max_seq_len of 20: lower max_tokens to at most 18",
        ),
        ({"token_ids": [1] * 20}, "20 prompt tokens and max_tokens 1 exceed .* shorten it to at most 19"),
        (
            {"resume_token_ids": [1, 1], "stopping": {"max_tokens": 2}},
            "2 resume_token_ids leave nothing of max_tokens 2",
        ),
        ({"sampling": {"temperature": -0.1}}, "temperature is -0.1"),
        ({"sampling": {"temperature": float("nan")}}, "temperature is nan"),
        ({"sampling": {"temperature": float("inf")}}, "temperature is inf"),
        ({"sampling": {"top_p": 0.0}}, "top_p is 0:"),
        ({"sampling": {"top_p": 1.5}}, "top_p is 1.5"),
        ({"sampling": {"top_p": float("nan")}}, "top_p is nan"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        to_sequence(7, submit(**fields), MANIFEST)


def test_the_longest_deadline_there_is() -> None:
    given = submit()
    given.timeout.seconds, given.timeout.nanos = 2**63 - 1, 2**31 - 1
    assert to_sequence(7, given, MANIFEST).deadline == pytest.approx(2**63, rel=1e-6)


def test_a_deadline_that_has_passed_is_never_started() -> None:
    given = submit()
    given.timeout.FromMilliseconds(0)
    with pytest.raises(DeadlineExceeded, match="give it more time than 0 s"):
        to_sequence(7, given, MANIFEST)


def test_a_timeout_begins_when_the_request_arrived_not_when_the_worker_looks() -> None:
    given = submit()
    given.timeout.FromMilliseconds(500)
    now = time.monotonic()
    assert to_sequence(7, given, MANIFEST, now - 0.2).deadline == pytest.approx(now + 0.3)
    with pytest.raises(DeadlineExceeded, match="before the request was started: give it more time than 0.5 s"):
        to_sequence(7, given, MANIFEST, now - 0.5)
