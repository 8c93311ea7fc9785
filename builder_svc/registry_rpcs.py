"""The registry's part of the service `Builder`: engines and their names."""

import asyncio
import logging
from typing import Any

import grpc

from engine import inventory, names, registry
from engine.inventory import Summary
from engine.registry import NameRecord
from engine.store import Store
from protos.v1 import builder_pb2_grpc
from protos.v1.builder_pb2 import (
    DEVICE_KIND_CPU,
    DEVICE_KIND_CUDA,
    DEVICE_KIND_UNSPECIFIED,
    DeleteEngineRequest,
    DeleteEngineResponse,
    DeleteModelNameRequest,
    Engine,
    GetEngineRequest,
    GetEngineResponse,
    GetModelHistoryRequest,
    GetModelHistoryResponse,
    ListEnginesRequest,
    ListEnginesResponse,
    ListModelNamesRequest,
    ListModelNamesResponse,
    ModelName,
    RenameModelRequest,
    SetModelNameRequest,
)

_KINDS = {"cpu": DEVICE_KIND_CPU, "cuda": DEVICE_KIND_CUDA}

Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)


class RegistryServicer(builder_pb2_grpc.BuilderServicer):
    """The methods about engines and model names; all of them read or write the store, in threads."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def ListEngines(self, _request: ListEnginesRequest, _context: Context) -> ListEnginesResponse:
        engines, unreadable = await asyncio.to_thread(inventory.engines, self._store)
        for engine in unreadable:
            log.warning("engine %s is not listed: %s", engine.engine_id[:12], engine.problem)
        return ListEnginesResponse(engines=map(_engine, engines))

    async def GetEngine(self, request: GetEngineRequest, _context: Context) -> GetEngineResponse:
        def read() -> GetEngineResponse:
            engine_id = registry.find_engine(self._store, request.engine)
            summary, _, manifest = inventory.inspect(self._store, engine_id)
            return GetEngineResponse(engine=_engine(summary), manifest=manifest)

        return await asyncio.to_thread(read)

    async def DeleteEngine(self, request: DeleteEngineRequest, _context: Context) -> DeleteEngineResponse:
        await asyncio.to_thread(inventory.remove_engine, self._store, request.engine_id)
        return DeleteEngineResponse()

    async def ListModelNames(self, _request: ListModelNamesRequest, _context: Context) -> ListModelNamesResponse:
        return ListModelNamesResponse(models=map(_name, await asyncio.to_thread(registry.named, self._store)))

    async def SetModelName(self, request: SetModelNameRequest, _context: Context) -> ModelName:
        registry.check_name(request.name)
        return _name(await asyncio.to_thread(registry.set_name, self._store, request.name, request.engine_id))

    async def RenameModel(self, request: RenameModelRequest, _context: Context) -> ModelName:
        return _name(await asyncio.to_thread(names.rename, self._store, request.name, request.new_name))

    async def DeleteModelName(self, request: DeleteModelNameRequest, _context: Context) -> ModelName:
        return _name(await asyncio.to_thread(names.remove_name, self._store, request.name))

    async def GetModelHistory(self, request: GetModelHistoryRequest, _context: Context) -> GetModelHistoryResponse:
        records = await asyncio.to_thread(names.history, self._store, request.name)
        return GetModelHistoryResponse(records=map(_name, records))


def _engine(summary: Summary) -> Engine:
    return Engine(
        engine_id=summary.engine_id,
        source=summary.source,
        created=summary.created,
        architecture=summary.architecture,
        dtype=summary.dtype,
        device=_KINDS.get(summary.device, DEVICE_KIND_UNSPECIFIED),
        num_parameters=summary.num_parameters,
        size=summary.size,
        models=summary.models,
        signers=summary.signers,
        dummy_weights=summary.dummy_weights,
    )


def _name(record: NameRecord) -> ModelName:
    return ModelName(name=record.name, sequence=record.sequence, engine_id=record.engine_id, created=record.created)
