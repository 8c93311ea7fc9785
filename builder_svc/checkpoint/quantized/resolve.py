"""Which of the decoder's linears are packed, and how; which are dequantized, and why."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from builder_svc.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from builder_svc.checkpoint.quantized.layers import Scheme
from builder_svc.checkpoint.quantized.method import Method
from builder_svc.checkpoint.tensors import Tensors
from builder_svc.models.packed import Fp8, Packed
from builder_svc.models.sources import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """What a build takes from a checkpoint.

    Attributes:
        checkpoint, sources: with the tensors of packed forms, where there are any; None and empty for dummy weights.
        packed: our linear's name -> the form of its weight.
        layers: our weight's name, as of a dense decoder -> the checkpoint's modules that form it, where they are quantized.
        facts: for the engine's identity; None if nothing is quantized.
    """

    checkpoint: Tensors | None
    sources: Mapping[str, Source]
    packed: Mapping[str, Packed] = field(default_factory=dict)
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    facts: dict[str, Any] | None = None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks the quantized layers' tensors, before anything is made of them.

        Args:
            shapes: of a dense decoder's weights by name.

        Raises:
            InvalidArgument: as `QuantizedCheckpoint.check` and `check_dense` do.
        """
        checkpoint = self.checkpoint
        if not isinstance(checkpoint, QuantizedCheckpoint):
            return
        for ours, modules in self.layers.items():
            *outer, columns = shapes[ours]
            rows = math.prod(outer)
            quantized = [module for module in modules if module in checkpoint.layers]
            dense = [f"{module}.weight" for module in modules if module not in checkpoint.layers]
            rows -= sum(checkpoint.shapes.get(name, (0,))[0] for name in dense)
            checkpoint.check(quantized, rows, columns)
        for source in self.sources.values():
            for name in source.names:
                checkpoint.check_dense(name)


def resolve(checkpoint: Tensors, sources: Mapping[str, Source], device: str) -> Resolved:
    """Chooses for each of our linears, as they will run on a kind of device. Logs a warning of those that are dequantized."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return Resolved(checkpoint, sources)
    packed: dict[str, Packed] = {}
    dequantized: dict[str, str] = {}
    forms: dict[str, Packed] = {}
    layers: dict[str, tuple[str, ...]] = {}
    found: dict[str, Source] = {}
    for ours, source in sources.items():
        modules = tuple(name.removesuffix(".weight") for name in source.names)
        if not any(module in checkpoint.layers for module in modules):
            found[ours] = source
            continue
        linear, layers[ours] = ours.removesuffix(".weight"), modules
        chosen = on_device(device, _form(ours, source, modules, checkpoint))
        source = replace(source, transposed=False)  # which a dense one might be
        if isinstance(chosen, str):
            dequantized[linear], found[ours] = chosen, source
            continue
        packed[linear] = chosen
        forms |= dict.fromkeys(modules, chosen)
        for name in chosen.tensors(2, 2):
            names = tuple(f"{module}.{name}" for module in modules)
            found[f"{linear}.{name}"] = (
                Source(names, largest=True) if name == "input_scale" else replace(source, names=names)
            )
    _warn(checkpoint, dequantized)
    facts = _facts(checkpoint.method, packed, dequantized)
    used = {name for source in sources.values() for name in source.names}
    return Resolved(checkpoint.packed(forms, used), found, packed, layers, facts)


def planned(
    method: Method, sources: Mapping[str, Source], columns: Mapping[str, int], dtype: str, device: str
) -> Resolved:
    """What dummy weights are packed as: the forms as far as a config alone tells, without a checkpoint's tensors.

    Args:
        columns: of the decoder's linears by name.
        dtype: of the checkpoint's scales, as its config declares it.
    """
    packed: dict[str, Packed] = {}
    for linear, count in columns.items():
        source = sources[f"{linear}.weight"]
        modules = [name.removesuffix(".weight") for name in source.names]
        chosen = on_device(device, _together([method.planned(module) for module in modules], lambda _: dtype, count))
        if not isinstance(chosen, str):
            packed[linear] = chosen
    return Resolved(None, {}, packed, facts=_facts(method, packed, {}))


def _facts(method: Method, packed: Mapping[str, Packed], dequantized: Mapping[str, str]) -> dict[str, Any]:
    return {
        "method": method.name,
        **method.facts,
        "packed": in_ranges({name: str(form) for name, form in packed.items()}),
        "dequantized": in_ranges(dequantized),
    }


def on_device(device: str, form: Packed | str) -> Packed | str:
    """The CPU multiplies with matrices of floats (`executor_svc/kernels/expand.py`): there, activations stay as they are."""
    return replace(form, activations="") if isinstance(form, Fp8) and device == "cpu" else form


def kv_scales(
    checkpoint: Tensors | None, sources: Mapping[str, Source], layers: int
) -> tuple[tuple[float, float], ...]:
    """What keys and values of each layer are divided by in a cache of 8 bits: the checkpoint's scales, else 1."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return ((1.0, 1.0),) * layers
    found = []
    for layer in range(layers):
        outer = sources[f"layers.{layer}.attention.qkv.weight"].names[0].removesuffix(".weight").rpartition(".")[0]
        pair = []
        for letter in "kv":
            names = [f"{outer}.{name}" for name in (f"{letter}_scale", f"{letter}_proj.{letter}_scale", "kv_scale")]
            pair.append(checkpoint.kv_scale(names) or 1.0)
        found.append((pair[0], pair[1]))
    return tuple(found)


def _form(ours: str, source: Source, modules: Sequence[str], checkpoint: QuantizedCheckpoint) -> Packed | str:
    """The packed form of one of our weights, or why it has none."""
    if not ours.endswith(".weight"):
        return "embeddings and experts have no packed operator"
    schemes = [checkpoint.layers.get(module) for module in modules]
    sizes = [checkpoint.size(module) for module in modules if module in checkpoint.layers]
    form = _together(schemes, lambda number: checkpoint.scales_dtype(modules[number]), sizes[0][1])
    if not isinstance(form, Fp8) or form.block_rows == 1:
        return form
    if source.heads or any(rows % form.block_rows for rows, _ in sizes[:-1]):
        return f"blocks of {form.block_rows} rows do not fall together with the rows of its parts"
    return form


def _together(schemes: Sequence[Scheme | None], dtype: Callable[[int], str], columns: int) -> Packed | str:
    """The form of parts that are one product."""
    if not all(schemes):
        return "only some of its parts are quantized" if any(schemes) else "not quantized"
    forms = [scheme.form(columns, dtype(number)) for number, scheme in enumerate(schemes) if scheme]
    for form in forms:
        if isinstance(form, str):
            return f"{form} has no packed operator"
        if form != forms[0]:
            return f"its parts differ: {forms[0]}; {form}"
    return forms[0]


def _warn(checkpoint: QuantizedCheckpoint, dequantized: Mapping[str, str]) -> None:
    for reason in dict.fromkeys(dequantized.values()):
        names = in_ranges({name: found for name, found in dequantized.items() if found == reason})
        log.warning(
            "%s: dequantized, since %s: %s. The engine holds these weights in its own dtype, and is larger by that",
            checkpoint.path, reason, ", ".join(names),
        )  # fmt: skip


def in_ranges(texts: Mapping[str, str]) -> dict[str, str]:
    """The same with layers that are told alike together: layers.0-3,7.mlp.down."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name, text in texts.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        numbers.setdefault((f"layers.{{}}.{match[2]}" if match else name, text), []).extend(
            [int(match[1])] if match else []
        )
    return {name.format(_ranges(found)): text for (name, text), found in numbers.items()}


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
