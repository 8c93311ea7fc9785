"""Build LLM engines once, keep them in object storage, load them in seconds, stream tokens from them anywhere.

Everything here is imported when it is first used: `import enginehouse` costs nothing, and only `build` brings torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder_svc.options import BuildOptions
    from builder_svc.pipeline import Built, build
    from engine.errors import EnginehouseError
    from enginehouse.client import BuilderClient, ExecutorClient, GatewayClient
    from enginehouse.cluster import LocalCluster
    from enginehouse.home import Home

__all__ = [
    "BuildOptions",
    "BuilderClient",
    "Built",
    "EnginehouseError",
    "ExecutorClient",
    "GatewayClient",
    "Home",
    "LocalCluster",
    "build",
]

_HOMES = {
    "BuildOptions": "builder_svc.options",
    "BuilderClient": "enginehouse.client",
    "Built": "builder_svc.pipeline",
    "EnginehouseError": "engine.errors",
    "ExecutorClient": "enginehouse.client",
    "GatewayClient": "enginehouse.client",
    "Home": "enginehouse.home",
    "LocalCluster": "enginehouse.cluster",
    "build": "builder_svc.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
