"""A lowered network becomes a plan: profiles, options of the builder, progress, and an end in the middle."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder_svc.lower.tensorrt.lowered import LoweredNetwork
from builder_svc.lower.tensorrt.targets import Target
from builder_svc.work_directory import MORE_ROOM, unwritable
from engine.blobs import Hasher
from engine.manifest import FileRef
from engine.tensorrt import failed


@dataclass(frozen=True)
class Plan:
    """A plan that was built.

    Attributes:
        timing_cache: what the builder has measured, for the next build of the same version and target; empty of TensorRT for RTX.
    """

    ref: FileRef
    path: Path
    timing_cache: bytes


def build(
    lowered: LoweredNetwork,
    trt: Any,
    target: Target,
    path: Path,
    *,
    weight_streaming: bool = False,
    timing_cache: bytes = b"",
    progress: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Writes the plan of a network to a file, as TensorRT makes it: it need not fit into memory twice, or into 2 GiB.

    TensorRT works in a thread of its own, so that a signal is heard: what is raised here meanwhile ends the build at its next
    step.

    Args:
        weight_streaming: whether weights may stay in main memory while the plan runs.
        progress: called with the number of steps done, from that thread; nobody knows how many there will be.

    Raises:
        Internal: TensorRT gives no plan; the message has its reason.
        ResourceExhausted, FailedPrecondition: the file cannot be written.
    """
    config = _config(lowered, trt, target, weight_streaming)
    cache = None
    if target.flavour == "tensorrt":  # that for RTX measures nothing when it builds
        cache = config.create_timing_cache(timing_cache) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, True)
    monitor, writer = _monitor(trt, progress), _writer(trt, path)
    config.progress_monitor = monitor
    with writer, ThreadPoolExecutor(1, "tensorrt") as pool:
        building = pool.submit(lowered.builder.build_serialized_network_to_stream, lowered.network, config, writer)
        try:
            done = building.result()
        except BaseException:
            monitor.stop.set()
            raise
    if writer.error is not None:
        raise unwritable(path, writer.error, MORE_ROOM)
    if not done:
        raise failed(trt, f"the network for {target}")
    measured = bytes(memoryview(cache.serialize())) if cache else b""
    return Plan(writer.hasher.ref(path.name), path, measured)


def _config(lowered: LoweredNetwork, trt: Any, target: Target, weight_streaming: bool) -> Any:
    config = lowered.builder.create_builder_config()
    if target.flavour == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.name), 0)
    if weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for ranges in lowered.profiles:
        profile = lowered.builder.create_optimization_profile()
        for port in lowered.io_spec.inputs:
            profile.set_shape(port.name, *ranges.shapes(port))
        if config.add_optimization_profile(profile) < 0:
            raise failed(trt, f"profile {ranges.name!r}")
    return config


def _monitor(trt: Any, progress: Callable[[int], None]) -> Any:
    """An IProgressMonitor that counts the steps of all phases, and ends the build when `stop` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stop = threading.Event()
            self._lock = threading.Lock()
            self._done = 0

        def phase_start(self, _name: str, _parent: str | None, _steps: int) -> None:
            pass

        def step_complete(self, _name: str, _step: int) -> bool:
            # An exception would end the process, in the middle of TensorRT's own code.
            with self._lock, suppress(Exception):
                self._done += 1
                progress(self._done)
            return not self.stop.is_set()

        def phase_finish(self, _name: str) -> None:
            pass

    return Monitor()


def _writer(trt: Any, path: Path) -> Any:
    """An IStreamWriter into a file, hashed on the way."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.hasher, self.error = Hasher(), None
            try:
                self._file = path.open("wb", buffering=0)
            except OSError as error:
                raise unwritable(path, error, MORE_ROOM) from None

        def write(self, data: bytes) -> int:
            view = memoryview(data)
            try:
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                self.error = error
                return 0
            self.hasher.update(data)
            return len(data)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            self._file.close()

    return Writer()
