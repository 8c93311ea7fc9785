"""Compiles an engine's kernels, without a GPU: python -m executor_svc.compile PROGRAM.json --limits JSON ... --out FILE

A tool for builders. The runner walks through every form of step that it may be asked for, on tensors without memory; instead of
being launched, each kernel is compiled for the target. Prints the archive's name; nothing for a program that needs none.
"""

import argparse
import functools
import logging
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.manifest import Limits, Parallelism
from engine.program import Program
from executor_svc.cuda_layout import HostStep, trial
from executor_svc.cuda_runner import CudaRunner
from executor_svc.group import Group
from executor_svc.kernel_archive import archive_name, pack
from executor_svc.kernels.tactics import RULE, Table, from_json
from executor_svc.peer_memory import default_bytes

log = logging.getLogger(__name__)

_CC = (os.environ.get("CC", "gcc"), "-shared", "-fPIC")


class StandIn:
    """A driver for Triton where no GPU is: it knows the target, and launches nothing."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        """The default one."""
        return 0


class Absent(Group):
    """The other ranks of a program that is one's of several, where there are shapes and no values."""

    def __init__(self, program: Program, tp_size: int, shared: int) -> None:
        pp_size = 2 if any(op.op in ("send", "recv") for op in program.ops) else 1
        super().__init__(mapping=Parallelism(tp_size * pp_size, tp_size, pp_size))
        self._shared = shared

    def most_shared(self) -> int:
        return self._shared

    def share(self, size: int, fill: int) -> list[int] | None:  # noqa: ARG002
        return [rank << 40 for rank in range(1, self.tp_size + 1)]

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), x.shape[1] * self.tp_size)

    def send(self, x: Tensor) -> None:
        pass

    def recv(self, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.rows, columns, dtype=dtype, device="meta")


def _compile_only(kernel: JITFunction, grid: Any) -> Any:
    """What `kernel[grid]` is here: arguments decide what is compiled, as in a launch."""
    return lambda *arguments, **options: kernel.run(*arguments, grid=grid, warmup=True, **options)


def compile_kernels(program: Program, limits: Limits, arch: int, cache: Path, table: Table, tp_size: int = 1) -> int:
    """Compiles what a runner of the program may launch; how many kernels those are.

    It changes this process: from then on no kernel is launched.

    Args:
        arch: the compute capability, 90 for 9.0.
        cache: the directory that Triton puts them into.
        table: tactics of products.
        tp_size: ranks of the program's tensor-parallel group.
    """
    knobs.cache.dir = str(cache)
    driver.set_active(StandIn(arch))
    JITFunction.__getitem__ = _compile_only
    weights = {
        name: torch.empty(tuple(map(int, declared.shape)), dtype=getattr(torch, declared.dtype), device="meta")
        for name, declared in program.weights.items()
    }
    make = functools.partial(CudaRunner, program, weights, limits, kv_memory=1 << 40, table=table, device="meta")
    runner = make(group=Absent(program, tp_size, default_bytes(tp_size) if tp_size > 1 else 0))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True) as found, torch.inference_mode():
            for graph in runner.graphs:
                graph.compute()
            runner.walk(steps(limits))
            if tp_size > 1:  # where ranks cannot share memory
                make(group=Absent(program, tp_size, 0)).walk([trial(1)])
        kernels = []
        for kernel in found.future_kernels.values():
            if error := kernel.future.exception():
                log.warning("a kernel does not compile, and is left to executors: %s", error)
            else:
                kernels.append(kernel.result())
        _compile_host(kernels, pool)
    return len(kernels)


def steps(limits: Limits) -> Iterator[HostStep]:
    """Steps that no graph holds: decodes, of which each power of 2 may have kernels of its own, and prompts.

    Prompts begin and go on, with as many tokens, and rows of logits, as products of few rows have each a kernel of their own for.
    """
    most = limits.max_batch_size
    for decodes in sorted(
        {min(most, (1 << power) - less) for power in range(1, most.bit_length() + 1) for less in (0, 1)}
    ):
        yield trial(decodes)
    for power in range(1, (limits.max_num_tokens - 1).bit_length() + 1):
        for cached in (0, 16):
            yield trial(0, 1 << power, cached, told=True)


def _compile_host(kernels: list[Any], pool: ThreadPoolExecutor) -> None:
    """Compiles what launches them, if there is a C compiler: up to Triton 3.6 a function for each signature."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            _make_libcuda(Path(directory))
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("no C compiler (%s): what launches kernels is left to executors", error)
            return
        knobs.nvidia.libcuda_path, knobs.build.impl = directory, _build
        logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)  # it tries to load what it has compiled
        makers: dict[str, Callable[[], object]] = {"": nvidia.CudaUtils}
        if hasattr(nvidia, "make_launcher"):
            for kernel in kernels:
                form = f"{kernel.src.signature} {kernel.metadata.tensordesc_meta}"
                makers[form] = functools.partial(nvidia.CudaLauncher, kernel.src, kernel.metadata)
        for made in [pool.submit(maker) for maker in makers.values()]:
            failed = made.exception()
            if failed and not isinstance(failed, ImportError):  # without a GPU it cannot be loaded, and need not be
                log.warning("what launches kernels does not compile, and is left to executors: %s", failed)


def _build(
    name: str, source: str, folder: str, libraries_in: list[str], headers_in: list[str], libraries: list[str]
) -> str:
    """Triton's call of the C compiler, without what differs from one call to the next: the folder's name."""
    made = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = [f"-I{path}" for path in (*headers_in, sysconfig.get_paths()["include"])]
    linked = [*(f"-L{path}" for path in libraries_in), *(f"-l:{library}" for library in libraries)]
    command = [*_CC, "-O3", "-s", "-Wl,--build-id=none", "-o", made, Path(source).name, *headers, *linked]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return str(Path(folder) / made)


def _make_libcuda(directory: Path) -> None:
    """A library with the names of the driver's functions, for the linker."""
    sources = Path(nvidia.__file__).parent.glob("driver.*")
    names = sorted({name for source in sources for name in re.findall(r"\bcu[A-Z]\w+", source.read_text())})
    source = directory / "cuda.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    command = [*_CC, "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", source.name]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


def main() -> int:
    """The tool."""
    parser = argparse.ArgumentParser(prog="executor_svc.compile", description=__doc__.partition("\n")[0])
    parser.add_argument("program", type=Path, help="program.json of the engine")
    parser.add_argument("--limits", required=True, help="the engine's limits, as in its manifest")
    parser.add_argument("--compute-capability", required=True, help="of the GPU, such as 9.0")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that each layer is divided among [1]")
    parser.add_argument("--tactics", type=Path, help="table of `executor_svc.tune`; by default there is a rule")
    parser.add_argument("--out", type=Path, required=True, help="the archive")
    arguments = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so that Triton compiles nothing: unset it")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    program = Program.from_json(arguments.program.read_bytes())
    arch = int(arguments.compute_capability.replace(".", ""))
    driver.set_active(StandIn(arch))  # what the runner takes depends on the target
    if not CudaRunner.takes(program):
        return 0
    limits = msgspec.json.decode(arguments.limits, type=Limits)
    table = from_json(arguments.tactics.read_bytes()) if arguments.tactics else RULE
    with tempfile.TemporaryDirectory(prefix="enginehouse-compile-") as cache:
        compile_kernels(program, limits, arch, Path(cache), table, arguments.tp_size)
        arguments.out.write_bytes(pack(Path(cache), table))
    print(archive_name(arguments.compute_capability))
    return 0


if __name__ == "__main__":
    sys.exit(main())
