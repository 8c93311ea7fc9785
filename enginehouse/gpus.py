"""GPUs as their makers describe them: memory, its bandwidth, and dense matrix throughput by dtype.

Dense figures throughout: the ones that data sheets print "with sparsity" are twice as large and hold for pruned weights
only. GeForce figures are those that accumulate in float32, half of what they do in float16. float32 is that of the vector
units, since the engine's float32 is not rounded to TF32. A gigabyte is 10^9 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import InvalidArgument


@dataclass(frozen=True)
class Gpu:
    """One kind of card.

    Attributes:
        memory: GB.
        bandwidth: GB/s.
        tflops: dtype -> dense TFLOP/s (TOP/s for int8); a dtype that is missing has no matrix units.
        source: the document that the numbers are of.
    """

    name: str
    memory: float
    bandwidth: float
    tflops: Mapping[str, float]
    source: str


def _gpu(
    name: str,
    memory: float,
    bandwidth: float,
    fp32: float,
    fp16: float,
    source: str,
    *,
    bf16: bool = True,
    fp8: float | None = None,
    int8: float | None = None,
) -> Gpu:
    known = {"float32": fp32, "float16": fp16, "bfloat16": fp16 if bf16 else None, "fp8": fp8, "int8": int8}
    return Gpu(name, memory, bandwidth, {dtype: value for dtype, value in known.items() if value}, source)


_HOPPER = "NVIDIA H100 data sheet; dense is half of its figures with sparsity"
_AMPERE = "NVIDIA A100 data sheet (SXM4)"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("H100-SXM", 80, 3350, 67, 989.4, _HOPPER, fp8=1978.9, int8=1978.9),
        _gpu("H100-PCIE", 80, 2000, 51, 756, _HOPPER, fp8=1513, int8=1513),
        _gpu("H100-NVL", 94, 3900, 60, 835, _HOPPER, fp8=1671, int8=1671),
        _gpu("H200", 141, 4800, 67, 989.4, "NVIDIA H200 data sheet (SXM); the H100's chip", fp8=1978.9, int8=1978.9),
        _gpu("B200", 180, 8000, 75, 2250, "NVIDIA DGX B200 data sheet, an eighth of it", fp8=4500, int8=4500),
        _gpu("A100-40GB", 40, 1555, 19.5, 312, _AMPERE, int8=624),
        _gpu("A100-80GB", 80, 2039, 19.5, 312, _AMPERE, int8=624),
        _gpu("L40S", 48, 864, 91.6, 362, "NVIDIA L40S data sheet", fp8=733, int8=733),
        _gpu("L4", 24, 300, 30.3, 121, "NVIDIA L4 data sheet; dense is half of it", fp8=242.5, int8=242.5),
        _gpu("A10", 24, 600, 31.2, 125, "NVIDIA A10 data sheet", int8=250),
        _gpu("T4", 16, 320, 8.1, 65, "NVIDIA T4 data sheet, Turing white paper", bf16=False, int8=130),
        _gpu("RTX-4090", 24, 1008, 82.6, 165.2, "NVIDIA Ada GPU architecture, table 2", fp8=330.3, int8=660.6),
        _gpu("RTX-5090", 32, 1792, 104.8, 209.5, "NVIDIA RTX Blackwell GPU architecture", fp8=419, int8=838),
        _gpu("RTX-3090", 24, 936, 35.6, 71, "NVIDIA GA102 white paper, table 2", int8=284),
        _gpu("MI300X", 192, 5300, 163.4, 1307.4, "AMD Instinct MI300X data sheet", fp8=2614.9, int8=2614.9),
    )
}
_ALSO = {"H100": "H100-SXM", "A100": "A100-80GB"}


def find_gpu(name: str) -> Gpu:
    """The card of a name, in any spelling of case, spaces and hyphens. Raises InvalidArgument, with the names there are."""
    wanted = _plain(name)
    for known, target in ({known: known for known in GPUS} | _ALSO).items():
        if _plain(known) == wanted:
            return GPUS[target]
    raise InvalidArgument(
        f"no GPU {name!r} in the table: choose one of {', '.join(GPUS)}, or describe yours with --memory, --bandwidth and "
        "--flops",
        reason="GPU_UNKNOWN",
    )


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
