"""Which runner computes a program here."""

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch

from engine import tensorrt
from engine.errors import FailedPrecondition
from engine.manifest import Limits
from engine.program import Program
from executor_svc.group import Group
from executor_svc.runner import TorchRunner
from executor_svc.tensorrt_runner import TensorRTRunner

if TYPE_CHECKING:
    from executor_svc.cuda_runner import CudaRunner

log = logging.getLogger(__name__)


def on_triton(device: str) -> bool:
    """Whether there are kernels of ours for the device: those for GPUs need Triton, which not every torch for CUDA brings."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def make_runner(
    program: Program,
    weights: dict[str, Any],
    limits: Limits,
    *,
    device: str,
    group: Group,
    table: dict[Any, Any],
    kv_memory: int | None,
    kv_share: float | None,
) -> "CudaRunner | TorchRunner":
    """The fastest that all ranks can have; arguments are the runners' own.

    Args:
        table: tactics of products on a GPU (`kernels/tactics.py`).

    Raises:
        FailedPrecondition: the device's memory is too small; the message says what would fit.
    """
    memory = {"kv_memory": kv_memory, "kv_share": kv_share}
    try:
        if on_triton(device):
            from executor_svc.cuda_runner import CudaRunner  # here, because it needs Triton

            if group.least(CudaRunner.takes(program)):
                return CudaRunner(program, weights, limits, table=table, group=group, **memory)  # type: ignore[arg-type]
        if device == "cuda":
            log.warning(
                "this engine runs on plain operators, which are slow: kernels for GPUs need Triton, a GPU of compute capability "
                "8.0, 8.7, 9.0, 10.0 or 10.3 (for 8 bits from 9.0 on), and an engine of dtype bfloat16 or float16"
            )
        return TorchRunner(program, weights, limits, device=device, group=group, **memory)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise FailedPrecondition(
            f"the GPU's memory is too small beside weights and KV cache: {error}. Give a smaller --kv-memory, or build the "
            f"engine with less than max_batch_size {limits.max_batch_size} or max_num_tokens {limits.max_num_tokens}",
            reason="GPU_MEMORY_TOO_SMALL",
        ) from None


def make_plan_runner(
    program: Program,
    plan: torch.Tensor,
    backend: str,
    limits: Limits,
    *,
    group: Group,
    kv_memory: int | None,
    kv_share: float | None,
) -> TensorRTRunner:
    """Of a plan of TensorRT; arguments are the loader's and the runner's own.

    Raises:
        FailedPrecondition: TensorRT does not take the plan here, or the device's memory is too small.
    """
    trt = tensorrt.load(backend)
    engine = trt.Runtime(tensorrt.logger(trt)).deserialize_cuda_engine(memoryview(plan.numpy()))
    if engine is None:
        raise FailedPrecondition(
            f"{backend} {tensorrt.version(trt)} does not take this plan here: {tensorrt.take_errors(trt)}. Build the engine "
            "again, for this GPU",
            reason="PLAN_REFUSED",
        )
    return TensorRTRunner(program, engine, limits, group=group, kv_memory=kv_memory, kv_share=kv_share)
