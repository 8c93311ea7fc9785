"""Compiled kernels for one kind of GPU: by the executor's tool, in a process of its own, because only that knows them."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from builder_svc.build_config import BuildConfig
from engine.blobs import Hasher
from engine.errors import Internal
from engine.manifest import FileRef, Limits

_READ_BYTES = 1 << 20

log = logging.getLogger(__name__)


def compiler(options: BuildConfig) -> dict[str, str] | None:
    """What makes an engine's kernels, by version: a part of its identity, so that an id means kernels of one release.

    Where the GPU is here that it is built for, its name too: then the fastest kernels are chosen by measuring. That gives another
    choice each time; the first build's stays.

    None where there are to be none: an engine for any GPU has none, and neither has one that is built where the executor or
    Triton is not installed.
    """
    if options.backend != "torch" or options.target != "cuda" or options.compute_capability is None:
        return None
    try:
        if not all(map(importlib.util.find_spec, ("executor_svc", "triton"))):
            return None
        versions = {"triton": version("triton")}
    except (ModuleNotFoundError, PackageNotFoundError):
        return None
    with suppress(PackageNotFoundError):  # run from its sources
        versions["enginehouse"] = version("enginehouse")
    if gpu := _gpu_here(options.compute_capability):
        versions["tuned_on"] = gpu
    return versions


def _gpu_here(compute_capability: str) -> str | None:
    """The name of the GPU of this machine, if it is of that capability."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != tuple(
        map(int, compute_capability.split("."))
    ):
        return None
    return str(torch.cuda.get_device_name())


def compile_kernels(
    programs: Sequence[bytes], limits: Limits, options: BuildConfig, directory: Path
) -> dict[bytes, list[tuple[FileRef, Path]]]:
    """For each program the archive of its compiled kernels, written into a directory; nothing where there are to be none.

    Args:
        programs: each rank's program.json; equal ones are compiled once.

    Raises:
        Internal: the tool has failed; what it said is in the log.
    """
    made = {}
    for number, program in enumerate(dict.fromkeys(programs)):
        place = directory / f"program{number}"
        place.mkdir()
        made[program] = _compile(program, limits, options, place)
    return made


def _compile(program: bytes, limits: Limits, options: BuildConfig, directory: Path) -> list[tuple[FileRef, Path]]:
    if options.backend != "torch" or options.compute_capability is None:
        return []
    if not (made_by := compiler(options)):
        log.info(
            "no compiled kernels: Triton is not installed here, so that executors compile them when they load the engine"
        )
        return []
    source, path = directory / "program.json", directory / "kernels.tar"
    source.write_bytes(program)
    of = [str(source), "--limits", msgspec.json.encode(limits).decode()]
    measured: list[str] = []
    if "tuned_on" in made_by:
        table = directory / "tactics.json"
        try:
            _run("tune", [*of, "--out", str(table)])
            measured = ["--tactics", str(table)]
        except Internal as error:  # no memory left beside an executor, for one
            log.warning("kernels are chosen by a rule and not by measuring: %s", error)
    for_gpu = ["--compute-capability", options.compute_capability, "--tp-size", str(options.tp_size)]
    if not (name := _run("compile", [*of, *for_gpu, *measured, "--out", str(path)])):
        return []
    hasher = Hasher()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
    return [(hasher.ref(name), path)]


def _run(tool: str, arguments: list[str]) -> str:
    """What a tool of the executor's prints."""
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"executor_svc.{tool}", *arguments]
    done = subprocess.run(command, env=compiling, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Internal(
            f"making kernels failed (executor_svc.{tool}, exit status {done.returncode}); what was said before tells why. "
            "Without compute_capability the engine is built without compiled kernels",
            reason="KERNELS_FAILED",
        )
    return done.stdout.strip()
