"""Compiles Triton kernels for Hopper, as the runner launches them on an 8B; no GPU is needed. Prints a line a kernel.

The interpreter takes what the compiler does not: other types in two branches, tiles that are too small, more shared memory than
there is.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from executor_svc.kernels import fp8, paged, prompt, rows

SHARED = 227 * 1024  # bytes that a program may have
B, F, Q, I32, I64 = "*bf16", "*fp32", "*fp8e4nv", "*i32", "*i64"
HEADS = {"H": 32, "G": 8, "D": 128}
OFF = {"CAP": False, "ALIBI": False, "WINDOW": False, "PDL": True}
TABLES = {"tables": I32, "table_rows": I32, "lengths": I32, "table_stride": "i32", "window": "i32"}
PRODUCT = {"q": Q, "q_scales": F, "weight": Q, "scales": F, "bias": B, "y": B}


def compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int = 3) -> None:
    """Arguments without a type are 32-bit integers that 16 divides, as sizes and strides here are."""
    known = {"scale": "fp32", "k_scale": "fp32", "v_scale": "fp32", "cap": "fp32", "eps": "fp32", "slots": I64, **types}
    chosen = {name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (at,): [["tt.divisibility", 16]] for at, (name, kind) in enumerate(chosen.items())
        if kind[0] == "*" or name not in known and kind == "i32"
    }  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": True}
    made = triton.compile(
        ASTSource(kernel, chosen, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    print(f"{kernel.__name__}: {made.metadata.shared} bytes of shared memory", flush=True)
    assert made.metadata.shared <= SHARED


def main() -> None:
    row = {"x": B, "gate_up": B, "residual": B, "weight": B, "total": B, "input_scale": F, "q": Q, "scales": F}
    compile(rows._norm, {**row, "y": B}, {"residual": None, "ADD": False, "BLOCK": 4096, "PDL": True}, 8)
    compile(rows._silu_mul, {**row, "y": B}, {"BLOCK": 1024, "PDL": True}, 4)
    by_token = {"input_scale": None, "STATIC": False, "PDL": True}
    compile(fp8._norm, row, {**by_token, "residual": None, "ADD": False, "BLOCK": 4096}, 8)
    compile(fp8._norm, row, {**by_token, "ADD": True, "BLOCK": 4096}, 8)
    compile(fp8._silu_mul, row, {**by_token, "BLOCK": 16384}, 16)
    compile(fp8._quantize, row, {"STATIC": True, "BLOCK": 4096, "PDL": True}, 8)
    one = {"bias": None, "ROWS": 1, "OUT": 2, "BIAS": False, "BLOCK": 2048, "PDL": True}
    compile(fp8._gemv, PRODUCT, one, 4)
    compile(fp8._gemv, PRODUCT, {**one, "ROWS": 2, "OUT": 1}, 4)
    compile(fp8._tiles, PRODUCT, {"M": 16, "N": 64, "K": 256, "BIAS": True, "PDL": True}, 4, 5)
    compile(fp8._tiles, PRODUCT, {"M": 64, "N": 64, "K": 256, "BIAS": False, "PDL": True}, 4, 5)
    brought = {**PRODUCT, "q": "tensordesc<fp8e4nv[128,128]>", "weight": "tensordesc<fp8e4nv[128,128]>"}
    compile(fp8._bulk, brought, {"M": 128, "N": 128, "K": 128, "BAND": 8, "BIAS": False, "PDL": True}, 8, 4)
    kept = {"q": B, "k": B, "v": B, "cos": F, "sin": F, "q_out": B, "k_out": B, "v_out": B, "k_cache": Q, "v_cache": Q}
    form = {**HEADS, "BLOCK": 128, "HEADS": 8, "INTERLEAVED": False, "KEEP": True, "FP8": True, "PDL": True}
    compile(rows._rope_write, kept, form, 4)
    compile(rows._write, kept, {"FP8": True, "BLOCK": 1024, "PDL": True}, 4)
    reads = {"q": B, "k_cache": Q, "v_cache": Q, "out": B, "alibi": F, **TABLES}
    tile = {**HEADS, **OFF, "PAGE": 16, "N": 64, "BD": 128}
    compile(paged._decode, {**reads, "partial": F, "stats": F}, {**tile, "M": 16, "SPLITS": 4}, 4)
    compile(
        paged._prefill, {**reads, "starts": I32, "tile_row": I32, "tile_at": I32}, {**tile, "M": 128, "PARTS": 1}, 8
    )
    fresh = {
        "q": "tensordesc<bf16[128,128]>",
        "keys": "tensordesc<bf16[128,128]>",
        "values": "tensordesc<bf16[128,128]>",
    }
    tiles = {"out": B, "starts": I32, "tile_row": I32, "tile_at": I32}
    compile(prompt._prompt, {**fresh, **tiles}, {**HEADS, "M": 128, "N": 128, "PDL": True}, 8, 2)


if __name__ == "__main__":
    main()
