"""The builder's methods about engines and names, over a real server."""

import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import pytest
from builder_harness import publish

from builder_svc.registry_rpcs import RegistryServicer
from engine import registry, signing
from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound
from engine.store import Store
from protos import rpc
from protos.v1.builder_pb2 import (
    DEVICE_KIND_CPU,
    DeleteEngineRequest,
    DeleteModelNameRequest,
    GetEngineRequest,
    GetModelHistoryRequest,
    ListEnginesRequest,
    ListModelNamesRequest,
    RenameModelRequest,
    SetModelNameRequest,
)
from protos.v1.builder_pb2_grpc import BuilderStub, add_BuilderServicer_to_server


@pytest.fixture
async def stub(store: Store) -> AsyncIterator[BuilderStub]:
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor()])
    add_BuilderServicer_to_server(RegistryServicer(store), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield BuilderStub(channel)
    await server.stop(0)


async def failure(call: Awaitable[object]) -> EnginehouseError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return rpc.from_rpc_error(caught.value)


async def names(stub: BuilderStub) -> list[tuple[str, str]]:
    listed = await stub.ListModelNames(ListModelNamesRequest())
    return [(model.name, model.engine_id) for model in listed.models]


async def test_engines(stub: BuilderStub, store: Store, tmp_path: Path) -> None:
    assert len((await stub.ListEngines(ListEnginesRequest())).engines) == 0
    engine, other = publish(store), publish(store, 1)
    registry.set_name(store, "demo", engine)
    private = signing.generate(tmp_path / "key")
    signing.sign(store, engine, private)
    store.create(f"engines/{'0' * 64}.json", b"{")
    listed = {found.engine_id: found for found in (await stub.ListEngines(ListEnginesRequest())).engines}
    assert set(listed) == {engine, other}
    assert (list(listed[engine].models), list(listed[engine].signers)) == (["demo"], [private.public.id])
    assert (list(listed[other].models), list(listed[other].signers)) == ([], [])
    for text in (engine, engine[:8], "demo"):
        reply = await stub.GetEngine(GetEngineRequest(engine=text))
        assert reply.engine == listed[engine]
        assert reply.manifest == store.read(f"engines/{engine}.json")
    found = listed[engine]
    assert (found.source, found.architecture, found.dtype) == ("demo", "LlamaForCausalLM", "float32")
    assert (found.device, found.num_parameters, found.size) == (DEVICE_KIND_CPU, 100, 3)
    assert found.created == json.loads(store.read(f"engines/{engine}.json"))["created"]


async def test_engines_that_are_not_there(stub: BuilderStub, store: Store) -> None:
    publish(store)
    for text in ("", "demo", "0" * 64, "0" * 8):
        assert type(await failure(stub.GetEngine(GetEngineRequest(engine=text)))) in (NotFound, InvalidArgument)
    assert type(await failure(stub.DeleteEngine(DeleteEngineRequest(engine_id="0" * 64)))) is NotFound
    assert type(await failure(stub.DeleteEngine(DeleteEngineRequest(engine_id="demo")))) is InvalidArgument


async def test_an_engine_is_deleted_when_its_names_are(stub: BuilderStub, store: Store) -> None:
    engine = publish(store)
    registry.set_name(store, "demo", engine)
    error = await failure(stub.DeleteEngine(DeleteEngineRequest(engine_id=engine)))
    assert (type(error), error.reason) == (FailedPrecondition, "ENGINE_NAMED")
    removed = await stub.DeleteModelName(DeleteModelNameRequest(name="demo"))
    assert (removed.name, removed.sequence, removed.engine_id) == ("demo", 2, "")
    await stub.DeleteEngine(DeleteEngineRequest(engine_id=engine))
    assert registry.engine_ids(store) == []


async def test_names_change_and_their_history_tells(stub: BuilderStub, store: Store) -> None:
    engine, other = publish(store), publish(store, 1)
    for given in (engine, other, engine):
        await stub.SetModelName(SetModelNameRequest(name="demo", engine_id=given))
    await stub.SetModelName(SetModelNameRequest(name="taken", engine_id=other))
    error = await failure(stub.RenameModel(RenameModelRequest(name="demo", new_name="taken")))
    assert (type(error), error.reason) == (FailedPrecondition, "MODEL_NAME_TAKEN")
    renamed = await stub.RenameModel(RenameModelRequest(name="demo", new_name="fresh"))
    assert (renamed.name, renamed.sequence, renamed.engine_id) == ("fresh", 1, engine)
    assert await names(stub) == [("fresh", engine), ("taken", other)]
    records = (await stub.GetModelHistory(GetModelHistoryRequest(name="demo"))).records
    assert [(record.sequence, record.engine_id) for record in records] == [
        (4, ""),
        (3, engine),
        (2, other),
        (1, engine),
    ]
    assert all(record.created for record in records)
    for call in (
        stub.GetModelHistory(GetModelHistoryRequest(name="no")),
        stub.DeleteModelName(DeleteModelNameRequest(name="demo")),
        stub.RenameModel(RenameModelRequest(name="demo", new_name="x")),
    ):
        error = await failure(call)
        assert (type(error), error.reason) == (NotFound, "MODEL_NOT_FOUND")
    assert type(await failure(stub.RenameModel(RenameModelRequest(name="fresh", new_name="a/b")))) is InvalidArgument
