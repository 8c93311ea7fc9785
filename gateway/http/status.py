"""GET /status: what the page shows of executors, engines, builds and speed, as it is now."""

import asyncio
import time
from typing import Any

import grpc
from starlette.requests import Request

from gateway.http.answer import Answer
from gateway.http.context import HttpContext
from gateway.server import Gateway
from protos.access import caller
from protos.dial import Credentials
from protos.v1.builder_pb2 import BuildState, ListBuildsRequest
from protos.v1.builder_pb2_grpc import BuilderStub
from protos.v1.gateway_pb2 import ListModelsRequest

_LATELY = 60.0  # seconds of which first tokens are told
_BUILDER_PATIENCE = 2.0  # seconds
_SHOWN_BUILDS = 20


class Status:
    """Of one gateway; of a builder, too, if it knows one."""

    def __init__(self, gateway: Gateway, builder: str | None, credentials: Credentials) -> None:
        """`builder`: HOST:PORT."""
        self._gateway = gateway
        self._builder = credentials.channel(builder) if builder else None

    async def close(self) -> None:
        """The connection to the builder."""
        if self._builder:
            await self._builder.close()

    async def get(self, _request: Request, context: HttpContext, answer: Answer) -> None:
        """Answers. Whoever may not use all models sees only its own, their engines' load, and no builds."""
        listed = await self._gateway.ListModels(ListModelsRequest(), context)  # type: ignore[arg-type]
        names: dict[str, list[str]] = {}
        for model in listed.models:
            names.setdefault(model.engine_id, []).append(model.name)
        everything = "*" in caller().models
        builds = await self._builds() if everything else None
        telemetry = self._gateway.telemetry
        await answer.json(
            {
                "time": time.time(),
                "streams": telemetry.open,
                "completion_tokens": telemetry.tokens,
                "first_token_seconds": self._first_tokens(),
                "executors": [
                    {
                        "address": link.address,
                        "connected": link.connected,
                        "engines": [
                            {
                                "engine_id": engine_id,
                                "models": names.get(engine_id, []),
                                "running": load.running,
                                "waiting": load.waiting,
                                "queued_tokens": load.queued_tokens,
                                "free_kv_blocks": load.free_kv_blocks,
                                "total_kv_blocks": load.total_kv_blocks,
                            }
                            for engine_id, load in sorted(link.loads.items())
                            if everything or engine_id in names
                        ],
                    }
                    for link in self._gateway.links
                ],
                "builds": builds,
            }
        )

    def _first_tokens(self) -> dict[str, float | int | None]:
        """Of those of the last minute, at most 1000."""
        since = time.monotonic() - _LATELY
        lately = sorted(seconds for when, seconds in self._gateway.telemetry.first_tokens if when >= since)
        ranks = {
            name: lately[int(share * len(lately))] if lately else None for name, share in (("p50", 0.5), ("p95", 0.95))
        }
        return {"count": len(lately), **ranks}

    async def _builds(self) -> list[dict[str, Any]] | str | None:
        """The newest first; words where the builder does not answer; None where none is known."""
        if not self._builder:
            return None
        stub: Any = BuilderStub(self._builder)
        try:
            async with asyncio.timeout(_BUILDER_PATIENCE):
                listed = await stub.ListBuilds(ListBuildsRequest())
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            return error.code().name if isinstance(error, grpc.aio.AioRpcError) else "DEADLINE_EXCEEDED"
        newest = sorted(listed.builds, key=lambda build: build.created.ToNanoseconds(), reverse=True)[:_SHOWN_BUILDS]
        return [
            {
                "build_id": build.build_id,
                "model": build.model,
                "state": BuildState.Name(build.state).removeprefix("BUILD_STATE_").lower(),
                "engine_id": build.engine_id,
                "created": build.created.seconds,
            }
            for build in newest
        ]
