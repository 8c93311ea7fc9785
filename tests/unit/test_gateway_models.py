"""Names, tokenizers and what the store holds; the calls that need no executor."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import MAX_SEQ_LEN, VOCAB_SIZE, byte_level, cluster, publish

from engine import names, registry
from engine.blobs import blob_key
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition, NotFound, Unavailable
from gateway.cache import Cache
from gateway.models import Models
from protos.v1 import gateway_pb2 as wire


async def test_tokenize_and_detokenize(tmp_path: Path) -> None:
    async with cluster(tmp_path) as c:
        long = "the quick brown fox 😀 " * 2000  # leaves the event loop
        for text in ("hello world", "", long):
            plain = (
                await c.stub.Tokenize(wire.TokenizeRequest(model="demo", text=text, add_special_tokens=False))
            ).token_ids
            assert list(plain) == byte_level().encode(text, add_special_tokens=False).ids
            special = (await c.stub.Tokenize(wire.TokenizeRequest(model="demo", text=text))).token_ids
            assert list(special) == [0, *plain]
            assert (await c.stub.Detokenize(wire.DetokenizeRequest(model="demo", token_ids=special))).text == text
            request = wire.DetokenizeRequest(model="demo", token_ids=special, skip_special_tokens=False)
            assert (await c.stub.Detokenize(request)).text == "<s>" + text
        chat = wire.Chat(messages=[wire.ChatMessage(role="user", content="hello")])
        rendered = (await c.stub.Tokenize(wire.TokenizeRequest(model="demo", chat=chat))).token_ids
        request = wire.DetokenizeRequest(model="demo", token_ids=rendered, skip_special_tokens=False)
        assert (await c.stub.Detokenize(request)).text == "<s><|user|>hello<|assistant|>"


async def test_list_models(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        plain = publish(c.store, "plain", template=None)
        broken = publish(c.store, "broken", template="broken")
        config = registry.manifest(c.store, broken).tokenizer[1]
        c.store.delete(blob_key(config.digest))
        listed = (await c.stub.ListModels(wire.ListModelsRequest())).models
        facts: dict[str, Any] = {"max_seq_len": MAX_SEQ_LEN, "has_tokenizer": True, "vocab_size": VOCAB_SIZE}
        assert list(listed) == [
            wire.Model(name="demo", engine_id=c.engine_id, ready_executors=2, has_chat_template=True, **facts),
            wire.Model(name="plain", engine_id=plain, **facts),
        ]


async def test_a_name_stays_with_its_engine_until_an_executor_has_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.models._NAME_TTL", 0.0)
    store, loaded = DirectoryStore(tmp_path), set()
    models = Models(store, lambda engine_id: int(engine_id in loaded))
    first = publish(store, "demo")
    assert (await models.get("demo")).engine_id == first
    loaded.add(first)
    second = publish(store, "other", template=None)
    registry.set_name(store, "demo", second)
    assert (await models.get("demo")).engine_id == first
    loaded.add(second)
    assert (await models.get("demo")).engine_id == second
    loaded.clear()
    assert (await models.get("demo")).engine_id == second


async def test_a_removed_name_is_not_found_and_given_again_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.models._NAME_TTL", 0.0)
    store, loaded = DirectoryStore(tmp_path), set()
    models = Models(store, lambda engine_id: int(engine_id in loaded))
    first, second = publish(store, "demo"), publish(store, "other", template=None)
    loaded.add(first)
    names.remove_name(store, "demo")
    with pytest.raises(NotFound, match="there are: other"):
        await models.get("demo")
    assert [model.name for model in await models.list()] == ["other"]
    registry.set_name(store, "demo", second)
    assert (await models.get("demo")).engine_id == first  # what stood between is skipped
    loaded.add(second)
    assert (await models.get("demo")).engine_id == second


async def test_a_name_that_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.models._NAME_TTL", 600.0)
    store = DirectoryStore(tmp_path)
    models = Models(store, lambda _: 1)
    first = publish(store, "demo")
    assert (await models.get("demo")).engine_id == first
    second = publish(store, "other", template=None)
    registry.set_name(store, "demo", second)
    assert (await models.get("demo")).engine_id == first
    now = time.monotonic()
    monkeypatch.setattr("gateway.cache.time.monotonic", lambda: now + 601)
    renewed = await models.get("demo")
    assert (renewed.engine_id, renewed.has_chat_template) == (second, False)


async def test_an_engine_with_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    engine_id = publish(store, "demo", tokenizer='{"model": 3}')
    models = Models(store, lambda _: 1)
    assert (await models.get("demo")).engine_id == engine_id
    with pytest.raises(FailedPrecondition) as error:
        await models.tokenizer(engine_id)
    assert error.value.reason == "TOKENIZER_INVALID"


async def test_cache_loads_once_for_all_that_ask() -> None:
    loads, gate = [], threading.Event()

    def load(key: str) -> str:
        loads.append(key)
        gate.wait(60)
        return key.upper()

    cache = Cache(load, size=2)
    asking = [asyncio.create_task(cache.get("a")) for _ in range(5)]
    await asyncio.sleep(0.01)
    asking[0].cancel()  # the first to ask leaves
    await asyncio.sleep(0.01)
    gate.set()
    assert await asyncio.gather(*asking[1:]) == ["A"] * 4
    for key in ("a", "b", "a", "c", "a", "b"):  # c pushes b out, which was used before a
        await cache.get(key)
    assert loads == ["a", "b", "c", "b"]


async def test_cache_keeps_no_failures_and_outlives_a_store_that_is_away() -> None:
    answers: list[str | Exception] = [NotFound("no"), "one", Unavailable("away"), "two", NotFound("gone")]

    def load(_key: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cache = Cache(load, size=2, ttl=0)
    with pytest.raises(NotFound):
        await cache.get("a")
    assert [await cache.get("a") for _ in range(3)] == ["one", "one", "two"]
    with pytest.raises(NotFound):
        await cache.get("a")
