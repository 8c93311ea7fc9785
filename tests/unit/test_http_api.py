"""OpenAI's HTTP API over mock executors: what the official client sends and reads."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_harness import VOCAB_SIZE, byte_level, publish
from http_harness import MAX_BYTES, HttpCluster, http_cluster
from mock_executor import EOS, MockExecutor

from engine.errors import ResourceExhausted, Unavailable
from enginehouse import key_file
from protos.access import Access
from protos.keys import Keyring
from protos.v1.common_pb2 import FINISH_REASON_LENGTH, FinishInfo, Logprobs
from protos.v1.executor_pb2 import Submit

LENGTH = FinishInfo(reason=FINISH_REASON_LENGTH)
ASK: dict[str, Any] = {"model": "demo", "prompt": "hello"}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


def ids(text: str) -> list[int]:
    return byte_level().encode(text, add_special_tokens=False).ids


async def say(executor: MockExecutor, *texts: str, finish: FinishInfo = EOS) -> Submit:
    """Answers the next request in pieces."""
    submit = await executor.submitted()
    executor.begin(submit.handle, 3)
    for number, text in enumerate(texts, 1):
        executor.tokens(submit.handle, ids(text), finish if number == len(texts) else None)
    return submit


async def test_completion(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        call = asyncio.create_task(
            http.openai.completions.create(
                **ASK,
                max_tokens=7,
                temperature=0.5,
                top_p=0.9,
                seed=-1,
                stop=["zzz"],
                presence_penalty=0.25,
                frequency_penalty=-0.5,
                logit_bias={"5": -100},
                user="somebody",
                extra_body={"top_k": 3, "priority": 2, "ignore_eos": True},
            )
        )
        submit = await say(http.executor, "wor", "ld", finish=LENGTH)
        found = await call
    assert (found.object, found.model, found.choices[0].text, found.choices[0].finish_reason) == (
        "text_completion",
        "demo",
        "world",
        "length",
    )
    assert found.id.startswith("cmpl-") and found.id == f"cmpl-{found._request_id}"
    assert found.usage is not None and found.usage.prompt_tokens == len(submit.token_ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details is not None and found.usage.prompt_tokens_details.cached_tokens == 3
    sampling = submit.sampling
    assert (sampling.seed, sampling.top_k, dict(sampling.logit_bias)) == (2**64 - 1, 3, {5: -100.0})
    assert (sampling.temperature, sampling.presence_penalty, sampling.frequency_penalty) == (0.5, 0.25, -0.5)
    assert (submit.stopping.max_tokens, submit.stopping.ignore_eos, submit.priority) == (7, True, 2)
    assert submit.token_ids == byte_level().encode("hello").ids


async def test_streamed_completion_with_usage(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        call = asyncio.create_task(
            http.openai.completions.create(**ASK, stream=True, stream_options={"include_usage": True}, stop="lish")
        )
        await say(http.executor, "hel", "lo pub", "lisher")
        chunks = [chunk async for chunk in await call]
    *some, last = chunks
    assert "".join(chunk.choices[0].text for chunk in some) == "hello pub"
    assert [chunk.choices[0].finish_reason for chunk in some][-1] == "stop"
    assert all(chunk.usage is None for chunk in some)
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


async def test_several_prompts_and_completions(tmp_path: Path) -> None:
    prompts = [ids("a"), ids("fox")]
    async with http_cluster(tmp_path) as http:
        for stream in (False, True):
            call: Any = asyncio.create_task(
                http.openai.completions.create(model="demo", prompt=prompts, n=2, stream=stream)
            )
            for _ in range(4):
                submit = await http.executor.submitted()
                http.executor.begin(submit.handle)
                http.executor.tokens(submit.handle, submit.token_ids, EOS)  # says its own prompt
            found = await call
            if stream:
                texts = {}
                async for chunk in found:
                    for choice in chunk.choices:
                        texts[choice.index] = texts.get(choice.index, "") + choice.text
            else:
                texts = {choice.index: choice.text for choice in found.choices}
                assert found.usage.prompt_tokens == sum(map(len, prompts))
                assert found.usage.completion_tokens == 2 * sum(map(len, prompts))
            assert texts == {0: "a", 1: "a", 2: "fox", 3: "fox"}


async def test_chat(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        call = asyncio.create_task(http.openai.chat.completions.create(**CHAT, max_completion_tokens=9, max_tokens=3))
        submit = await say(http.executor, "hello", " world")
        found = await call
        assert byte_level().decode(submit.token_ids) == "<|user|>hi<|assistant|>"
        assert submit.stopping.max_tokens == 9
        assert found.choices[0].message.content == "hello world"
        assert found.choices[0].finish_reason == "stop"

        parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]
        messages: Any = [{"role": "system", "content": "says"}, {"role": "user", "content": parts}]
        streaming = asyncio.create_task(
            http.openai.chat.completions.create(model="demo", messages=messages, stream=True)
        )
        submit = await say(http.executor, "na", "ïve")
        chunks = [chunk async for chunk in await streaming]
        assert byte_level().decode(submit.token_ids) == "<|system|>says<|user|>the fox<|assistant|>"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "naïve"
    assert chunks[-1].choices[0].finish_reason == "stop"


def logprobs_of(token_ids: list[int]) -> Logprobs:
    """-0.5 for each, which is the best; token 7 comes second."""
    return Logprobs(
        logprobs=[-0.5] * len(token_ids),
        top=2,
        top_token_ids=[i for token in token_ids for i in (token, 7)],
        top_logprobs=[-0.5, -float("inf")] * len(token_ids),
    )


async def test_logprobs_of_both_dialects(tmp_path: Path) -> None:
    tokens = ids("é fox")
    async with http_cluster(tmp_path) as http:

        async def answer() -> Submit:
            submit = await http.executor.submitted()
            http.executor.begin(submit.handle)
            for token in tokens[:-1]:
                http.executor.tokens(submit.handle, [token], None, logprobs_of([token]))
            http.executor.tokens(submit.handle, tokens[-1:], EOS, logprobs_of(tokens[-1:]))
            return submit

        for stream in (False, True):
            call: Any = asyncio.create_task(
                http.openai.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=stream)
            )
            submit = await answer()
            assert submit.output.logprobs == 2
            found = await call
            chunks = [chunk async for chunk in found] if stream else [found]
            content = [
                row for chunk in chunks if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content
            ]
            assert b"".join(bytes(row.bytes) for row in content) == "é fox".encode()
            assert [(row.logprob, len(row.top_logprobs)) for row in content] == [(-0.5, 2)] * len(tokens)
            assert content[0].top_logprobs[1].logprob == -9999

            call = asyncio.create_task(http.openai.completions.create(**ASK, logprobs=2, stream=stream))
            await answer()
            found = await call
            chunks = [chunk async for chunk in found] if stream else [found]
            shown = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
            offsets = [offset for each in shown for offset in each.text_offset]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            assert text == "é fox" and len(offsets) == len(tokens)
            assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] < len(text)
            assert all(-0.5 in row.values() for each in shown for row in each.top_logprobs)


async def test_echo_with_the_prompts_logprobs(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        call = asyncio.create_task(http.openai.completions.create(**ASK, echo=True, logprobs=1, max_tokens=1))
        submit = await http.executor.submitted()
        prompt = list(submit.token_ids)
        assert submit.output.prompt_logprobs == 1
        http.executor.begin(submit.handle)
        for token in prompt[1:]:
            http.executor.prompt_logprobs(
                submit.handle, Logprobs(logprobs=[-1.5], top=1, top_token_ids=[token], top_logprobs=[-1.5])
            )
        made = ids("!")
        http.executor.tokens(submit.handle, made, LENGTH, logprobs_of(made))
        choice = (await call).choices[0]
    assert choice.text == "hello!"
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs == [None, *[-1.5] * (len(prompt) - 1), -0.5]  # type: ignore[comparison-overlap]
    assert choice.logprobs.tokens is not None and "".join(choice.logprobs.tokens) == "<s>hello!"


TOOLS: Any = [
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} use <tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments.zone }}){% endfor %}{{ m.tool_call_id or '' }}{% endfor %}"
)


async def test_tools_go_through_the_template_and_calls_come_back(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        http.executor.ready.append(publish(http.grpc.store, "tools", TOOL_TEMPLATE))
        pieces = ("well <tool", '_call>\n{"name": "get_time", "argum', 'ents": {"zone": "é"}}\n</tool_call>', "\n")
        conversation: Any = [
            {"role": "user", "content": "when?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "CET"}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        ]  # fmt: skip
        call = asyncio.create_task(
            http.openai.chat.completions.create(model="tools", messages=conversation, tools=TOOLS)
        )
        submit = await say(http.executor, *pieces)
        prompt = byte_level().decode(submit.token_ids)
        assert '"name": "get_time"' in prompt and "get_time(CET)" in prompt and "<|tool|>noonc1" in prompt
        choice = (await call).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "well "
        assert choice.message.tool_calls is not None
        (made,) = choice.message.tool_calls
        assert made.type == "function" and made.function.name == "get_time"
        assert json.loads(made.function.arguments) == {"zone": "é"}

        streaming = asyncio.create_task(
            http.openai.chat.completions.create(model="tools", messages=conversation, tools=TOOLS, stream=True)
        )
        await say(http.executor, *pieces)
        chunks = [chunk async for chunk in await streaming]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "well "
        calls = [each for delta in deltas for each in delta.tool_calls or ()]
        assert [(each.index, each.function and each.function.name) for each in calls] == [(0, "get_time")]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

        for tools in ({}, {"tools": TOOLS, "tool_choice": "none"}):  # the same text is text where no tools are offered
            call = asyncio.create_task(
                http.openai.chat.completions.create(model="tools", messages=conversation, **tools)
            )
            await say(http.executor, *pieces)
            choice = (await call).choices[0]
            assert choice.message.content == "".join(pieces) and choice.message.tool_calls is None


async def test_response_formats_guide_the_output(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    async with http_cluster(tmp_path) as http:
        http.executor.ready.append(publish(http.grpc.store, "guided", table=b"not read here"))
        for given, wanted in (
            ({"response_format": form}, ("json_schema", json.dumps(schema))),
            ({"response_format": {"type": "json_object"}}, ("json_object", True)),
            ({"extra_body": {"guided_regex": "[0-9]+"}}, ("regex", "[0-9]+")),
            ({"extra_body": {"guided_grammar": 'start: "a"'}}, ("grammar", 'start: "a"')),
        ):
            call: Any = asyncio.create_task(http.openai.chat.completions.create(**{**CHAT, "model": "guided"}, **given))
            submit = await say(http.executor, "{}")
            await call
            kind = submit.guided_decoding.WhichOneof("guide")
            assert (kind, getattr(submit.guided_decoding, kind)) == wanted


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "said"),
    [
        ("completions", b"{", 400, None, "truncated"),
        ("completions", b'"\xff"', 400, None, "cannot be read"),
        ("completions", {**ASK, "n": 0}, 400, None, "n is 0"),
        ("completions", {**ASK, "model": "nobody"}, 404, None, "nobody"),
        ("completions", {**ASK, "max_tokens": -1}, 400, "max_tokens", ">= 0"),
        ("completions", {**ASK, "max_token": 1}, 400, None, "max_token"),
        ("completions", {**ASK, "temperature": -1}, 400, None, "temperature is -1"),
        ("completions", {**ASK, "prompt": []}, 400, "prompt", "empty list"),
        ("completions", {**ASK, "prompt": ["a", 1]}, 400, "prompt", "mixes"),
        ("completions", {**ASK, "prompt": [VOCAB_SIZE]}, 400, None, f"{VOCAB_SIZE} tokens"),
        ("completions", {**ASK, "stream": True, "best_of": 2}, 400, "best_of", "cannot be streamed"),
        ("completions", {**ASK, "stream_options": {}}, 400, "stream_options", "stream is not true"),
        ("completions", {**ASK, "prompt": "a" * MAX_BYTES}, 413, None, "more than"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages", "empty"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs", "logprobs is not true"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice", "Invalid enum"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, 400, "response_format", "no schema"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "cannot be read"),
        ("chat/completions", {"model": "demo", "messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[]"}}]}]}, 400, None, "no JSON object"),
    ],
)  # fmt: skip
async def test_errors_are_openais(
    tmp_path: Path, path: str, body: Any, status: int, param: str | None, said: str
) -> None:
    async with http_cluster(tmp_path) as http:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.raw("POST", f"/v1/{path}", content=data, headers={"content-type": "application/json"})
        error = answer.json()["error"]
    assert answer.status_code == status and said in error["message"], error
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"].isupper()


async def test_a_request_that_executors_refuse(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:

        async def refuse(*texts: str) -> None:
            submit = await http.executor.submitted()
            http.executor.begin(submit.handle)
            for text in texts:
                http.executor.tokens(submit.handle, ids(text))
            http.executor.fail(submit.handle, ResourceExhausted("too much", reason="NO_ROOM", retry_after=2.2))

        call: Any = asyncio.create_task(http.openai.completions.create(**ASK, stream=True))
        await refuse()
        with pytest.raises(openai.RateLimitError) as caught:
            await call
        assert caught.value.code == "NO_ROOM" and caught.value.response.headers["retry-after"] == "2"

        call = asyncio.create_task(http.openai.completions.create(**ASK, stream=True))
        refusing = asyncio.create_task(refuse("hel", "lo"))
        text = ""
        with pytest.raises(openai.APIError, match="too much"):  # within the stream, its status has been sent
            async for chunk in await call:
                text += chunk.choices[0].text
        await refusing
        assert text == "hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels(tmp_path: Path, stream: bool) -> None:
    async with http_cluster(tmp_path) as http:
        call: Any = asyncio.create_task(http.openai.completions.create(**ASK, stream=stream))
        submit = await http.executor.submitted()
        http.executor.begin(submit.handle)
        http.executor.tokens(submit.handle, ids("hel"))
        if stream:
            await (await call).close()
        else:
            call.cancel()
        assert await http.executor.cancelled() == submit.handle
        await until_idle(http)


async def until_idle(http: HttpCluster) -> None:
    async with asyncio.timeout(60):
        while http.grpc.gateway.telemetry.open:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_models_health_and_what_is_not_there(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        (model,) = [model async for model in http.openai.models.list()]
        assert model.id == "demo" and model.model_extra is not None and model.model_extra["ready_executors"] == 1
        assert (await http.openai.models.retrieve("demo")).id == "demo"
        with pytest.raises(openai.NotFoundError, match="no-such"):
            await http.openai.models.retrieve("no-such")
        assert (await http.raw("GET", "/health")).json() == {"status": "ok"}
        assert (await http.raw("GET", "/v1/nothing")).status_code == 404
        refused = await http.raw("GET", "/v1/completions")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        document = (await http.raw("GET", "/openapi.json")).json()
        assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/status"} < document["paths"].keys()
        plain = await http.raw("POST", "/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 415 and "application/json" in plain.json()["error"]["message"]
        named = await http.raw("GET", "/health", headers={"x-request-id": "mine-1"})
        assert named.headers["x-request-id"] == "mine-1"
        bad = await http.raw("GET", "/health", headers={"x-request-id": "x" * 200})
        assert bad.status_code == 400 and bad.json()["error"]["code"] == "REQUEST_ID_INVALID"


async def test_the_page_is_one_file_that_asks_its_own_origin_alone(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        answer = await http.raw("GET", "/")
        policy, page = answer.headers["content-security-policy"], answer.text
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
        assert re.findall(r"\b(?:src|href)=\"([^\"]*)", page) == ["data:,"]
        asked = set(re.findall(r"\"(status|v1/[a-z/]+)\"", page))
        document = (await http.raw("GET", "/openapi.json")).json()
        assert {f"/{path}" for path in asked} == {"/status", "/v1/models", "/v1/completions", "/v1/chat/completions"}
        assert {f"/{path}" for path in asked} <= document["paths"].keys()
        assert (await http.raw("HEAD", "/")).status_code == 200


async def test_status(tmp_path: Path) -> None:
    async with http_cluster(tmp_path, builder="127.0.0.1:1") as http:
        call = asyncio.create_task(http.openai.completions.create(**ASK))
        submit = await http.executor.submitted()
        http.executor.begin(submit.handle)
        http.executor.tokens(submit.handle, ids("hel"))
        async with asyncio.timeout(60):
            while not (status := (await http.raw("GET", "/status")).json())["completion_tokens"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert status["streams"] == 1 and status["first_token_seconds"]["count"] == 1
        assert [executor["connected"] for executor in status["executors"]] == [True]
        assert [executor["engines"][0]["models"] for executor in status["executors"]] == [["demo"]]
        assert status["builds"] == "UNAVAILABLE"  # said in words; the rest is there
        http.executor.tokens(submit.handle, ids("lo"), EOS)
        await call


async def test_requests_that_run_have_time_to_end_and_then_are_cut(tmp_path: Path) -> None:
    async with http_cluster(tmp_path) as http:
        call = await started(http)
        stopping = asyncio.create_task(http.listener.stop())
        with pytest.raises(openai.APIConnectionError):  # nobody new gets in
            async with asyncio.timeout(60):
                while True:
                    await http.openai.with_options(default_headers={"connection": "close"}).models.list()
        assert not stopping.done()
        http.listener.cut(Unavailable("the gateway was stopped", reason="SERVICE_STOPPED"))
        with pytest.raises(openai.APIError, match="the gateway was stopped"):
            async for _chunk in call:
                pass
        await asyncio.wait_for(stopping, 60)
        await until_idle(http)


async def started(http: HttpCluster) -> Any:
    """A stream that has had its first token."""
    call: Any = asyncio.create_task(http.openai.completions.create(**ASK, stream=True))
    submit = await http.executor.submitted()
    http.executor.begin(submit.handle)
    http.executor.tokens(submit.handle, ids("hel"))
    return await call


async def test_tenants_have_their_keys_models_and_limits(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    narrow = key_file.add(keys, "narrow", max_streams=1, models=("demo",), max_prompt_tokens=50).secret
    barred = key_file.add(keys, "barred", models=("other",)).secret
    async with http_cluster(tmp_path / "store", access=Access(keyring=Keyring(keys)), key=narrow) as http:
        other = http.openai.with_options(api_key=barred)
        assert (await other.models.list()).data == []
        for refused in (other.models.retrieve("demo"), other.completions.create(**ASK)):
            with pytest.raises(openai.PermissionDeniedError, match="may not use model 'demo'"):
                await refused
        with pytest.raises(openai.AuthenticationError):
            await http.openai.with_options(api_key="eh_nobody").models.list()
        for path, status in (
            ("/v1/models", 401),
            ("/status", 401),
            ("/", 200),
            ("/health", 200),
            ("/openapi.json", 200),
        ):
            assert (await http.raw("GET", path)).status_code == status
        seen = await http.raw("GET", "/status", headers={"authorization": f"Bearer {barred}"})
        assert [executor["engines"] for executor in seen.json()["executors"]] == [[]] and seen.json()["builds"] is None

        with pytest.raises(openai.BadRequestError, match="may give 50"):
            await http.openai.completions.create(model="demo", prompt=[5] * 51)
        # one stream at a time: several prompts of one request wait for each other, and all end
        call = asyncio.create_task(http.openai.completions.create(model="demo", prompt=["a", "b", "c"]))
        for _ in range(3):
            submit = await say(http.executor, "x")
            assert submit.tenant == "narrow"
            assert http.executor.submits.empty()
        assert len((await call).choices) == 3
