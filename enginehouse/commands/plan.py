"""`enginehouse plan`: what a model needs of a GPU and what it can give there, before anything is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.backends import open_store
from engine.errors import FailedPrecondition, InvalidArgument
from enginehouse import roofline
from enginehouse.gpus import GPUS, find_gpu
from enginehouse.model_shape import of_checkpoint, of_engine, to_json
from enginehouse.progress import format_bytes
from enginehouse.roofline import QUANTIZED, Device, Shape
from enginehouse.tables import print_json, print_table

_BATCHES = (1, 8, 64)
_INPUT_LEN, _OUTPUT_LEN = 1024, 256


@dataclass(frozen=True)
class Choices:
    """What a person chose. Memory is in GB, bandwidth in GB/s, flops in TFLOP/s; None takes the GPU's or the model's."""

    gpu: str | None = None
    memory: float | None = None
    bandwidth: float | None = None
    flops: float | None = None
    memory_use: float = 0.9
    bandwidth_efficiency: float = 0.85
    compute_efficiency: float = 0.7
    dtype: str = "auto"
    kv_dtype: str = "auto"
    tp: int = 1
    input_len: int | None = None
    output_len: int | None = None
    batch: tuple[int, ...] = ()


def list_gpus(*, as_json: bool) -> None:
    """The table of known GPUs."""
    if as_json:
        print_json(
            [
                {
                    "name": gpu.name,
                    "memory_gb": gpu.memory,
                    "bandwidth_gb_per_second": gpu.bandwidth,
                    "tflops": dict(gpu.tflops),
                    "source": gpu.source,
                }
                for gpu in GPUS.values()
            ]
        )
        return
    kinds = ("bfloat16", "float16", "fp8", "int8", "float32")
    rows = [
        (gpu.name, f"{gpu.memory:g}", f"{gpu.bandwidth:g}", *(f"{gpu.tflops.get(kind, 0):g}" for kind in kinds))
        for gpu in GPUS.values()
    ]
    shown = [tuple(cell if cell != "0" else "-" for cell in row) for row in rows]
    print_table(("gpu", "GB", "GB/s", *kinds), shown, "")
    print("\nDense TFLOP/s (TOP/s for int8). Sources: --json, or enginehouse/gpus.py.")


def run(model: str, choices: Choices, store_url: str, *, as_json: bool) -> None:
    """Prints the plan of a checkpoint or an engine.

    Args:
        model: a directory with config.json, a repository of the hub, or a name or id of an engine in the store.
    """
    if choices.gpu:
        find_gpu(choices.gpu)  # an error now, not after the model has been read
    shape = _shape(model, choices, store_url)
    roofline.check_tp(shape, choices.tp)
    input_len, output_len = _lengths(shape, choices)
    told: dict[str, Any] = {
        "model": to_json(shape),
        "tp": choices.tp,
        "weight_bytes_per_gpu": round(roofline.weight_bytes_per_rank(shape, choices.tp)),
        "input_len": input_len,
        "output_len": output_len,
        "kv_bytes_per_sequence": shape.kv_bytes(input_len + output_len),
    }
    memory, speed = _device(choices, shape)
    device = speed or (Device(memory, 1, {}) if memory else None)
    if device is not None and memory:
        told["device"] = _device_json(choices, device, memory, speed is not None)
        fits = roofline.max_sequences(shape, device, input_len + output_len, choices.tp, choices.memory_use)
        told["kv_memory"] = round(roofline.kv_memory(shape, device, choices.tp, choices.memory_use))
        told["max_sequences"] = fits
        told["max_batch"] = min(fits, shape.max_batch_size or fits)
    if speed is not None:
        told |= _speeds(shape, speed, choices, input_len, output_len, told.get("max_batch"))
    if as_json:
        print_json(told)
    else:
        _say(shape, choices, told)


def _shape(model: str, choices: Choices, store_url: str) -> Shape:
    """The model, in the dtypes that were chosen."""
    wanted = None if choices.dtype == "auto" else choices.dtype
    path = Path(model).expanduser()
    if model[:1] in (".", "/", "~") or path.is_dir():
        source: str | None = str(path)
    elif "/" in model:
        source = model if model.startswith("hf://") else f"hf://{model}"
    else:
        source = None
    if source is not None:
        shape = of_checkpoint(source, None if wanted in QUANTIZED else wanted)
    else:
        shape = of_engine(open_store(store_url), model)
        if wanted not in (None, shape.layer_dtype, *QUANTIZED):
            raise InvalidArgument(
                f"{shape.name} is built in {shape.layer_dtype}; for {wanted} plan its checkpoint", reason="DTYPE_FIXED"
            )
    if wanted in QUANTIZED and wanted is not None:
        shape = shape.quantized(wanted)
    return shape if choices.kv_dtype == "auto" else replace(shape, kv_dtype=choices.kv_dtype)


def _lengths(shape: Shape, choices: Choices) -> tuple[int, int]:
    """Tokens of prompt and completion; the defaults shrink to what the model takes."""
    longest = shape.max_seq_len
    if (choices.input_len or 1) + (choices.output_len or 1) > longest:
        raise InvalidArgument(
            f"--input-len and --output-len: {shape.name} takes {longest} tokens of prompt and completion together",
            reason="CONTEXT_TOO_LONG",
        )
    output_len = choices.output_len or max(1, min(_OUTPUT_LEN, (longest - (choices.input_len or 0)) // 2))
    return choices.input_len or max(1, min(_INPUT_LEN, longest - output_len)), output_len


def _device(choices: Choices, shape: Shape) -> tuple[float | None, Device | None]:
    """(bytes of memory, the device if its speed is known)."""
    gpu = find_gpu(choices.gpu) if choices.gpu else None
    memory = choices.memory or (gpu.memory if gpu else None)
    bandwidth = choices.bandwidth or (gpu.bandwidth if gpu else None)
    flops = {dtype: value * 1e12 for dtype, value in gpu.tflops.items()} if gpu else {}
    if choices.flops:
        flops |= dict.fromkeys((shape.layer_dtype, shape.dtype), choices.flops * 1e12)
    if (bandwidth is None) != (not flops):
        raise FailedPrecondition(
            "a speed needs --bandwidth and --flops, or --gpu NAME, which has both", reason="DEVICE_INCOMPLETE"
        )
    size = memory * 1e9 if memory else None
    if bandwidth is None:
        return size, None
    efficiencies = choices.bandwidth_efficiency, choices.compute_efficiency
    return size, Device(size or 0, bandwidth * 1e9, flops, *efficiencies)


def _device_json(choices: Choices, device: Device, memory: float, fast: bool) -> dict[str, object]:
    return {
        "gpu": find_gpu(choices.gpu).name if choices.gpu else None,
        "memory": round(memory),
        "memory_use": choices.memory_use,
        "bandwidth": device.bandwidth if fast else None,
        "flops": dict(device.flops),
        "bandwidth_efficiency": choices.bandwidth_efficiency,
        "compute_efficiency": choices.compute_efficiency,
    }


def _speeds(
    shape: Shape, device: Device, choices: Choices, input_len: int, output_len: int, most: int | None
) -> dict[str, object]:
    """Prefill, and decode for each batch. The context of a decode step is the prompt and half of the completion."""
    first = roofline.prefill(shape, device, input_len, choices.tp)
    batches: Sequence[int] = choices.batch
    if not batches:
        kept = [batch for batch in _BATCHES if most is None or batch <= most]
        batches = sorted({*kept, most} if most else kept)
    rows = []
    for batch in batches:
        step, best = (
            roofline.decode_step(shape, one, batch, input_len + output_len / 2, choices.tp)
            for one in (device, device.at_best())
        )
        rows.append(
            {
                "batch": batch,
                "fits": most is None or batch <= most,
                "step_seconds": step.seconds,
                "floor_seconds": best.seconds,
                "tokens_per_second": batch / step.seconds,
                "tokens_per_second_per_request": 1 / step.seconds,
                "requests_per_second": batch / (batch * first.seconds + output_len * step.seconds),
                "bound": step.bound,
            }
        )
    return {
        "prefill": {
            "ttft_seconds": first.seconds,
            "floor_seconds": roofline.prefill(shape, device.at_best(), input_len, choices.tp).seconds,
            "tokens_per_second": input_len / first.seconds,
            "bound": first.bound,
        },
        "decode": rows,
    }


def _say(shape: Shape, choices: Choices, told: dict[str, Any]) -> None:
    sizes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in shape.weight_bytes.items())
    active = f" ({_count(shape.active_parameters)} a token)" if shape.experts else ""
    streamed = shape.layer_bytes + shape.head_bytes + shape.replicated_bytes
    length = told["input_len"] + told["output_len"]
    lines = {
        "model": f"{shape.name}, {_count(shape.num_parameters)} parameters{active}, {shape.layer_dtype}"
        + (", dummy weights" if shape.dummy_weights else ""),
        "weights": f"{format_bytes(shape.total_bytes)} ({sizes})",
        "KV cache": f"{shape.kv_bytes(1):,} bytes a token in {shape.kv_dtype}; a sequence of {length} tokens "
        f"{format_bytes(told['kv_bytes_per_sequence'])}",
    }
    if shape.experts:
        least = shape.layer_read(1) + shape.head_bytes + shape.replicated_bytes
        lines["a step reads"] = (
            f"{format_bytes(round(least))} of them for one token, {format_bytes(streamed)} for many, which reach all experts"
        )
    elif streamed < shape.total_bytes:
        lines["a step reads"] = f"{format_bytes(streamed)} of them: of the input embedding only some rows"
    if choices.tp > 1:
        lines["tp"] = f"{choices.tp} cards, {format_bytes(told['weight_bytes_per_gpu'])} of weights on each"
    if "device" in told:
        lines["device"] = _described(told["device"], shape)
        memory, share = told["kv_memory"], f"{choices.memory_use:.0%} of the memory less the weights"
        if memory <= 0:
            lines["KV memory"] = f"none: weights need {format_bytes(-memory)} more than {share.split(' less')[0]}"
        else:
            lines["KV memory"] = f"{format_bytes(memory)} ({share}{', on each card' if choices.tp > 1 else ''})"
        limit = shape.max_batch_size
        capped = f"; the engine takes {limit} (--max-batch-size)" if limit and limit < told["max_sequences"] else ""
        lines["sequences"] = f"{told['max_sequences']:,} of {length} tokens at the same time{capped}"
    if "prefill" in told:
        first = told["prefill"]
        lines["prefill"] = (
            f"{told['input_len']} tokens: first token after {first['ttft_seconds'] * 1e3:.3g} ms, "
            f"{first['tokens_per_second']:,.0f} tokens/s, bound by {first['bound']}"
        )
    for name, value in lines.items():
        print(f"{name:<12} {value}")
    if choices.dtype in QUANTIZED:
        print(
            f"\nThis release builds no {choices.dtype} engines yet: the layers' matrices are counted at a byte a weight."
        )
    if told.get("decode"):
        print()
        _say_decode(told["decode"])
        print(
            f"\nExpected at {choices.bandwidth_efficiency:.0%} of the bandwidth and {choices.compute_efficiency:.0%} of the "
            "throughput; the floor is at 100% of both. Time between\ncards, launches and scheduling are not counted. "
            f"requests/s: {told['input_len']} in, {told['output_len']} out."
        )
    elif "max_batch" in told and told["max_batch"] == 0:
        print("\nNot even one sequence fits: take more memory, --tp cards, a smaller --dtype or shorter sequences.")
    elif "prefill" not in told:
        print("\nHow fast? Add --gpu NAME (--gpu list shows them), or --memory, --bandwidth and --flops.")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _described(device: dict[str, Any], shape: Shape) -> str:
    parts = [device["gpu"] or "", f"{device['memory'] / 1e9:g} GB"]
    if device["bandwidth"]:
        parts.append(f"{device['bandwidth'] / 1e9:g} GB/s")
        kinds = dict.fromkeys((shape.layer_dtype, shape.dtype))
        parts += [f"{device['flops'][kind] / 1e12:g} TFLOP/s {kind}" for kind in kinds if kind in device["flops"]]
    return ", ".join(part for part in parts if part)


def _say_decode(rows: Sequence[dict[str, Any]]) -> None:
    head = ("batch", "step", "floor", "tokens/s", "each", "requests/s", "bound by")
    print_table(
        head,
        [
            (
                str(row["batch"]),
                f"{row['step_seconds'] * 1e3:.3g} ms",
                f"{row['floor_seconds'] * 1e3:.3g} ms",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second_per_request']:,.1f}",
                f"{row['requests_per_second']:.3g}",
                row["bound"] + ("" if row["fits"] else "; does not fit"),
            )
            for row in rows
        ],
        "",
    )
