"""`enginehouse plan`: what a model needs of a GPU and what it can give there, before anything is built."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.backends import open_store
from engine.errors import FailedPrecondition, InvalidArgument
from enginehouse import roofline
from enginehouse.commands.plan_text import Choices, say
from enginehouse.gpus import GPUS, find_gpu
from enginehouse.model_shape import Divided, of_checkpoint, of_engine, ranks_json, to_json
from enginehouse.roofline import QUANTIZED, Device, Shape
from enginehouse.tables import print_json, print_table

_BATCHES = (1, 8, 64)
_INPUT_LEN, _OUTPUT_LEN = 1024, 256


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
    divided = _model(model, choices, store_url)
    shape, stages = divided.whole, divided.stages
    input_len, output_len = _lengths(shape, choices)
    told: dict[str, Any] = {
        "model": to_json(shape),
        "tp": divided.tp,
        "pp": len(stages),
        "ranks": ranks_json(divided),
        "weight_bytes_per_gpu": max(stage.total_bytes for stage in stages),
        "input_len": input_len,
        "output_len": output_len,
        "kv_bytes_per_sequence": shape.kv_bytes(input_len + output_len),
    }
    memory, speed = _device(choices, shape)
    device = speed or (Device(memory, 1, {}) if memory else None)
    if device is not None and memory:
        told["device"] = _device_json(choices, device, memory, speed is not None)
        fits = min(
            roofline.max_sequences(stage, device, input_len + output_len, choices.memory_use) for stage in stages
        )
        told["kv_memory"] = round(min(roofline.kv_memory(stage, device, choices.memory_use) for stage in stages))
        told["max_sequences"] = fits
        told["max_batch"] = min(fits, shape.max_batch_size or fits)
    if speed is not None:
        told |= _speeds(stages, speed, choices, input_len, output_len, told.get("max_batch"))
    if as_json:
        print_json(told)
    else:
        say(shape, choices, told)


def _model(model: str, choices: Choices, store_url: str) -> Divided:
    """The model among its ranks, in the dtypes that were chosen."""
    wanted = None if choices.dtype == "auto" else choices.dtype
    path = Path(model).expanduser()
    if model[:1] in (".", "/", "~") or path.is_dir():
        source: str | None = str(path)
    elif "/" in model:
        source = model if model.startswith("hf://") else f"hf://{model}"
    else:
        source = None
    if source is not None:
        divided = of_checkpoint(source, None if wanted in QUANTIZED else wanted, choices.tp, choices.pp)
    else:
        divided = of_engine(open_store(store_url), model)
        built, own = divided.whole, (divided.tp, len(divided.stages))
        if wanted not in (None, built.layer_dtype, *QUANTIZED):
            raise InvalidArgument(
                f"{built.name} is built in {built.layer_dtype}; for {wanted} plan its checkpoint", reason="DTYPE_FIXED"
            )
        if (choices.tp, choices.pp) not in ((1, 1), own):
            raise InvalidArgument(
                f"{built.name} is built with --tp {own[0]} --pp {own[1]}; for --tp {choices.tp} --pp {choices.pp} plan its "
                "checkpoint",
                reason="MAPPING_FIXED",
            )
    if wanted in QUANTIZED and wanted is not None:
        kind = wanted
        divided = divided.map(lambda shape: shape.quantized(kind))
    return (
        divided if choices.kv_dtype == "auto" else divided.map(lambda shape: replace(shape, kv_dtype=choices.kv_dtype))
    )


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
    stages: Sequence[Shape], device: Device, choices: Choices, input_len: int, output_len: int, most: int | None
) -> dict[str, object]:
    """Prefill, and decode for each batch. The context of a decode step is the prompt and half of the completion."""
    first, at_best = (
        roofline.total([roofline.prefill(stage, one, input_len) for stage in stages])
        for one in (device, device.at_best())
    )
    batches: Sequence[int] = choices.batch
    if not batches:
        kept = [batch for batch in _BATCHES if most is None or batch <= most]
        batches = sorted({*kept, most} if most else kept)
    rows = []
    for batch in batches:
        step, best = (
            roofline.decode(stages, one, batch, input_len + output_len / 2) for one in (device, device.at_best())
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
            "floor_seconds": at_best.seconds,
            "tokens_per_second": input_len / first.seconds,
            "bound": first.bound,
        },
        "decode": rows,
    }
