"""A result, fed by hand: what is told when, to threads and to event loops."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable

import pytest

from engine.errors import Unavailable
from enginehouse import CompletionOutput, GenerationResult, RequestOutput
from enginehouse.llm.stream import Stream
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishInfo, Logprobs, Usage
from protos.v1.gateway_pb2 import GenerateResponse

LENGTH = FinishInfo(reason=FINISH_REASON_LENGTH)


def made(
    stream: Stream | None = None,
    *,
    streaming: bool = True,
    completions: int = 1,
    include_stop: bool = False,
    cancel: Callable[[], object] = lambda: None,
) -> tuple[Stream, GenerationResult]:
    stream = stream or Stream()
    output = RequestOutput(1, "in", [7], [CompletionOutput(index) for index in range(completions)])
    keep = object()
    return stream, GenerationResult(
        stream, output, streaming=streaming, include_stop=include_stop, cancel=cancel, keep=keep
    )


def said(text: str = "", *token_ids: int, index: int = 0, finish: FinishInfo | None = None) -> GenerateResponse:
    return GenerateResponse(text=text, token_ids=token_ids, index=index, finish=finish, usage=Usage(cached_tokens=3))


def test_iterating_gives_what_is_new_each_time() -> None:
    stream, result = made()
    stream.push([said("a", 1)])
    first = next(result)
    stream.push([said("b", 2)])
    stream.push([said("c", 3)])  # the reader was too slow: two steps are one output
    second = next(result)
    assert result.outputs[0].text_diff == "bc"  # as scripts read it that look at the result itself
    stream.push([said("d", 4, finish=LENGTH)])
    third = next(result)
    diffs = [(one.outputs[0].text_diff, one.outputs[0].token_ids_diff) for one in (first, second, third)]
    assert diffs == [("a", [1]), ("bc", [2, 3]), ("d", [4])]
    assert [one.outputs[0].text for one in (first, second, third)] == [
        "a",
        "abc",
        "abcd",
    ]  # each output stays as it was
    assert [one.finished for one in (first, second, third)] == [False, False, True]
    with pytest.raises(StopIteration):
        next(result)
    assert result.outputs[0].finish_reason == "length" and third.cached_tokens == 3
    assert (result.request_id, result.prompt, result.prompt_token_ids, result.finished) == (1, "in", [7], True)


def test_without_streaming_there_is_one_output_and_it_is_whole() -> None:
    stream, result = made(streaming=False)
    timer = threading.Timer(0.05, lambda: stream.push([said("b", 2, finish=LENGTH)]))
    stream.push([said("a", 1)])
    timer.start()
    (output,) = result
    assert (output.outputs[0].text, output.outputs[0].token_ids_diff, output.finished) == ("ab", [1, 2], True)


async def test_an_event_loop_goes_on_while_it_waits() -> None:
    stream, result = made()
    other, awaited = made()
    seen: list[str] = []

    async def read() -> None:
        async for output in result:
            seen.append(output.outputs[0].text_diff)  # noqa: PERF401  (one by one)

    task, whole = asyncio.create_task(read()), asyncio.ensure_future(awaited.aresult())
    for number, text in enumerate("xyz"):
        stream.push([said(text, number, finish=LENGTH if text == "z" else None)])
        while len(seen) <= number:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await task
    assert seen == ["x", "y", "z"]
    other.push([said("w", 1, finish=LENGTH)])
    assert (await whole).outputs[0].text == "w"
    assert (await awaited).finished and awaited.done()


def test_several_completions_end_together() -> None:
    stream, result = made(completions=2)
    stream.push([said("b", 2, index=1, finish=LENGTH)])
    assert next(result).finished is False
    stream.push([said("a", 1, index=0, finish=LENGTH)])
    output = next(result)
    assert output.finished and [one.text for one in output.outputs] == ["a", "b"]
    assert [one.text_diff for one in output.outputs] == ["a", ""]


def test_a_result_that_is_late_goes_on() -> None:
    stream, result = made()
    stream.push([said("a", 1)])
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="request 1 has not ended within 0.05 s"):
        result.result(timeout=0.05)
    assert time.monotonic() - began < 30 and not result.done()
    for _ in range(50):
        with pytest.raises(TimeoutError):
            result.result(timeout=0)
    assert len(stream._waiting) <= 1  # who has given up leaves nothing behind
    stream.push([said("b", 2, finish=LENGTH)])
    assert result.result(timeout=0).outputs[0].text == "ab"


@pytest.mark.parametrize("streaming", [True, False])
def test_an_error_comes_behind_the_tokens_before_it(streaming: bool) -> None:
    stream, result = made(streaming=streaming)
    stream.push([said("a", 1)])
    stream.end(Unavailable("gone"))
    if streaming:
        assert next(result).outputs[0].text == "a"
    with pytest.raises(Unavailable, match="gone"):
        next(result)
    with pytest.raises(StopIteration):
        next(result)
    for _ in range(2):
        with pytest.raises(Unavailable, match="gone"):
            result.result()
    assert result.done() and not result.finished


async def test_an_error_wakes_who_awaits() -> None:
    stream, result = made()
    task = asyncio.ensure_future(result.aresult())
    await asyncio.sleep(0.01)
    stream.end(Unavailable("gone"))
    with pytest.raises(Unavailable, match="gone"):
        await task
    with pytest.raises(Unavailable, match="gone"):
        await anext(result)


def test_cancelled_by_hand_it_ends_with_what_there_is() -> None:
    asked: list[str] = []
    stream = Stream()

    def end() -> None:  # as the loop does, when it has put what has come so far into the stream
        asked.append("cancel")
        stream.push([said("!", 9, index=1)])
        stream.end()

    result = made(stream, completions=2, cancel=end)[1]
    stream.push([said("a", 1, finish=LENGTH), said("b", 2, index=1)])
    result.cancel()
    output = result.result(timeout=0)
    assert asked == ["cancel"] and output.finished
    assert [(one.finish_reason, one.text) for one in output.outputs] == [("length", "a"), ("cancelled", "b!")]
    assert [one.finished for one in result] == [True]
    stream.push([said("c", 3, index=1)])  # on its way when it was cancelled
    result.cancel()
    assert asked == ["cancel"]


def test_a_result_that_nobody_holds_is_cancelled() -> None:
    asked: list[str] = []
    stream, result = made(cancel=lambda: asked.append("cancel"))
    stream.push([said("a", 1)])
    iterator = iter(result)
    next(iterator)
    del result
    gc.collect()
    assert asked == []
    del iterator
    gc.collect()
    assert asked == ["cancel"]


async def test_a_task_that_is_cancelled_while_it_waits_leaves_the_result_whole() -> None:
    stream, result = made()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(result.aresult(), 0.01)
    stream.push([said("a", 1, finish=LENGTH)])
    assert (await result).outputs[0].text == "a"


def test_many_threads_wait_for_one_result() -> None:
    stream, result = made()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(result.result(60).outputs[0].text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(100):
        stream.push([said("x", number, finish=LENGTH if number == 99 else None)])
    for thread in threads:
        thread.join()
    assert found == ["x" * 100] * 8


def test_stops_and_log_probabilities() -> None:
    stream, result = made(include_stop=True)
    one = said("a", 1)
    one.logprobs.CopyFrom(Logprobs(logprobs=[-0.5], top=2, top_token_ids=[1, 9], top_logprobs=[-0.5, -2.0]))
    one.prompt_logprobs.CopyFrom(Logprobs(logprobs=[-4.0]))
    two = said("b", 2, finish=FinishInfo(reason=FINISH_REASON_STOP, stop_string="END"))
    two.logprobs.CopyFrom(Logprobs(logprobs=[-1.5], top=2, top_token_ids=[2, 8], top_logprobs=[-1.5, -3.0]))
    stream.push([one])
    first = next(result).outputs[0]
    stream.push([two])
    last = next(result).outputs[0]
    assert [place.top for place in last.logprobs or ()] == [{1: -0.5, 9: -2.0}, {2: -1.5, 8: -3.0}]
    assert [place.logprob for place in last.logprobs_diff or ()] == [-1.5] and len(first.logprobs or ()) == 1
    assert (last.text, last.finish_reason, last.stop_reason, last.cumulative_logprob) == ("abEND", "stop", "END", -2.0)
    assert [place.logprob for place in result.result().prompt_logprobs or ()] == [-4.0]
    token_stop, other = made()
    token_stop.push([said("a", 1, finish=FinishInfo(reason=FINISH_REASON_STOP, stop_token_id=5))])
    assert other.result().outputs[0].stop_reason == 5
    eos, third = made()
    eos.push([said("a", 1, finish=FinishInfo(reason=FINISH_REASON_STOP, eos_token_id=2))])
    assert (third.result().outputs[0].finish_reason, third.result().outputs[0].stop_reason) == ("stop", None)
