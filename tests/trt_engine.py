"""TensorRT's runtime as runners see it, over a network that is evaluated: engine, context, and tensors by their addresses."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from builder_svc.lower.tensorrt.lower import lower
from builder_svc.lower.tensorrt.lowered import LoweredNetwork, Port
from builder_svc.lower.tensorrt.targets import Target
from engine import tensorrt
from executor_svc.group import ALONE, Group
from executor_svc.loader import LoadedEngine
from executor_svc.loop import scheduler_config
from executor_svc.scheduler import Scheduler
from executor_svc.tensorrt_runner import TensorRTRunner
from tests.running import Engine
from tests.trt_evaluator import Collective, Evaluator

PADDED, PACKED = Target("tensorrt_rtx", "12.0"), Target("tensorrt", "9.0")
"""Targets with either form of attention. Both networks are made by the package that can be installed here."""


class EvaluatedEngine:
    """An ICudaEngine over a lowered network."""

    streamable_weights_size = weight_streaming_budget_v2 = 0

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    def __init__(self, lowered: LoweredNetwork, trt: Any, collective: Collective | None = None) -> None:
        self.lowered, self.trt, self.collective = lowered, trt, collective
        spec = lowered.io_spec
        self.ports = {port.name: port for port in (*spec.inputs, *spec.outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.ports[name].shape)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.lowered.kv_aliases.get(name)

    def create_execution_context(self) -> "EvaluatedContext":
        return EvaluatedContext(self)


class EvaluatedContext:
    """An IExecutionContext, which refuses shapes that the profile has not.

    Attributes:
        launches: (profile, shape of the tokens) of each execution.
        communicator: the address that it was given.
    """

    def __init__(self, engine: EvaluatedEngine) -> None:
        self._engine = engine
        self._evaluator = Evaluator(engine.lowered, engine.trt, collective=engine.collective)
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.launches: list[tuple[int, tuple[int, ...]]] = []
        self.communicator = 0

    def set_communicator(self, capsule: object) -> bool:
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self.communicator = pointer(capsule, None)
        return True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == 0 and 0 <= index < len(self._engine.lowered.profiles)
        self._profile, self._shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.lowered.profiles[self._profile].shapes(self._engine.ports[name])
        fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        self._shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.ports

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 0
        engine, spec = self._engine, self._engine.lowered.io_spec
        assert self._shapes.keys() == {port.name for port in spec.inputs}
        self.launches.append((self._profile, self._shapes["token_ids"]))
        for output, source in engine.lowered.kv_aliases.items():
            assert self._addresses[output] == self._addresses[source], "a cache is written where it is read"
        inputs = {port.name: self._at(port, self._shapes[port.name]) for port in spec.inputs}
        for name, made in self._evaluator.run(inputs).items():
            self._at(engine.ports[name], tuple(made.shape)).copy_(made)
        return True

    def _at(self, port: Port, shape: tuple[int, ...]) -> Tensor:
        dtype = getattr(torch, port.dtype)
        memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(self._addresses[port.name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class TensorRTEngine(Engine):
    """A loaded engine whose program is lowered for a target, evaluated, and run by TensorRTRunner.

    Args:
        loaded: on the CPU, its weights as the store has them.
        slots: sequences that the caches have room for.
    """

    def __init__(self, loaded: LoadedEngine, target: Target, slots: int = 4) -> None:
        self.device, self.guides = "cpu", None
        self.evaluated = evaluated(loaded, target)
        self.runner = runner(loaded, self.evaluated, slots)
        self.scheduler = Scheduler(scheduler_config(self.runner, loaded.manifest))


def evaluated(loaded: LoadedEngine, target: Target, collective: Collective | None = None) -> EvaluatedEngine:
    """The engine's network; of several ranks with what they compute together."""
    trt = tensorrt.load("tensorrt_rtx")
    ranks = loaded.manifest.mapping.tp_size
    lowered = lower(loaded.program, loaded.weights, trt, target, loaded.manifest.limits, ranks)
    return EvaluatedEngine(lowered, trt, collective)


def runner(loaded: LoadedEngine, engine: EvaluatedEngine, slots: int, group: Group = ALONE) -> TensorRTRunner:
    """With caches of so many slots."""
    limits, per_token = loaded.manifest.limits, sum(cache.bytes_per_token for cache in loaded.program.caches)
    memory = slots * per_token * tensorrt.capacity(limits.max_seq_len)
    return TensorRTRunner(loaded.program, engine, limits, device="cpu", kv_memory=memory, group=group)
