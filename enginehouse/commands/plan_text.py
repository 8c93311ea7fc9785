"""What `enginehouse plan` tells a person."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enginehouse.progress import format_bytes
from enginehouse.roofline import QUANTIZED, Shape
from enginehouse.tables import print_table


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
    pp: int = 1
    input_len: int | None = None
    output_len: int | None = None
    batch: tuple[int, ...] = ()


def say(shape: Shape, choices: Choices, told: dict[str, Any]) -> None:
    """Prints a plan, of which programs are told the same as JSON."""
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
    several = len(told["ranks"]) > 1
    if several:
        lines["ranks"] = f"{len(told['ranks'])} cards, tp {told['tp']}, pp {told['pp']}; on each:"
        lines |= _ranks(told["ranks"], told["tp"])
    if "device" in told:
        lines["device"] = _described(told["device"], shape)
        memory, share = told["kv_memory"], f"{choices.memory_use:.0%} of the memory less the weights"
        if memory <= 0:
            lines["KV memory"] = f"none: weights need {format_bytes(-memory)} more than {share.split(' less')[0]}"
        else:
            lines["KV memory"] = f"{format_bytes(memory)} ({share}{', on each card' if several else ''})"
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
        print(
            "\nNot even one sequence fits: take more memory, more cards (--tp, --pp), a smaller --dtype or shorter sequences."
        )
    elif "prefill" not in told:
        print("\nHow fast? Add --gpu NAME (--gpu list shows them), or --memory, --bandwidth and --flops.")


def _ranks(ranks: Sequence[dict[str, Any]], tp: int) -> dict[str, str]:
    """A line for each place of the pipeline, whose ranks have as much each."""
    lines = {}
    for first in range(0, len(ranks), tp):
        rank = ranks[first]
        name = f"  rank {first}" if tp == 1 else f"  {first} to {first + tp - 1}"
        lines[name] = (
            f"{rank['layers']} layers, {format_bytes(rank['weight_bytes'])} of weights, {rank['kv_bytes_per_token']:,} bytes of "
            f"KV cache a token; sends {rank['sent_bytes_per_token']:,.0f} bytes a token and "
            f"{rank['sent_bytes_per_row_of_logits']:,.0f} a row of logits"
        )
    return lines


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
