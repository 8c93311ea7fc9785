"""Every refusal: its status, its reason, and that no executor hears of the request."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from gateway_harness import MAX_SEQ_LEN, VOCAB_SIZE, Cluster, byte_level, cluster, failure, publish

from engine.errors import DeadlineExceeded, ResourceExhausted
from gateway.server import Gateway
from protos.rpc import to_failure
from protos.v1 import gateway_pb2 as wire
from protos.v1.common_pb2 import (
    BeamSearch,
    GuidedChoices,
    GuidedDecoding,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    TokenIds,
)
from protos.v1.executor_pb2 import Failed, StepOutput

INVALID, NOT_FOUND, FAILED_PRECONDITION, UNAVAILABLE = 3, 5, 9, 14
nan, inf = float("nan"), float("inf")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    path = tmp_path_factory.mktemp("store")
    async with cluster(path) as made:
        publish(made.store, "plain", template=None)
        yield made


pytestmark = pytest.mark.asyncio(loop_scope="module")


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": SamplingParams(**fields)}


def stopping(**fields: Any) -> dict[str, Any]:
    return {"stopping": StoppingCriteria(**fields)}


def output(**fields: Any) -> dict[str, Any]:
    return {"output": OutputOptions(**fields)}


def beam(**fields: Any) -> dict[str, Any]:
    return {"beam_search": BeamSearch(**fields)}


def guided(**fields: Any) -> dict[str, Any]:
    return {"guided_decoding": GuidedDecoding(**fields)}


def ids(count: int, value: int = 5) -> dict[str, Any]:
    return {"token_ids": TokenIds(ids=[value] * count)}


def chat(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"chat": wire.Chat(messages=[wire.ChatMessage(role=role, content=text) for role, text in messages])}


@pytest.mark.parametrize(
    ("fields", "reason", "says"),
    [
        ({"text": ""}, "PROMPT_EMPTY", "text"),
        (ids(0), "PROMPT_EMPTY", "token_ids"),
        (chat(), "PROMPT_EMPTY", "chat"),
        (chat(("", "hello")), "CHAT_INVALID", "role"),
        (ids(1, VOCAB_SIZE), "TOKEN_ID_INVALID", f"holds {VOCAB_SIZE}"),
        (stopping(stop_token_ids=[4_000_000_000]), "TOKEN_ID_INVALID", "stop_token_ids holds 4000000000"),
        (sampling(temperature=-0.5), "TEMPERATURE_INVALID", "-0.5"),
        (sampling(temperature=nan), "TEMPERATURE_INVALID", "nan"),
        (sampling(temperature=inf), "TEMPERATURE_INVALID", "inf"),
        (sampling(top_p=0), "TOP_P_INVALID", "top_p is 0"),
        (sampling(top_p=1.5), "TOP_P_INVALID", "1.5"),
        (sampling(top_p=nan), "TOP_P_INVALID", "nan"),
        (ids(10) | stopping(max_tokens=2**32 - 1), "CONTEXT_TOO_LONG", "max_tokens (4294967295)"),
        (ids(MAX_SEQ_LEN + 1, VOCAB_SIZE), "CONTEXT_TOO_LONG", f"has {MAX_SEQ_LEN + 1} tokens"),
        (sampling(top_p=-inf), "TOP_P_INVALID", "top_p is -inf"),
        (stopping(max_tokens=0), "MAX_TOKENS_INVALID", "max_tokens is 0"),
        (ids(10) | stopping(max_tokens=MAX_SEQ_LEN - 9), "CONTEXT_TOO_LONG", f"at most {MAX_SEQ_LEN - 10}"),
        (ids(MAX_SEQ_LEN), "CONTEXT_TOO_LONG", f"at most {MAX_SEQ_LEN - 1}"),
        ({"stop": [""]}, "STOP_INVALID", "0 characters"),
        ({"stop": ["x" * 1001]}, "STOP_INVALID", "1001 characters"),
        ({"stop": [str(n) for n in range(17)]}, "STOP_INVALID", "at most 16"),
        ({"n": 0}, "N_INVALID", "n is 0: give 1 to 16"),
        ({"n": 17}, "N_INVALID", "n is 17"),
        ({"n": 3, "best_of": 2}, "BEST_OF_INVALID", "best_of is 2: give at least n, which is 3"),
        ({"best_of": 0}, "BEST_OF_INVALID", "best_of is 0"),
        ({"best_of": 17}, "BEST_OF_INVALID", "at most 16"),
        (beam(width=17), "BEAM_WIDTH_INVALID", "17"),
        (beam(width=2, length_penalty=inf), "LENGTH_PENALTY_INVALID", "inf"),
        (beam(width=2, diversity_rate=-1), "DIVERSITY_RATE_INVALID", "-1"),
        (beam(width=2) | {"n": 3}, "N_INVALID", "n is 3, but a beam search of width 2"),
        (beam(width=2) | {"best_of": 2}, "BEST_OF_INVALID", "exclude each other"),
        (beam(width=2) | output(logprobs=0), "BEAM_SEARCH_LOGPROBS", "logprobs is asked for"),
        (output(logprobs=21), "LOGPROBS_INVALID", "21"),
        (output(prompt_logprobs=21), "PROMPT_LOGPROBS_INVALID", "prompt_logprobs is 21"),
        ({"bad_words": [""]}, "BAD_WORD_INVALID", "0 characters"),
        ({"bad_words": ["x" * 101]}, "BAD_WORD_INVALID", "101 characters"),
        ({"bad_words": ["x"] * 129}, "BAD_WORD_INVALID", "129 bad words: give at most 128"),
        (sampling(logit_bias={VOCAB_SIZE: 1}), "TOKEN_ID_INVALID", f"logit_bias holds {VOCAB_SIZE}"),
        (sampling(bad_token_ids=[TokenIds(ids=[1, VOCAB_SIZE])]), "TOKEN_ID_INVALID", "bad_token_ids holds"),
        (stopping(max_tokens=3, min_tokens=4), "MIN_TOKENS_INVALID", "4"),
        (ids(MAX_SEQ_LEN - 2) | stopping(min_tokens=3), "MIN_TOKENS_INVALID", "min_tokens is 3"),
        (guided(), "GUIDED_DECODING_INVALID", "guided_decoding is empty: set json_schema, regex"),
        (guided(json_object=False), "GUIDED_DECODING_INVALID", "json_object is false"),
        (guided(regex=""), "GUIDED_DECODING_INVALID", "regex holds an empty text"),
        (guided(regex="x" * 65_537), "GUIDED_DECODING_INVALID", "regex has 65537 bytes: give at most 65536"),
        (guided(grammar="é" * 40_000), "GUIDED_DECODING_INVALID", "grammar has 80000 bytes"),
        (guided(choices=GuidedChoices()), "GUIDED_DECODING_INVALID", "choices has 0 choices: give 1 to 1024"),
        (guided(choices=GuidedChoices(choices=["x"] * 1025)), "GUIDED_DECODING_INVALID", "1025 choices"),
        (guided(choices=GuidedChoices(choices=["x", ""])), "GUIDED_DECODING_INVALID", "an empty text"),
        (guided(json_schema="{"), "GUIDED_DECODING_INVALID", "json_schema is no JSON"),
        (
            guided(json_schema="[1]"),
            "GUIDED_DECODING_INVALID",
            'json_schema is [1]: give an object, such as {"type": "object"}',
        ),
        (guided(json_schema="false"), "GUIDED_DECODING_INVALID", "json_schema is false"),
        (guided(json_schema='{"const": NaN}'), "GUIDED_DECODING_INVALID", "NaN is no JSON value"),
        (guided(json_schema='{"items":' * 65 + "{}" + "}" * 65), "GUIDED_DECODING_INVALID", "more than 64 deep"),
        (guided(json_schema="[" * 60_000), "GUIDED_DECODING_INVALID", "more than 64 deep"),
        (guided(regex="a") | beam(width=2), "BEAM_SEARCH_GUIDED", "guided_decoding and beam_search exclude each other"),
        ({"model": ""}, "MODEL_MISSING", "demo"),
        ({"model": "../x"}, "MODEL_NAME_INVALID", "../x"),
    ],
)
async def test_what_cannot_be_right(shared: Cluster, fields: dict[str, Any], reason: str, says: str) -> None:
    error = await failure(shared.generate(**fields))
    assert (error.code, error.reason) == (INVALID, reason)
    assert says in error.message
    assert shared.executor.submits.empty()


async def test_an_engine_that_does_not_tell_the_bytes_of_its_tokens_is_not_guided(shared: Cluster) -> None:
    error = await failure(shared.generate(**guided(json_object=True)))
    assert (error.code, error.reason) == (FAILED_PRECONDITION, "TOKEN_TABLE_MISSING")
    assert "build it again with this release" in error.message
    assert shared.executor.submits.empty()


async def test_no_prompt(shared: Cluster) -> None:
    error = await failure(shared.stub.Generate(wire.GenerateRequest(model="demo")))
    assert (error.code, error.reason) == (INVALID, "PROMPT_MISSING")
    assert "set one of text, token_ids and chat" in error.message
    error = await failure(shared.stub.Tokenize(wire.TokenizeRequest(model="demo")))
    assert (error.code, error.reason) == (INVALID, "PROMPT_MISSING")
    assert "set one of text and chat" in error.message


PROMPTS: dict[str, dict[str, Any]] = {"text": {"text": "hello"}, "token_ids": ids(1), "chat": chat(("user", "hello"))}
EMPTY: dict[str, dict[str, Any]] = {"text": {"text": ""}, "token_ids": ids(0), "chat": chat()}


@pytest.mark.parametrize("first", PROMPTS)
@pytest.mark.parametrize("second", PROMPTS)
@pytest.mark.parametrize("other", [PROMPTS, EMPTY], ids=["given", "empty"])
async def test_only_one_prompt(shared: Cluster, first: str, second: str, other: dict[str, dict[str, Any]]) -> None:
    """However they stand on the wire, and an empty one counts: it was given."""
    if first == second:
        return
    parts = [wire.GenerateRequest(**fields) for fields in (PROMPTS[first], other[second], {"model": "demo"})]
    request = wire.GenerateRequest.FromString(b"".join(part.SerializeToString() for part in parts))
    error = await failure(shared.stub.Generate(request))
    assert (error.code, error.reason) == (INVALID, "PROMPT_AMBIGUOUS")
    assert all(kind in error.message.partition(":")[0] for kind in (first, second))
    assert "set only one of text, token_ids and chat" in error.message
    assert shared.executor.submits.empty()


async def test_only_one_text_to_tokenize(shared: Cluster) -> None:
    request = wire.TokenizeRequest(model="demo", text="hello", **chat(("user", "hello")))
    error = await failure(shared.stub.Tokenize(request))
    assert (error.code, error.reason) == (INVALID, "PROMPT_AMBIGUOUS")
    assert "as text and chat: set only one of text and chat" in error.message
    assert list((await shared.stub.Tokenize(wire.TokenizeRequest(model="demo", text=""))).token_ids) == [0]


async def test_a_text_without_tokens(shared: Cluster) -> None:
    """This tokenizer has no token for such a text; only its beginning is said."""
    file = json.loads(byte_level().to_str())
    file["normalizer"] = {"type": "Replace", "pattern": {"String": "-"}, "content": ""}
    publish(shared.store, "dashes", tokenizer=json.dumps(file))
    error = await failure(shared.generate(model="dashes", text="-" * 1000, add_special_tokens=False))
    assert (error.code, error.reason) == (INVALID, "PROMPT_EMPTY")
    assert "model 'dashes': '" + "-" * 40 + "...'. Give other text" in error.message


async def test_a_deadline_that_has_passed_is_never_sent(shared: Cluster) -> None:
    """gRPC ends such a call itself, but perhaps not before the handler goes on."""

    class Late:
        def time_remaining(self) -> float:
            return 0.0

        def invocation_metadata(self) -> tuple[()]:
            return ()

        def add_done_callback(self, callback: object) -> None:
            pass

    gateway = Gateway(shared.store, shared.router)
    with pytest.raises(DeadlineExceeded, match="before the request was sent to an executor: give it more time"):
        await anext(gateway.Generate(wire.GenerateRequest(model="demo", text="hello"), Late()))  # type: ignore[arg-type]
    assert shared.executor.submits.empty()


async def test_a_refusal_of_the_executor_says_when_to_retry(shared: Cluster) -> None:
    call = shared.generate()
    handle = (await shared.executor.submitted()).handle
    refusal = ResourceExhausted("9 requests are waiting", reason="QUEUE_FULL", retry_after=2.5)
    shared.executor.send(StepOutput(failed=[Failed(handle=handle, failure=to_failure(refusal))]))
    error = await failure(call)
    assert (error.code, error.reason, error.retry_after) == (8, "QUEUE_FULL", 2.5)


async def test_the_longest_that_fits(shared: Cluster) -> None:
    call = shared.generate(**ids(MAX_SEQ_LEN - 1), **stopping(max_tokens=1))
    assert len((await shared.executor.submitted()).token_ids) == MAX_SEQ_LEN - 1
    call.cancel()


async def test_an_unknown_model_names_those_there_are(shared: Cluster) -> None:
    for call in (
        shared.generate(model="demoo"),
        shared.stub.Tokenize(wire.TokenizeRequest(model="demoo", text="x")),
        shared.stub.Detokenize(wire.DetokenizeRequest(model="demoo")),
    ):
        error = await failure(call)
        assert (error.code, error.reason) == (NOT_FOUND, "MODEL_NOT_FOUND")
        assert "demo, plain" in error.message


async def test_an_engine_that_no_executor_has(shared: Cluster) -> None:
    error = await failure(shared.generate(model="plain"))
    assert (error.code, error.reason) == (UNAVAILABLE, "ENGINE_NOT_READY")
    assert error.metadata["engine_id"][:12] in error.message
    assert "1 of 1 executors" in error.message


async def test_a_chat_without_a_template(shared: Cluster) -> None:
    error = await failure(shared.generate(model="plain", **chat(("user", "hello"))))
    assert (error.code, error.reason) == (FAILED_PRECONDITION, "CHAT_TEMPLATE_MISSING")
    assert "send text" in error.message


async def test_detokenize_checks_its_ids(shared: Cluster) -> None:
    error = await failure(shared.stub.Detokenize(wire.DetokenizeRequest(model="demo", token_ids=[VOCAB_SIZE])))
    assert (error.code, error.reason) == (INVALID, "TOKEN_ID_INVALID")
