"""Limits of tenants through the gateway: what waits, what is refused, and that a call gives back its place however it ends."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_harness import Cluster, cluster, collect, eventually, failure
from mock_executor import EOS

from engine.errors import EnginehouseError
from enginehouse import key_file
from gateway.admission import Limits
from protos.access import Access, bearer
from protos.keys import Keyring
from protos.rpc import from_rpc_error
from protos.v1 import gateway_pb2 as wire
from protos.v1.common_pb2 import TokenIds

EXHAUSTED, DENIED, UNKNOWN, INVALID = 8, 7, 16, 3


class Tenants:
    """A gateway with three tenants: wide may do all, narrow one stream of demo alone, barred nothing that is there."""

    def __init__(self, cluster: Cluster, keys: dict[str, str]) -> None:
        self.cluster, self.keys = cluster, keys

    def metadata(self, tenant: str) -> Any:
        return (bearer(self.keys[tenant]),)

    def generate(self, tenant: str, **fields: Any) -> Any:
        return self.cluster.generate(metadata=self.metadata(tenant), **fields)

    @property
    def running(self) -> int:
        return self.cluster.gateway._admission._running

    async def finish(self) -> None:
        """The next request that reaches the executor has a token."""
        submit = await self.cluster.executor.submitted()
        self.cluster.executor.tokens(submit.handle, [5], EOS)


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[Tenants]:
    path = tmp_path / "keys.json"
    keys = {
        "wide": key_file.add(path, "wide", max_priority=5).secret,
        "narrow": key_file.add(path, "narrow", max_streams=1, models=("demo",), max_prompt_tokens=50).secret,
        "barred": key_file.add(path, "barred", models=("other",)).secret,
    }
    limits = Limits(max_streams=3, max_waiting=1, max_prompt_bytes=1000)
    async with cluster(tmp_path / "store", limits=limits, access=Access(keyring=Keyring(path))) as made:
        yield Tenants(made, keys)


async def test_a_tenants_second_stream_waits_for_its_first(tenants: Tenants) -> None:
    both = asyncio.gather(*(collect(tenants.generate("narrow")) for _ in range(2)))
    submit = await tenants.cluster.executor.submitted()
    assert submit.tenant == "narrow"  # by which its prefix cache is its own
    await eventually(lambda: tenants.cluster.gateway._admission._num_waiting == 1)
    other = tenants.generate("wide")
    await tenants.finish()  # another tenant's passes it
    await collect(other)
    error = await failure(tenants.generate("narrow"))
    assert (error.code, error.reason) == (EXHAUSTED, "QUEUE_FULL") and error.retry_after
    tenants.cluster.executor.tokens(submit.handle, [5], EOS)
    await tenants.finish()
    await both
    await eventually(lambda: tenants.running == 0)


async def test_a_place_comes_back_however_a_call_ends(tenants: Tenants) -> None:
    for _ in range(3):
        cancelled = tenants.generate("narrow")
        await tenants.cluster.executor.submitted()
        cancelled.cancel()
        await eventually(lambda: tenants.running == 0)
    error = await failure(tenants.generate("narrow", timeout=1.0))
    assert error.code == 4
    await tenants.cluster.executor.submitted()
    await eventually(lambda: tenants.running == 0)
    assert (await failure(tenants.generate("narrow", token_ids=TokenIds(ids=[10**9])))).code == INVALID
    assert (await failure(tenants.generate("narrow", text="a" * 900))).reason == "PROMPT_TOO_LONG"
    first = tenants.generate("narrow")
    await tenants.cluster.executor.submitted()
    waiting = tenants.generate("narrow", timeout=0.2)
    assert (await failure(waiting)).code in (4, EXHAUSTED)
    first.cancel()
    await eventually(lambda: tenants.running == 0 and tenants.cluster.gateway._admission._num_waiting == 0)


async def test_what_a_tenant_may_not_do_is_said(tenants: Tenants) -> None:
    stub = tenants.cluster.stub
    barred = tenants.metadata("barred")
    for call in (
        tenants.generate("barred"),
        stub.Tokenize(wire.TokenizeRequest(model="demo", text="a"), metadata=barred),
        stub.Detokenize(wire.DetokenizeRequest(model="demo", token_ids=[1]), metadata=barred),
    ):
        error = await failure(call)
        assert (error.code, error.reason) == (DENIED, "MODEL_DENIED")
        assert "tenant 'barred' may not use model 'demo'" in error.message
    assert (await stub.ListModels(wire.ListModelsRequest(), metadata=barred)).models == []
    shown = await stub.ListModels(wire.ListModelsRequest(), metadata=tenants.metadata("narrow"))
    assert [model.name for model in shown.models] == ["demo"]
    error = await failure(tenants.generate("wide", priority=6))
    assert (error.code, error.reason) == (DENIED, "PRIORITY_DENIED")
    for metadata in ((), (bearer("eh_x"),)):
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await stub.ListModels(wire.ListModelsRequest(), metadata=metadata)
        known: EnginehouseError = from_rpc_error(told.value)
        assert known.code == UNKNOWN
    for call in (
        tenants.generate("barred", model="other"),
        stub.Tokenize(wire.TokenizeRequest(model="other", text="a"), metadata=barred),
        stub.Detokenize(wire.DetokenizeRequest(model="other"), metadata=barred),
    ):
        error = await failure(call)
        assert (
            error.message == "no model 'other'; there are: none yet"
        )  # for this tenant: others' names are not its business


async def test_a_text_of_too_many_bytes_is_not_tokenized(tenants: Tenants) -> None:
    for fields in (
        {"text": "é" * 501},
        {"chat": wire.Chat(messages=[wire.ChatMessage(role="user", content="a" * 600)] * 2)},
    ):
        error = await failure(tenants.generate("wide", **fields))
        assert (error.code, error.reason) == (INVALID, "PROMPT_TOO_LONG")
        assert "and this gateway takes 1000" in error.message
        request = wire.TokenizeRequest(model="demo", **fields)
        assert (
            await failure(tenants.cluster.stub.Tokenize(request, metadata=tenants.metadata("wide")))
        ).code == INVALID
    assert tenants.running == 0


async def test_the_last_of_many_begins_too(tenants: Tenants) -> None:
    """Nothing is forgotten between a hundred calls that come, go and are refused."""
    calls = [asyncio.create_task(_end(tenants.generate("wide", timeout=60))) for _ in range(30)]
    done = 0
    while not all(call.done() for call in calls):
        try:
            submit = tenants.cluster.executor.submits.get_nowait()
        except asyncio.QueueEmpty:
            await asyncio.sleep(0.005)
            continue
        tenants.cluster.executor.tokens(submit.handle, [5], EOS)
        done += 1
    ends = [call.result() for call in calls]
    assert ends.count("") == done >= 3 and set(ends) <= {"", "QUEUE_FULL"}
    await eventually(lambda: tenants.running == 0)


async def _end(call: Any) -> str:
    try:
        await collect(call)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return ""
