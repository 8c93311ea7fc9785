"""Several completions, the best of them, beam search, echo and log-probabilities through the gateway."""

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_harness import Cluster, byte_level, cluster, eventually, failure
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_executor import EOS

from engine.errors import ResourceExhausted
from gateway.completion import Completion
from gateway.inbox import Inbox
from gateway.tokenizer import Tokenizer, TokenizerConfig
from gateway.transcript import Transcript
from protos.v1.common_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    BeamSearch,
    FinishInfo,
    Hypothesis,
    Logprobs,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    TokenIds,
    Usage,
)
from protos.v1.executor_pb2 import Submit
from protos.v1.gateway_pb2 import Chat, ChatMessage, GenerateResponse

LENGTH = FinishInfo(reason=FINISH_REASON_LENGTH)


def encode(text: str) -> list[int]:
    ids: list[int] = byte_level().encode(text, add_special_tokens=False).ids
    return ids


def told(token_ids: list[int], top: int = 0, base: float = -1.0) -> Logprobs:
    """Log-probabilities from which one can tell whose they are: base for the first token, base - 1 for the second, ..."""
    return Logprobs(
        logprobs=[base - place for place in range(len(token_ids))],
        top=top,
        top_token_ids=[token_id * 10 + k for token_id in token_ids for k in range(top)],
        top_logprobs=[-k for _ in token_ids for k in range(top)],
    )


async def everything(call: Any) -> dict[int, list[GenerateResponse]]:
    """All messages by completion, each of which ends with its one finish."""
    found: dict[int, list[GenerateResponse]] = {}
    while (response := await asyncio.wait_for(call.read(), 60)) is not grpc.aio.EOF:
        found.setdefault(response.index, []).append(response)
    for responses in found.values():
        assert [response.HasField("finish") for response in responses] == [False] * (len(responses) - 1) + [True]
    return found


def text(responses: list[GenerateResponse]) -> str:
    return "".join(response.text for response in responses)


def ids(responses: list[GenerateResponse]) -> list[int]:
    return [token_id for response in responses for token_id in response.token_ids]


async def submits(c: Cluster, count: int) -> list[Submit]:
    """All of a request with so many completions."""
    first = await c.executor.submitted()
    c.executor.begin(first.handle)
    return [first, *[await c.executor.submitted() for _ in range(count - 1)]]


