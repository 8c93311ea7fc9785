"""The builder's servicer: checks what comes over the wire and hands it to the jobs and the registry."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from builder_svc.build_config import BuildConfig
from builder_svc.checkpoint import sources
from builder_svc.checkpoint.sources import find_text
from builder_svc.jobs import Jobs
from builder_svc.process import BuildRequest
from builder_svc.quant_config import CalibConfig, QuantConfig
from builder_svc.registry_rpcs import RegistryServicer
from builder_svc.spool import default_spool
from builder_svc.upload_rpcs import UploadServicer
from builder_svc.uploads import Uploads
from engine import registry
from engine.errors import InvalidArgument
from engine.store import Store
from protos.v1.builder_pb2 import (
    DEVICE_KIND_CPU,
    DEVICE_KIND_CUDA,
    DEVICE_KIND_UNSPECIFIED,
    Build,
    BuildEvent,
    BuildSpec,
    CancelBuildRequest,
    DeviceKind,
    GetBuildRequest,
    ListBuildsRequest,
    ListBuildsResponse,
    Quantization,
    SubmitBuildRequest,
    WatchBuildRequest,
)

_DEVICES = {DEVICE_KIND_UNSPECIFIED: "cpu", DEVICE_KIND_CPU: "cpu", DEVICE_KIND_CUDA: "cuda"}
_NUMBERS = ("max_batch_size", "max_seq_len", "max_num_tokens", "tp_size", "pp_size")

_QUANT_FIELDS = ("group_size", "has_zero_point", "smoothquant_val", "quantize_lm_head")
_CALIB_FIELDS = {
    "calib_dataset": "calib_dataset", "calib_samples": "calib_batches", "calib_max_seq_length": "calib_max_seq_length",
    "random_seed": "random_seed",
}  # fmt: skip

Context = grpc.aio.ServicerContext[Any, Any]


class BuilderServicer(UploadServicer, RegistryServicer):
    """The service `Builder` of protos/v1/builder.proto.

    Args:
        checkpoint_root: a directory; of this machine's, only checkpoints in it are built.
        spool: for uploads that are under way; by default in the system's temporary directory.
        on_upload: called with the bytes that have come.
    """

    def __init__(
        self,
        jobs: Jobs,
        store: Store,
        checkpoint_root: Path,
        spool: Path | None = None,
        on_upload: Callable[[int], None] = lambda _: None,
    ) -> None:
        UploadServicer.__init__(self, Uploads(store, spool or default_spool()), on_upload)
        RegistryServicer.__init__(self, store)
        self._jobs = jobs
        self._root = checkpoint_root.resolve(strict=True)

    async def SubmitBuild(self, request: SubmitBuildRequest, _context: Context) -> Build:
        if request.model:
            registry.check_name(request.model)
        options = read_options(request.spec)
        if options.calib_config and options.calib_config.calib_dataset:
            found = await asyncio.to_thread(find_text, self._root, options.calib_config.calib_dataset)
            options.calib_config.calib_dataset = str(found)
        checkpoint = await asyncio.to_thread(sources.accept, request.spec.checkpoint, self._root, self._store)
        return await self._jobs.submit(BuildRequest(checkpoint, options=options), request.spec, request.model)

    async def WatchBuild(self, request: WatchBuildRequest, _context: Context) -> AsyncIterator[BuildEvent]:
        async for event in self._jobs.events(request.build_id, request.from_sequence):
            yield event

    async def GetBuild(self, request: GetBuildRequest, _context: Context) -> Build:
        return await self._jobs.find(request.build_id)

    async def ListBuilds(self, _request: ListBuildsRequest, _context: Context) -> ListBuildsResponse:
        return ListBuildsResponse(builds=await self._jobs.builds())

    async def CancelBuild(self, request: CancelBuildRequest, _context: Context) -> Build:
        return await self._jobs.cancel(request.build_id)


def read_options(spec: BuildSpec) -> BuildConfig:
    """The options in a spec. Raises InvalidArgument naming the value."""
    device = _DEVICES.get(spec.target.device)
    if device is None:
        known = ", ".join(DeviceKind.Name(kind) for kind in _DEVICES)
        raise InvalidArgument(f"target.device {spec.target.device}: choose one of {known}")
    if spec.backend not in ("", "torch") and not spec.target.device:
        device = "cuda"
    quantization = spec.quantization if spec.HasField("quantization") else None
    return BuildConfig(
        quant_config=quantization and _quant_config(quantization),
        calib_config=quantization and _calib_config(quantization),
        dtype=spec.dtype or "auto",
        device=device,
        compute_capability=spec.target.compute_capability or None,
        dummy_weights=spec.dummy_weights,
        kv_cache_dtype=spec.kv_cache_dtype or "auto",
        backend=spec.backend or "torch",
        weight_streaming=spec.weight_streaming,
        **{field.name: value for field, value in spec.ListFields() if field.name in _NUMBERS},
    )


def _quant_config(asked: Quantization) -> QuantConfig:
    given = {field.name: value for field, value in asked.ListFields()}
    algorithms = {name: given.get(name) or None for name in ("quant_algo", "kv_cache_quant_algo")}
    config = QuantConfig(
        **algorithms,
        exclude_modules=list(asked.exclude_modules) or None,
        **{name: given[name] for name in _QUANT_FIELDS if name in given},
    )
    if not config.asks:
        raise InvalidArgument("quantization: give its quant_algo or kv_cache_quant_algo")
    return config


def _calib_config(asked: Quantization) -> CalibConfig:
    given = {field.name: value for field, value in asked.ListFields() if field.name in _CALIB_FIELDS}
    return CalibConfig(**{_CALIB_FIELDS[name]: value for name, value in given.items()})
