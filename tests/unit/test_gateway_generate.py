"""A request through the gateway: text out, cancel, limits, loss of the executor."""

import asyncio
from pathlib import Path

import grpc
import pytest
from gateway_harness import MAX_SEQ_LEN, byte_level, cluster, collect, eventually, failure, publish
from mock_executor import EOS

from engine.errors import FailedPrecondition
from protos.rpc import to_failure
from protos.v1.common_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FinishInfo,
    GuidedDecoding,
    SamplingParams,
    StoppingCriteria,
    TokenIds,
)
from protos.v1.executor_pb2 import EngineLost, Failed, Finished, Started, StepOutput
from protos.v1.gateway_pb2 import Chat, ChatMessage

LENGTH = FinishInfo(reason=FINISH_REASON_LENGTH)


def encode(text: str) -> list[int]:
    ids: list[int] = byte_level().encode(text, add_special_tokens=False).ids
    return ids


WORD = encode(" quick")


async def test_text_streams_in_deltas_with_cumulative_usage(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(text="hello", sampling=SamplingParams(temperature=0), priority=3)
        submit = await c.executor.submitted()
        assert list(submit.token_ids) == [0, *encode("hello")]
        assert (submit.engine_id, submit.priority) == (c.engine_id, 3)
        assert submit.sampling.HasField("temperature") and submit.sampling.temperature == 0
        prompt = len(submit.token_ids)
        c.executor.send(StepOutput(started=[Started(handle=submit.handle, prompt_tokens=prompt, cached_tokens=1)]))
        c.executor.tokens(submit.handle, encode(" world"))
        first = await call.read()
        assert (first.text, list(first.token_ids)) == (" world", encode(" world"))
        assert (first.usage.prompt_tokens, first.usage.cached_tokens) == (prompt, 1)
        assert not first.HasField("finish")
        c.executor.tokens(submit.handle, encode(" fox"))
        second = await call.read()
        assert (second.text, list(second.token_ids)) == (" fox", encode(" fox"))
        c.executor.tokens(submit.handle, [1], EOS)
        last = await call.read()
        assert (last.text, list(last.token_ids), last.finish) == ("", [1], EOS)
        assert last.usage.completion_tokens == len(encode(" world fox")) + 1
        assert await call.read() == grpc.aio.EOF
        assert c.executor.cancels.empty()


async def test_what_is_left_out_is_filled_in(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        first = c.generate(token_ids=TokenIds(ids=[5, 6]), metadata=[("traceparent", "00-1-2-01"), ("other", "x")])
        submit = await c.executor.submitted()
        assert submit.stopping.max_tokens == MAX_SEQ_LEN - 2
        assert submit.sampling.HasField("seed")
        assert not submit.sampling.HasField("temperature") and not submit.sampling.HasField("top_p")
        assert not submit.HasField("timeout")
        assert dict(submit.trace_context) == {"traceparent": "00-1-2-01"}
        second = c.generate(
            token_ids=TokenIds(ids=[5]),
            sampling=SamplingParams(seed=7, top_k=3),
            stopping=StoppingCriteria(max_tokens=9, stop_token_ids=[8], ignore_eos=True),
            timeout=30,
        )
        given = await c.executor.submitted()
        assert given.sampling == SamplingParams(seed=7, top_k=3)
        assert given.stopping == StoppingCriteria(max_tokens=9, stop_token_ids=[8], ignore_eos=True)
        assert 10 < given.timeout.ToTimedelta().total_seconds() < 31
        assert given.handle != submit.handle
        for call in (first, second):
            call.cancel()


async def test_a_guide_reaches_the_executor_in_each_completion(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        engine_id = publish(c.store, "guided", table=b"only its being there counts here")
        c.executor.ready.append(engine_id)
        await eventually(lambda: c.router.ready(engine_id) == 1)
        guide = GuidedDecoding(regex="a+")
        call = c.generate(model="guided", text="hello", guided_decoding=guide, n=2)
        first = await c.executor.submitted()
        c.executor.begin(first.handle)
        second = await c.executor.submitted()
        assert first.guided_decoding == second.guided_decoding == guide
        call.cancel()


async def test_a_character_is_never_split(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate()
        handle = (await c.executor.submitted()).handle
        pieces = []
        for token_id in encode("a😀"):
            c.executor.tokens(handle, [token_id])
            response = await call.read()
            assert list(response.token_ids) == [token_id]
            pieces.append(response.text)
        assert pieces == ["a", "", "", "", "😀"]
        c.executor.tokens(handle, encode("😀")[:2], LENGTH)
        assert (await collect(call))[0] == "\ufffd"


async def test_a_stop_string_over_two_deltas_ends_the_text_before_it(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(stop=["quick", "never"])
        handle = (await c.executor.submitted()).handle
        c.executor.tokens(handle, encode("the qu"))
        first = await call.read()
        assert (first.text, list(first.token_ids)) == ("the ", encode("the qu"))
        tail = [*encode("i"), *encode("c"), *encode("k")]
        c.executor.tokens(handle, [*tail, *encode(" fox")])
        last = await call.read()
        assert (last.text, list(last.token_ids)) == ("", tail)
        assert last.finish == FinishInfo(reason=FINISH_REASON_STOP, stop_string="quick")
        assert last.usage.completion_tokens == len(encode("the qu")) + 3
        assert await call.read() == grpc.aio.EOF
        assert await c.executor.cancelled() == handle


async def test_held_back_text_comes_when_it_is_no_stop_string(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(stop=["quick"])
        handle = (await c.executor.submitted()).handle
        c.executor.tokens(handle, encode("the qui"))
        assert (await call.read()).text == "the "
        c.executor.tokens(handle, encode("et qu"), LENGTH)
        last = await call.read()
        assert (last.text, last.finish) == ("quiet qu", LENGTH)
        assert c.executor.cancels.empty()


async def test_special_tokens_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        for fields, text in (({}, "hello"), ({"skip_special_tokens": False}, "hello</s>")):
            call = c.generate(**fields, add_special_tokens=False)
            submit = await c.executor.submitted()
            assert list(submit.token_ids) == encode("hello")
            c.executor.tokens(submit.handle, [*encode("hello"), 1], EOS)
            assert (await collect(call))[0] == text


async def test_a_chat_is_rendered_by_the_models_template(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        chat = Chat(messages=[ChatMessage(role="user", content="hello")])
        call = c.generate(chat=chat)
        submit = await c.executor.submitted()
        assert byte_level().decode(list(submit.token_ids), skip_special_tokens=False) == "<s><|user|>hello<|assistant|>"
        assert list(submit.token_ids).count(0) == 1
        call.cancel()


async def test_a_clients_cancel_reaches_the_executor(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate()
        handle = (await c.executor.submitted()).handle
        c.executor.tokens(handle, [5])
        await call.read()
        call.cancel()
        assert await c.executor.cancelled() == handle
        c.executor.tokens(handle, [6], LENGTH)  # it had finished meanwhile: nobody minds
        other = c.generate()
        c.executor.tokens((await c.executor.submitted()).handle, [7], LENGTH)
        assert (await collect(other))[1] == [7]


async def test_a_deadline_cancels(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate(timeout=1.0)
        handle = (await c.executor.submitted()).handle
        assert (await failure(call)).code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert await c.executor.cancelled() == handle


async def test_columns_are_taken_apart(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        calls = [c.generate() for _ in range(3)]
        handles = [(await c.executor.submitted()).handle for _ in calls]
        c.executor.send(StepOutput(handles=handles, token_ids=[10, 11, 12]))  # no counts: one token a row
        c.executor.send(
            StepOutput(
                handles=[handles[2], 999, handles[0]],
                counts=[2, 1, 0],
                token_ids=[13, 14, 15],
                finished=[Finished(handle=handle, finish=LENGTH) for handle in handles],
            )
        )
        assert sorted([(await collect(call))[1] for call in calls]) == [[10], [11], [12, 13, 14]]


async def test_one_failed_request_does_not_touch_the_others(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        bad = c.generate(token_ids=TokenIds(ids=[1]))
        bad_handle = (await c.executor.submitted()).handle
        good = c.generate(token_ids=TokenIds(ids=[2]))
        good_handle = (await c.executor.submitted()).handle
        error = FailedPrecondition("the engine is being unloaded", reason="ENGINE_UNLOADING", metadata={"a": "b"})
        c.executor.send(StepOutput(failed=[Failed(handle=bad_handle, failure=to_failure(error))]))
        seen = await failure(bad)
        assert (type(seen), seen.reason, seen.message) == (FailedPrecondition, error.reason, error.message)
        assert seen.metadata["a"] == "b" and seen.metadata.keys() == {"a", "request_id"}
        c.executor.tokens(good_handle, [5], LENGTH)
        assert (await collect(good))[1] == [5]


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_lost_executor_ends_its_requests_and_is_found_again(tmp_path: Path, code: grpc.StatusCode) -> None:
    async with cluster(tmp_path, patience=0) as c:
        calls = [c.generate() for _ in range(2)]
        for _ in calls:
            await c.executor.submitted()
        c.executor.hang_up(code)
        for call in calls:
            error = await failure(call)
            assert (error.code, error.reason) == (14, "EXECUTOR_LOST")
            assert error.metadata["executor"] == c.executor.address
            assert "nobody could go on with it: no executor has engine" in error.message
        await eventually(lambda: c.executor.streams == 2)
        again = c.generate()
        c.executor.tokens((await c.executor.submitted()).handle, [5], LENGTH)
        assert (await collect(again))[1] == [5]


async def test_tokens_that_came_before_the_loss_are_delivered(tmp_path: Path) -> None:
    async with cluster(tmp_path, patience=0) as c:
        call = c.generate()
        c.executor.tokens((await c.executor.submitted()).handle, [5, 6])
        c.executor.hang_up()
        assert list((await call.read()).token_ids) == [5, 6]
        assert (await failure(call)).reason == "EXECUTOR_LOST"


async def test_a_lost_engine_ends_its_requests_only(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate()
        handle = (await c.executor.submitted()).handle
        error = FailedPrecondition("another engine", reason="X")
        c.executor.send(StepOutput(engine_lost=EngineLost(engine_id="f" * 64, failure=to_failure(error))))
        c.executor.tokens(handle, [5])
        assert list((await call.read()).token_ids) == [5]
        c.executor.ready = []
        error = FailedPrecondition("its worker died", reason="WORKER_LOST")
        c.executor.send(StepOutput(engine_lost=EngineLost(engine_id=c.engine_id, failure=to_failure(error))))
        assert (await failure(call)).reason == "WORKER_LOST"
        assert c.executor.streams == 1
        after = await failure(c.generate())
        assert (after.code, after.reason) == (14, "ENGINE_NOT_READY")


async def test_a_slow_client_fails_alone(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        slow, quick = c.generate(), c.generate()
        handles = {(await c.executor.submitted()).handle for _ in range(2)}
        for handle in handles:
            c.executor.tokens(handle, [handle])  # whose is which
        slow_handle = (await slow.read()).token_ids[0]
        (quick_handle,) = handles - {slow_handle}
        await quick.read()
        while c.executor.cancels.empty():  # some megabytes fit on the way
            c.executor.tokens(slow_handle, WORD * 8192)
            c.executor.tokens(quick_handle, [301])
            assert len((await asyncio.wait_for(quick.read(), 60)).token_ids) == 1
        assert await c.executor.cancelled() == slow_handle
        error = await failure(slow)
        assert (error.code, error.reason) == (8, "CLIENT_TOO_SLOW")
        c.executor.tokens(quick_handle, [302], LENGTH)
        assert (await collect(quick))[1] == [302]


async def test_a_slow_client_that_goes_away_is_cancelled(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        call = c.generate()
        handle = (await c.executor.submitted()).handle
        inbox = c.router._links[0]._inboxes._inboxes[handle]
        while not inbox.token_ids:  # until the gateway waits in its write
            c.executor.tokens(handle, WORD * 8192)
            await asyncio.sleep(0.01)
        call.cancel()
        assert await c.executor.cancelled() == handle
        assert not c.router._links[0]._inboxes


@pytest.mark.parametrize("cancel_after", [0, 1])
async def test_many_at_once_with_cancels(tmp_path: Path, cancel_after: int) -> None:
    async with cluster(tmp_path, executors=2) as c:
        calls = [c.generate(token_ids=TokenIds(ids=[n])) for n in range(40)]
        await eventually(lambda: sum(executor.submits.qsize() for executor in c.executors) == 40)
        for executor in c.executors:
            assert executor.submits.qsize() == 20
            submits = [executor.submits.get_nowait() for _ in range(20)]
            for step in range(5):
                executor.send(
                    StepOutput(
                        step=step,
                        handles=[submit.handle for submit in submits],
                        token_ids=[submit.token_ids[0] + step for submit in submits],
                        finished=[Finished(handle=submit.handle, finish=LENGTH) for submit in submits if step == 4],
                    )
                )
        for n, call in enumerate(calls):
            if n % 4 == 0:
                if cancel_after:
                    await call.read()
                call.cancel()
            else:
                assert (await collect(call))[1] == [n, n + 1, n + 2, n + 3, n + 4]
        links = c.router._links
        await eventually(lambda: not any(link._inboxes or +link._inboxes.live for link in links))