async def test_the_others_are_sent_when_the_first_has_begun(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        seed = 2**64 - 2
        call = c.generate(
            n=4,
            sampling=SamplingParams(seed=seed),
            output=OutputOptions(logprobs=2, prompt_logprobs=1),
            priority=-3,
            timeout=60,
        )
        first = await c.executor.submitted()
        await asyncio.sleep(0.1)
        assert c.executor.submits.empty()
        c.executor.begin(first.handle, cached_tokens=0)
        rest = [await c.executor.submitted() for _ in range(3)]
        assert [submit.sampling.seed for submit in (first, *rest)] == [seed, seed + 1, 0, 1]
        assert first.output == OutputOptions(logprobs=2, prompt_logprobs=1)
        for submit in rest:
            assert submit.output == OutputOptions(logprobs=2)
            assert (submit.token_ids, submit.priority) == (first.token_ids, -3)
            assert submit.stopping == first.stopping
            assert submit.timeout.ToTimedelta() < first.timeout.ToTimedelta()
        assert len({submit.handle for submit in (first, *rest)}) == 4
        call.cancel()
        assert {await c.executor.cancelled() for _ in range(4)} == {submit.handle for submit in (first, *rest)}


async def test_completions_stream_side_by_side(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(n=3, stop=["quick"])
        first, second, third = await submits(c, 3)
        c.executor.tokens(second.handle, encode("hello"))
        response = await call.read()
        assert (response.index, response.text, response.usage.completion_tokens) == (1, "hello", len(encode("hello")))
        c.executor.tokens(first.handle, encode("the quick fox"))
        response = await call.read()
        assert (response.index, response.text, response.finish.stop_string) == (0, "the ", "quick")
        assert await c.executor.cancelled() == first.handle  # and no other one
        c.executor.tokens(first.handle, encode("late"), LENGTH)
        c.executor.tokens(third.handle, encode("fox"), LENGTH)
        c.executor.tokens(second.handle, [1], EOS)
        rest = await everything(call)
        assert {index: (text(news), news[-1].finish) for index, news in rest.items()} == {
            1: ("", EOS),
            2: ("fox", LENGTH),
        }
        kept = byte_level().encode("the quick", add_special_tokens=False).ids
        usage = [news[-1].usage for news in rest.values()]
        assert max(u.completion_tokens for u in usage) == len(encode("hello")) + len(kept) + 1 + len(encode("fox"))
        assert {u.prompt_tokens for u in usage} == {len(first.token_ids)}
        assert c.executor.cancels.empty()


async def test_a_first_that_ends_at_once_is_followed_by_the_others(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(n=2)
        c.executor.tokens((await c.executor.submitted()).handle, encode("a"), LENGTH)
        c.executor.tokens((await c.executor.submitted()).handle, encode("b"), LENGTH)
        assert {index: text(news) for index, news in (await everything(call)).items()} == {0: "a", 1: "b"}


async def test_one_that_fails_ends_the_call_and_the_rest(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(n=3)
        first, second, third = await submits(c, 3)
        c.executor.fail(second.handle, ResourceExhausted("9 requests are waiting", reason="QUEUE_FULL", retry_after=2))
        error = await failure(call)
        assert (error.reason, error.retry_after) == ("QUEUE_FULL", 2)
        assert {await c.executor.cancelled() for _ in range(2)} == {first.handle, third.handle}
        await eventually(lambda: not c.router._links[0]._inboxes)


async def test_where_the_first_is_refused_the_others_are_not_sent(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(n=16)
        refused = await c.executor.submitted()
        c.executor.fail(refused.handle, ResourceExhausted("9 requests are waiting", reason="QUEUE_FULL", retry_after=2))
        assert (await failure(call)).reason == "QUEUE_FULL"
        c.generate()
        assert (await c.executor.submitted()).handle == refused.handle + 1  # no other one was sent in between


async def test_an_executor_lost_before_the_others_were_sent(tmp_path: Path) -> None:
    async with cluster(tmp_path, patience=0) as c:
        call = c.generate(n=2)
        handle = (await c.executor.submitted()).handle
        link = c.router._links[0]
        link._connected = False  # as between the loss of the stream and the first request's news of it
        c.executor.begin(handle)
        error = await failure(call)
        assert error.reason == "ENGINE_NOT_READY" and "nobody could go on with it" in error.message
        link._connected = True
        assert not link._inboxes


async def test_the_best_are_those_with_the_highest_mean(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(n=2, best_of=3)
        given = await submits(c, 3)
        assert [submit.output for submit in given] == [OutputOptions(logprobs=0)] * 3
        long, short, bad = [submit.handle for submit in given]
        c.executor.tokens(short, encode("!"), LENGTH, Logprobs(logprobs=[-1.0]))
        c.executor.tokens(bad, encode("?"), LENGTH, Logprobs(logprobs=[-9.0]))
        for _ in range(3):  # a sum of -1.5, the lowest but one, and the best mean
            c.executor.tokens(long, encode("a"), None, Logprobs(logprobs=[-0.5]))
        await asyncio.sleep(0.05)
        c.executor.tokens(long, [1], EOS, Logprobs(logprobs=[-0.5]))
        found = await everything(call)
        assert {index: text(news) for index, news in found.items()} == {0: "aaa", 1: "!"}
        assert [len(news) for news in found.values()] == [1, 1]
        assert [found[i][0].cumulative_logprob for i in (0, 1)] == [-2.0, -1.0]
        assert [found[i][0].finish for i in (0, 1)] == [EOS, LENGTH]
        assert ids(found[0]) == [*encode("a") * 3, 1]
        for news in found.values():
            assert not news[0].HasField("logprobs")
            assert news[0].usage.completion_tokens == 6  # of all that were made


async def test_the_best_with_their_logprobs_and_the_prompts(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(
            n=1,
            best_of=2,
            output=OutputOptions(logprobs=1, prompt_logprobs=0),
            echo=True,
            token_ids=TokenIds(ids=[5, 6]),
        )
        first, second = await submits(c, 2)
        c.executor.prompt_logprobs(first.handle, Logprobs(logprobs=[-7.0]))
        c.executor.tokens(first.handle, [10], LENGTH, told([10], 1, base=-3))
        c.executor.tokens(second.handle, [11], None, told([11], 1))
        c.executor.tokens(second.handle, [12], LENGTH, told([12], 1))
        (prompt, best) = (await everything(call))[0]
        assert (list(prompt.token_ids), list(best.token_ids)) == ([5, 6], [11, 12])
        assert list(best.prompt_logprobs.logprobs) == [-7.0]
        assert list(best.logprobs.logprobs) == [-1, -1] and list(best.logprobs.top_token_ids) == [110, 120]


async def test_as_many_as_are_made_stream_in_their_order(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(n=2, best_of=2)
        first, second = await submits(c, 2)
        c.executor.tokens(first.handle, [10], None, told([10]))
        response = await call.read()
        assert (response.index, list(response.token_ids)) == (0, [10]) and not response.HasField("logprobs")
        c.executor.tokens(first.handle, [11], LENGTH, told([11], base=-5))
        c.executor.tokens(second.handle, [12], LENGTH, told([12]))
        found = await everything(call)
        assert [found[i][-1].cumulative_logprob for i in (0, 1)] == [-6, -1]


async def test_hypotheses_come_in_their_order(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        beam = BeamSearch(width=3, length_penalty=0.5)
        call = c.generate(n=2, beam_search=beam, stop=["qu"])
        submit = await c.executor.submitted()
        assert submit.beam_search == beam
        c.executor.begin(submit.handle, 1)
        c.executor.beams(
            submit.handle,
            [
                Hypothesis(token_ids=[*encode("fox"), 1], cumulative_logprob=-2.5, score=-1, finish=EOS),
                Hypothesis(token_ids=encode("the quick fox"), cumulative_logprob=-9, score=-2, finish=LENGTH),
                Hypothesis(token_ids=encode("says"), cumulative_logprob=-1, score=-3, finish=LENGTH),
            ],
            EOS,
        )
        found = await everything(call)
        assert {index: text(news) for index, news in found.items()} == {0: "fox", 1: "the "}
        (best,), (cut,) = found[0], found[1]
        assert (best.finish, best.cumulative_logprob, list(best.token_ids)) == (EOS, -2.5, [*encode("fox"), 1])
        assert cut.finish == FinishInfo(reason=FINISH_REASON_STOP, stop_string="qu")
        assert cut.usage.completion_tokens == best.usage.completion_tokens == len(best.token_ids) + len(cut.token_ids)
        assert c.executor.submits.empty() and c.executor.cancels.empty()


async def test_one_hypothesis_unless_more_are_wanted(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(beam_search=BeamSearch(width=2), echo=True, text="hello")
        submit = await c.executor.submitted()
        hypotheses = [Hypothesis(token_ids=encode(word), finish=LENGTH) for word in ("fox", "brown")]
        c.executor.beams(submit.handle, hypotheses, LENGTH)
        found = await everything(call)
        assert {index: text(news) for index, news in found.items()} == {0: "hellofox"}
        call = c.generate(beam_search=BeamSearch(width=2), n=2)
        c.executor.tokens((await c.executor.submitted()).handle, [], EOS)  # without any
        assert [(ids(news), news[-1].finish) for news in (await everything(call)).values()] == [([], EOS)] * 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "hello the"}, "hello the"),
        ({"token_ids": TokenIds(ids=[0, *encode("hello the")])}, "hello the"),
        ({"token_ids": TokenIds(ids=[0, *encode("hello the")]), "skip_special_tokens": False}, "<s>hello the"),
        ({"chat": Chat(messages=[ChatMessage(role="user", content="hello")])}, "<|user|>hello<|assistant|>"),
    ],
)
async def test_the_prompt_comes_first_in_each_completion(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(echo=True, n=2, stop=["the"], output=OutputOptions(logprobs=0), **fields)
        prompt = list((first := await c.executor.submitted()).token_ids)
        c.executor.tokens(first.handle, encode(" fox"), LENGTH, told(encode(" fox")))
        c.executor.tokens((await c.executor.submitted()).handle, encode(" a"), LENGTH, told(encode(" a")))
        found = await everything(call)
        assert {index: text(news) for index, news in found.items()} == {0: said + " fox", 1: said + " a"}
        for index, word in ((0, " fox"), (1, " a")):
            before, behind = found[index]
            assert (list(before.token_ids), list(behind.token_ids)) == (prompt, encode(word))
            assert not before.HasField("logprobs") and len(behind.logprobs.logprobs) == len(behind.token_ids)
            assert before.usage.prompt_tokens == len(prompt)
        assert sum(len(news[1].token_ids) for news in found.values()) == found[1][-1].usage.completion_tokens


async def test_logprobs_of_the_prompt_come_before_the_first_token(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(output=OutputOptions(prompt_logprobs=2))
        handle = (await c.executor.submitted()).handle
        c.executor.prompt_logprobs(handle, told([1, 2], 2))
        assert (await call.read()).prompt_logprobs == told([1, 2], 2)
        c.executor.prompt_logprobs(handle, told([3], 2))
        c.executor.prompt_logprobs(handle, told([4], 2))
        c.executor.tokens(handle, [9], LENGTH)
        (news,) = (await everything(call)).values()
        got = [row for response in news for row in response.prompt_logprobs.top_token_ids]
        assert got == [30, 31, 40, 41]
        assert ids(news) == [9] and not news[-1].HasField("cumulative_logprob")


WORDS = encode("the quick brown fox says naïve café 😀 hello world")
TOKENIZER = Tokenizer(byte_level().to_str().encode(), TokenizerConfig())


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40), st.integers(0, 3), st.data())
def test_however_tokens_are_bundled_text_and_columns_are_the_same(token_ids: list[int], top: int, data: Any) -> None:
    """Steps of any size, and deltas of any number of steps: one token at a time is the measure."""

    def run(sizes: list[int], taken_after: list[bool]) -> tuple[str, list[int], Logprobs, FinishInfo, float]:
        inbox, usage = Inbox("e", asyncio.Event()), Usage()
        completion = Completion(0, Transcript(TOKENIZER.detokenizer([], True), ["fox", "ick b"]))
        whole, said, at = GenerateResponse(), "", 0
        for size, take in zip(sizes, taken_after, strict=True):
            row = slice(at, at + size)
            full = told(token_ids, top)
            inbox.push_logprobs(
                Logprobs(
                    logprobs=full.logprobs[row],
                    top=top,
                    top_token_ids=full.top_token_ids[at * top : (at + size) * top],
                    top_logprobs=full.top_logprobs[at * top : (at + size) * top],
                )
            )
            inbox.push(token_ids[row])
            at += size
            if at == len(token_ids):
                inbox.finish(LENGTH)
            if (take or at == len(token_ids)) and not completion.finish:
                response = completion.respond(inbox.take(), usage)
                said += response.text
                whole.MergeFrom(response)
        assert usage.completion_tokens == completion.num_tokens == len(whole.token_ids) == len(whole.logprobs.logprobs)
        return said, list(whole.token_ids), whole.logprobs, whole.finish, whole.cumulative_logprob

    sizes, rest = [], len(token_ids)
    while rest:
        sizes.append(data.draw(st.integers(1, rest)))
        rest -= sizes[-1]
    bundled = run(sizes, data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))))
    measure = run([1] * len(token_ids), [True] * len(token_ids))
    assert bundled[:4] == measure[:4]
    assert math.isclose(bundled[4], measure[4], rel_tol=1e-6)
    assert sum(measure[2].logprobs) == pytest.approx(measure[4])


async def test_what_the_executor_decides_is_passed_on(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        sampling = SamplingParams(
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=0.5,
            logit_bias={5: -100, 6: 2.5},
            bad_token_ids=[TokenIds(ids=[7, 8])],
            seed=1,
        )
        stopping = StoppingCriteria(max_tokens=9, min_tokens=3, ignore_eos=True)
        call = c.generate(sampling=sampling, stopping=stopping, bad_words=["fox"])
        submit = await c.executor.submitted()
        bad = [list(sequence.ids) for sequence in submit.sampling.bad_token_ids]
        assert bad == [[7, 8], encode("fox"), encode(" fox")]
        del submit.sampling.bad_token_ids[1:]
        assert (submit.sampling, submit.stopping) == (sampling, stopping)
        assert not submit.HasField("output") and not submit.HasField("beam_search")
        call.cancel()
