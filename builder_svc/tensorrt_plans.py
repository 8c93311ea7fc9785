"""Engines for TensorRT: a plan a rank, of its program and its weights, in place of both."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from builder_svc.build_config import BuildConfig, Progress
from builder_svc.lower.tensorrt.build import build
from builder_svc.lower.tensorrt.lower import lower
from builder_svc.lower.tensorrt.targets import Target, check
from engine import tensorrt
from engine.blobs import describe
from engine.errors import FailedPrecondition, NotFound
from engine.fingerprint import Fingerprint
from engine.manifest import FileRef, Limits, Rank
from engine.program import Program
from engine.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planner:
    """Makes the plans of one build.

    Attributes:
        trt: the module of the flavour.
    """

    trt: Any
    target: Target
    options: BuildConfig

    @staticmethod
    def of(options: BuildConfig) -> "Planner | None":
        """What the options ask for; None for an engine without plans.

        Raises:
            FailedPrecondition: the package is not installed, or the GPU that the plans are to be for is not here.
        """
        if options.backend == "torch":
            return None
        trt = tensorrt.load(options.backend)
        return Planner(trt, Target(options.backend, _capability(options)), options)

    def identity(self) -> dict[str, Any]:
        """What of it decides the engine."""
        return {
            "backend": self.target.flavour,
            "version": tensorrt.version(self.trt),
            "device": "cuda",
            "compute_capability": self.target.capability,
            "weight_streaming": self.options.weight_streaming,
        }

    def fingerprint(self, opset_version: int) -> Fingerprint:
        """What an executor must have: this version, and such a GPU."""
        version = tensorrt.version(self.trt)
        return Fingerprint(self.target.flavour, "cuda", opset_version, self.target.capability, backend_version=version)

    def check(self, programs: Sequence[Program]) -> None:
        """Raises Unimplemented, before anything is written, if the target does not take what a program has."""
        for program in programs:
            check(program, self.target)

    def ranks(
        self,
        programs: Sequence[Program],
        weights: Sequence[tuple[tuple[int, ...], FileRef, Path]],
        limits: Limits,
        store: Store,
        directory: Path,
        progress: Progress,
    ) -> tuple[tuple[Rank, ...], list[tuple[FileRef, Path]]]:
        """Each rank with its plan in place of weights, and the plans' files, in a directory.

        Args:
            programs: each rank's.
            weights: safetensors files, each with the ranks whose it is (`ranks.write_ranks`). They are mapped and not read.
            store: what the builder has measured is kept there, for the next build.
        """
        ranks, files, steps = [], [], 0

        def step(_: int) -> None:
            nonlocal steps
            steps += 1
            progress("plan", steps, 0, "steps")

        key = f"timing/{self.target.flavour}-{tensorrt.version(self.trt)}-{self.target.name}"
        for number, program in enumerate(programs):
            known = _read(store, key)
            constants = _mapped([path for numbers, _, path in weights if number in numbers])
            lowered = lower(program, constants, self.trt, self.target, limits, len(programs))
            plan = build(
                lowered,
                self.trt,
                self.target,
                directory / f"rank{number}.plan",
                weight_streaming=self.options.weight_streaming,
                timing_cache=known,
                progress=step,
            )
            if plan.timing_cache != known:
                store.replace(key, plan.timing_cache)
            log.info("plan of rank %d for %s: %.1f MB", number, self.target, plan.ref.size / 1e6)
            described = describe("program.json", program.to_json())
            ranks.append(Rank(described, (), native=(plan.ref,), network=lowered.summary()))
            files.append((plan.ref, plan.path))
        progress("plan", steps, steps, "steps")
        return tuple(ranks), files


def _capability(options: BuildConfig) -> str:
    if options.backend == "tensorrt_rtx":
        return str(options.compute_capability)
    import torch

    here = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None
    if here is None or options.compute_capability not in (None, here):
        found = (
            "none is here" if here is None else f"its compute capability is {here}, not {options.compute_capability}"
        )
        raise FailedPrecondition(
            f"backend 'tensorrt' builds for the GPU of this machine, and {found}: build on one that has it, or choose backend "
            "'tensorrt_rtx' with a target, or 'torch'",
            reason="DEVICE_MISSING",
        )
    return here


def _mapped(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of several files, which the system reads when they are used."""
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    return found


def _read(store: Store, key: str) -> bytes:
    try:
        return store.read(key)
    except NotFound:
        return b""
