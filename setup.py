"""The part of the build that pyproject.toml cannot say: C code, left out where there is no compiler for it."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("executor_svc/kernels/csrc")

setup(
    ext_modules=[
        Extension(
            "executor_svc.kernels._native",
            [str(SOURCES / "native.c")],
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            # Not linked with OpenMP: torch's own is there when the library is loaded, and two of them would fight for the cores.
            extra_compile_args=["-std=gnu11", "-O3", "-fopenmp", "-Wno-unknown-pragmas"],
            optional=True,
        )
    ]
)
