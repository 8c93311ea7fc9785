"""A gateway's HTTP server over mock executors, on the test's event loop."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway_harness import Cluster, cluster
from openai import AsyncOpenAI

from engine.errors import Unavailable
from gateway.http.app import application
from gateway.http.endpoint import Surroundings
from gateway.http.listener import Listener
from gateway.http.status import Status
from protos.access import EVERYBODY, Access
from protos.dial import NONE

MAX_BYTES = 1 << 20


class HttpCluster:
    """Attributes: grpc, the cluster; url of its HTTP server, which `listener` is; `openai`, a client that tries once."""

    def __init__(self, grpc: Cluster, listener: Listener, key: str) -> None:
        self.grpc, self.listener, self.url = grpc, listener, listener.url
        self.executor = grpc.executor
        self.openai = AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    async def raw(self, method: str, path: str, **options: Any) -> Any:
        """A request as it is, by the client library that `openai` brings."""
        return await self.openai._client.request(method, f"{self.url}{path}", **options)


@asynccontextmanager
async def http_cluster(
    path: Path, access: Access = EVERYBODY, key: str = "none", builder: str | None = None, **options: Any
) -> AsyncIterator[HttpCluster]:
    async with cluster(path, access=access, **options) as grpc:
        around = Surroundings(access, MAX_BYTES)
        status = Status(grpc.gateway, builder, NONE)
        listener = Listener(application(grpc.gateway, around, status), around, "127.0.0.1", 0, grace=5)
        listener.start()
        made = HttpCluster(grpc, listener, key)
        try:
            yield made
        finally:
            await made.openai.close()
            listener.cut(Unavailable("the test ends"))
            await listener.stop()
            await status.close()
