"""What Triton compiles its kernels for."""

import functools
import os

from triton import knobs
from triton.runtime import driver

# Line numbers come with paths of files: without them a kernel is the same wherever it is compiled.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")


@functools.cache
def capability() -> int:
    """The compute capability of the GPU, 90 for 9.0; 0 where Triton interprets its kernels."""
    return 0 if knobs.runtime.interpret else int(driver.active.get_current_target().arch)


def roomy() -> bool:
    """Whether a multiprocessor has the 160 KiB of shared memory that our kernels' tiles need: not GeForce's, L4's or L40's."""
    return capability() in (0, 80, 87, 90, 100, 103)
