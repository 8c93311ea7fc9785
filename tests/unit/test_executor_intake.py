"""Every value of a Submit message is checked before anything is queued."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import DeadlineExceeded, InvalidArgument
from engine.fingerprint import Fingerprint
from engine.manifest import Limits, Manifest, ModelFacts, Parallelism
from executor_svc.beams import BeamSearch, EarlyStopping
from executor_svc.core import Sampling
from executor_svc.intake import to_beam_search, to_sequence
from protos.v1 import common_pb2
from protos.v1.common_pb2 import TokenIds
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
    assert sequence.sampling == Sampling(seed=sequence.sampling.seed)
    assert (sequence.min_tokens, sequence.logprobs, sequence.prompt_logprobs) == (0, None, None)
    assert to_beam_search(submit()) is None
    assert to_beam_search(submit(beam_search={"width": 2})) == BeamSearch(2, 1.0, EarlyStopping.HEURISTIC, 0.0)


def test_guides_are_checked_here_too() -> None:
    with pytest.raises(InvalidArgument, match="guided_decoding is empty"):
        to_sequence(7, submit(guided_decoding={}), MANIFEST)
    with pytest.raises(InvalidArgument, match="guided_decoding and beam_search exclude each other"):
        to_sequence(7, submit(guided_decoding={"regex": "a"}, beam_search={"width": 2}), MANIFEST)


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


def test_values_of_sampling_and_output_arrive() -> None:
    given = submit(
        sampling={
            "seed": 1,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "presence_penalty": -2.0,
            "frequency_penalty": 2.0,
            "logit_bias": {7: -100.0, 3: 0.5},
            "bad_token_ids": [{"ids": [4, 5]}, {"ids": [6]}],
        },
        stopping={"min_tokens": 18},
        output={"logprobs": 0, "prompt_logprobs": 20},
    )
    sequence = to_sequence(7, given, MANIFEST)
    assert sequence.sampling == Sampling(
        seed=1,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((3, 0.5), (7, -100.0)),
        bad_words=((4, 5), (6,)),
    )
    assert (sequence.min_tokens, sequence.logprobs, sequence.prompt_logprobs) == (18, 0, 20)
    beam = {
        "width": 16,
        "length_penalty": 0.0,
        "diversity_rate": 0.5,
        "early_stopping": common_pb2.EARLY_STOPPING_NEVER,
    }
    assert to_beam_search(submit(beam_search=beam)) == BeamSearch(16, 0.0, EarlyStopping.NEVER, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling": {"min_p": 1.5}}, "min_p is 1.5: give a number from 0 to 1"),
        ({"sampling": {"min_p": float("nan")}}, "min_p is nan"),
        ({"sampling": {"repetition_penalty": 0.0}}, "repetition_penalty is 0: give a finite number above 0"),
        ({"sampling": {"repetition_penalty": float("inf")}}, "repetition_penalty is inf"),
        ({"sampling": {"presence_penalty": 2.5}}, "presence_penalty is 2.5: give a number from -2 to 2"),
        ({"sampling": {"frequency_penalty": float("nan")}}, "frequency_penalty is nan"),
        ({"sampling": {"logit_bias": {4: 101.0}}}, "logit_bias of token 4 is 101: give a number from -100 to 100"),
        ({"sampling": {"logit_bias": {103: 1.0}}}, "token id 103 is outside the vocabulary"),
        ({"sampling": {"bad_token_ids": [{"ids": [1, 104]}]}}, "token id 104 is outside the vocabulary"),
        ({"sampling": {"bad_token_ids": [{"ids": []}]}}, "bad_token_ids holds an empty sequence"),
        (
            {
                "sampling": {"bad_token_ids": [{"ids": [token]} for token in range(4, 102 - 2)] + [{"ids": [0]}]},
                "stopping": {"min_tokens": 1, "stop_token_ids": [1]},
            },
            "leave none of 100 tokens",
        ),
        ({"stopping": {"max_tokens": 3, "min_tokens": 4}}, "min_tokens is 4, max_tokens 3: lower the one"),
        ({"stopping": {"min_tokens": 19}}, "min_tokens is 19, max_tokens 18"),
        ({"output": {"logprobs": 21}}, "logprobs is 21: ask for at most 20"),
        ({"output": {"prompt_logprobs": 21}}, "prompt_logprobs is 21"),
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_search": {"width": 17}}, "beam_search.width is 17: give 1 to 16"),
        ({"beam_search": {"width": 2, "length_penalty": float("nan")}}, "length_penalty is nan"),
        ({"beam_search": {"width": 2, "length_penalty": 10.5}}, "length_penalty is 10.5: give a number from -10 to 10"),
        (
            {"beam_search": {"width": 2, "early_stopping": 9}},
            "early_stopping is 9: give one of EARLY_STOPPING_ENOUGH, ",
        ),
        ({"beam_search": {"width": 2, "diversity_rate": -1.0}}, "diversity_rate is -1"),
        (
            {"beam_search": {"width": 2}, "output": {"prompt_logprobs": 0}},
            "prompt_logprobs is asked for beside beam_search",
        ),
        ({"beam_search": {"width": 2}, "resume_token_ids": [4]}, "1 resume_token_ids beside beam_search"),
    ],
)
def test_bad_values_of_a_beam_search_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        to_beam_search(submit(**fields))


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


def test_a_beam_search_looks_beyond_a_few_stop_ids_only() -> None:
    few, many = ({"stop_token_ids": list(range(count))} for count in (64, 65))
    assert to_beam_search(submit(beam_search={"width": 2}, stopping=few))
    with pytest.raises(InvalidArgument, match="65 stop_token_ids beside beam_search.*at most 64"):
        to_beam_search(submit(beam_search={"width": 2}, stopping=many))


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("stop_token_ids", lambda submit: submit.stopping.stop_token_ids.extend([1] * 1025)),
        ("logit_bias", lambda submit: submit.sampling.logit_bias.update(dict.fromkeys(range(1025), 1.0))),
        ("bad_token_ids", lambda submit: submit.sampling.bad_token_ids.extend([TokenIds(ids=[1])] * 1025)),
        ("bad_token_ids", lambda submit: submit.sampling.bad_token_ids.add(ids=[1] * 65)),
    ],
)
def test_what_is_work_at_every_step_is_limited(name: str, fill: Callable[[Submit], None]) -> None:
    given = submit()
    fill(given)
    with pytest.raises(InvalidArgument, match=f"{name} h.*at most") as refused:
        to_sequence(1, given, MANIFEST)
    assert refused.value.reason == f"{name.upper()}_INVALID"
