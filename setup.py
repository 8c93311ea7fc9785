"""The part of the build that pyproject.toml cannot say: C code, left out where there is no compiler for it."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "executor_svc.kernels._native",
            ["executor_svc/kernels/csrc/native.c"],
            depends=["executor_svc/kernels/csrc/tiles.h"],
            # Not linked with OpenMP: torch's own is there when the library is loaded, and two of them would fight for the cores.
            extra_compile_args=["-std=gnu11", "-O3", "-fopenmp", "-Wno-unknown-pragmas"],
            optional=True,
        )
    ]
)
