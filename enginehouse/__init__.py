"""Build LLM engines once, keep them in object storage, load them in seconds, stream tokens from them anywhere.

Everything here is imported when it is first used: `import enginehouse` costs nothing, and only `build` brings torch.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

import protos  # noqa: F401  (before grpc)

if TYPE_CHECKING:
    from builder_svc.auto import AutoConfig, AutoModelForCausalLM
    from builder_svc.build_config import BuildConfig
    from builder_svc.causal_lm import CausalLM
    from builder_svc.mapping import Mapping
    from builder_svc.pipeline import build
    from builder_svc.pretrained import PretrainedConfig
    from builder_svc.quant_config import CalibConfig, QuantAlgo, QuantConfig
    from engine.artifact import Engine
    from engine.errors import EnginehouseError
    from enginehouse.client import BuilderClient, ExecutorClient, GatewayClient
    from enginehouse.cluster import LocalCluster
    from enginehouse.home import Home
    from enginehouse.llm.executor import ExecutorStats, GenerationExecutor, KvCacheConfig
    from enginehouse.llm.guided import GuidedDecodingParams
    from enginehouse.llm.llm import LLM
    from enginehouse.llm.outputs import CompletionOutput, RequestOutput, TokenLogprobs
    from enginehouse.llm.result import GenerationResult
    from enginehouse.llm.sampling import SamplingParams

    # What editors and type checkers know of `model_classes()`.
    FalconForCausalLM: type[CausalLM]
    GPTForCausalLM: type[CausalLM]
    GPTJForCausalLM: type[CausalLM]
    GPTNeoXForCausalLM: type[CausalLM]
    GemmaForCausalLM: type[CausalLM]
    LLaMAForCausalLM: type[CausalLM]
    Olmo2ForCausalLM: type[CausalLM]
    Olmo3ForCausalLM: type[CausalLM]
    Phi3ForCausalLM: type[CausalLM]
    PhiForCausalLM: type[CausalLM]
    QWenForCausalLM: type[CausalLM]
    StableLmForCausalLM: type[CausalLM]

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "BuildConfig",
    "BuilderClient",
    "CalibConfig",
    "CausalLM",
    "CompletionOutput",
    "Engine",
    "EnginehouseError",
    "ExecutorClient",
    "ExecutorStats",
    "GatewayClient",
    "GenerationExecutor",
    "GenerationResult",
    "GuidedDecodingParams",
    "Home",
    "KvCacheConfig",
    "LLM",
    "LocalCluster",
    "Mapping",
    "PretrainedConfig",
    "QuantAlgo",
    "QuantConfig",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprobs",
    "build",
]

_HOMES = {
    "AutoConfig": "builder_svc.auto",
    "AutoModelForCausalLM": "builder_svc.auto",
    "BuildConfig": "builder_svc.build_config",
    "BuilderClient": "enginehouse.client",
    "CalibConfig": "builder_svc.quant_config",
    "CausalLM": "builder_svc.causal_lm",
    "CompletionOutput": "enginehouse.llm.outputs",
    "Engine": "engine.artifact",
    "EnginehouseError": "engine.errors",
    "ExecutorClient": "enginehouse.client",
    "ExecutorStats": "enginehouse.llm.executor",
    "GatewayClient": "enginehouse.client",
    "GenerationExecutor": "enginehouse.llm.executor",
    "GenerationResult": "enginehouse.llm.result",
    "GuidedDecodingParams": "enginehouse.llm.guided",
    "Home": "enginehouse.home",
    "KvCacheConfig": "enginehouse.llm.executor",
    "LLM": "enginehouse.llm.llm",
    "LocalCluster": "enginehouse.cluster",
    "Mapping": "builder_svc.mapping",
    "PretrainedConfig": "builder_svc.pretrained",
    "QuantAlgo": "builder_svc.quant_config",
    "QuantConfig": "builder_svc.quant_config",
    "RequestOutput": "enginehouse.llm.outputs",
    "SamplingParams": "enginehouse.llm.sampling",
    "TokenLogprobs": "enginehouse.llm.outputs",
    "build": "builder_svc.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name == "__version__":
        value = importlib.metadata.version("enginehouse")
    elif name.endswith("ForCausalLM") and (found := _model_classes().get(name)):
        value = found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """With the classes of models where the builder is installed; they are one for each of the families' pages."""
    try:
        return sorted({*__all__, *_model_classes()})
    except ModuleNotFoundError:
        return __all__


def _model_classes() -> "dict[str, type[CausalLM]]":
    from builder_svc.causal_lm import model_classes

    return model_classes()
