"""Compiled kernels for one kind of GPU: by the executor's tool, in a process of its own, because only that knows them."""

import importlib.util
import logging
import os
import subprocess
import sys
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
    """What makes an engine's kernels, by version: a part of its identity, so that the same id means the same kernels.

    None where there are to be none: an engine for any GPU has none, and neither has one that is built where the executor or
    Triton is not installed.
    """
    if options.target != "cuda" or options.compute_capability is None:
        return None
    try:
        if not all(map(importlib.util.find_spec, ("executor_svc", "triton"))):
            return None
        versions = {"triton": version("triton")}
    except (ModuleNotFoundError, PackageNotFoundError):
        return None
    with suppress(PackageNotFoundError):  # run from its sources
        versions["enginehouse"] = version("enginehouse")
    return versions


def compile_kernels(
    program: bytes, limits: Limits, options: BuildConfig, directory: Path
) -> list[tuple[FileRef, Path]]:
    """The archive of a program's compiled kernels, written into a directory; nothing where there are to be none.

    Args:
        program: program.json.

    Raises:
        Internal: the tool has failed; what it said is in the log.
    """
    if options.compute_capability is None:
        return []
    if not compiler(options):
        log.info(
            "no compiled kernels: Triton is not installed here, so that executors compile them when they load the engine"
        )
        return []
    source, path = directory / "program.json", directory / "kernels.tar"
    source.write_bytes(program)
    command = [sys.executable, "-m", "executor_svc.compile", str(source), "--out", str(path)]
    command += ["--limits", msgspec.json.encode(limits).decode(), "--compute-capability", options.compute_capability]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiling, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Internal(
            f"the kernels did not compile (exit status {done.returncode}); what was said before tells why. Without "
            "compute_capability the engine is built without compiled kernels",
            reason="KERNELS_FAILED",
        )
    if not (name := done.stdout.strip()):
        return []
    hasher = Hasher()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
    return [(hasher.ref(name), path)]
