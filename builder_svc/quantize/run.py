"""Quantizes a model as its checkpoint is being written: each layer when the first of its weights is asked for."""

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Values
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from builder_svc import saved
from builder_svc.build_config import Progress
from builder_svc.mapping import Mapping
from builder_svc.models.decoder import Decoder
from builder_svc.models.packed import Int4, Packed
from builder_svc.pretrained import PretrainedConfig
from builder_svc.quant_config import QuantAlgo
from builder_svc.quantize import awq, gptq, smoothquant
from builder_svc.quantize.forward import Read, Stream, compute_device
from builder_svc.quantize.inputs import Inputs
from builder_svc.quantize.plan import Plan
from builder_svc.quantize.rounding import largest_code, pack
from builder_svc.quantize.sites import HEAD, Rows, Site, layer_sites
from builder_svc.quantized import Quantized
from builder_svc.tokenizer import NormalizedTokenizer
from engine.ops import FP8_MAX, INT8_MAX, REFERENCE
from engine.opset import OPERATORS

_ALONE = Site((), None)


@dataclass(frozen=True)
class LinearError:
    """What a linear has lost.

    Attributes:
        name: such as "layers.0.mlp.down".
        form: of its weight.
        parameters, nbytes: of it, and what they take now.
        error: of its outputs, relative: the root of the squares of their changes over that of the squares of them all; None where
            no text was run through.
    """

    name: str
    form: str
    parameters: int
    nbytes: int
    error: float | None


def quantize(
    config: PretrainedConfig,
    read: Read,
    plan: Plan,
    tokenizer: NormalizedTokenizer | None,
    output_dir: Path,
    progress: Progress = lambda *_: None,
) -> list[LinearError]:
    """Writes a saved checkpoint (`builder_svc/saved.py`) of a model's weights, quantized.

    Args:
        config: of the model, which is not quantized.
        read: reads a weight by our name.
        progress: told of phase "quantize", in layers.

    Returns:
        What each quantized linear has lost.

    Raises:
        FailedPrecondition, ResourceExhausted: as `saved.save` does.
    """
    config = replace(config, mapping=Mapping())  # whole: a build divides it
    work = _Work(config, read, plan, progress)
    declared = Decoder.on_meta(config.decoder, config.checked_dtype, plan.packed).declared()

    def done() -> PretrainedConfig:
        kv_int8 = plan.quant_config.kv_cache_quant_algo is QuantAlgo.INT8
        made = Quantized(plan.packed, tuple(work.kv_scales), kv_int8, plan.facts)
        return replace(config, quantized=made, quant_config=None)

    saved.save(output_dir, config, declared, work.parts, tokenizer, described=done)
    return work.errors


class _Work:
    """The state: the stream of the calibration text, and the tensors of the layer that is being written."""

    def __init__(self, config: PretrainedConfig, read: Read, plan: Plan, progress: Progress) -> None:
        self.config, self.plan, self._read, self._progress = config.decoder, plan, read, progress
        self.kept = getattr(torch, config.checked_dtype)
        self.device = compute_device(plan.device)
        self.kv_scales: list[tuple[float, float]] = []
        self.errors: list[LinearError] = []
        self._stream: Stream | None = None
        self._at, self._tensors = -1, dict[str, Tensor]()
        count = len(self.config.layers)
        self._products = plan.quant_config.quant_algo in (QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ)
        self._steps = count + ("lm_head" in plan.packed)

    def parts(self, name: str) -> Iterable[Tensor]:
        """The tensors that form a weight. To be asked for in the order of layers."""
        if name.startswith("layers."):
            step = int(name.split(".")[1])
        elif name.startswith(("final_norm", "lm_head")) and "lm_head" in self.plan.packed:
            step = len(self.config.layers)
        else:
            return [self._read(name)]
        if step != self._at:
            self._at = step
            self._progress("quantize", step, self._steps, "")
            self._tensors = self._head() if step == len(self.config.layers) else self._layer(step)
            self._progress("quantize", step + 1, self._steps, "")
        return [self._tensors[name]]

    def _layer(self, number: int) -> dict[str, Tensor]:
        sites = list(layer_sites(self.config.layers[number]))
        prefix = f"layers.{number}."
        packed = {name.removeprefix(prefix): form for name, form in self.plan.packed.items() if name.startswith(prefix)}
        watched = {site: next((name for name in site.linears if name in packed), "") for site in sites}
        stream = self._streaming()
        if stream is None:
            layer = Decoder.on_meta(self.config, "float32").layers[str(number)]
            tensors = {name: self._float(prefix + name) for name, _ in layer.named_parameters()}
            seen: dict[str, Inputs] = {}
        else:
            tensors = stream.layer_tensors(number)
            seen = stream.pass_layer(number, tensors, [name for name in watched.values() if name], self._products)
        inputs = {site: seen[name] for site, name in watched.items() if name in seen}
        made, scales = self._quantized(prefix, sites, tensors, packed, inputs)
        if stream and self.plan.quant_config.kv_cache_quant_algo:
            queries_keys = sites[1].taker
            values = stream.values
            if isinstance(queries_keys, Rows) and sites[1] in scales:
                values = values / queries_keys.gathered(scales[sites[1]])[0]
            largest = INT8_MAX if self.plan.quant_config.kv_cache_quant_algo is QuantAlgo.INT8 else FP8_MAX
            pair = [max(float(part.max()), 1e-6) / largest for part in (stream.keys, values)]
            self.kv_scales.append((pair[0], pair[1]))
        return made

    def _head(self) -> dict[str, Tensor]:
        stream = self._streaming()
        names = [
            name
            for name in Decoder.on_meta(self.config, "float32").declared()
            if name.startswith(("final_norm", "lm_head"))
        ]
        tensors = {name: self._float(name) for name in names}
        inputs = {HEAD: stream.head_inputs(tensors, self._products)} if stream else {}
        return self._quantized("", [HEAD], tensors, {"lm_head": self.plan.packed["lm_head"]}, inputs)[0]

    def _streaming(self) -> Stream | None:
        """The calibration text on its way, if there is any."""
        if self.plan.sequences is not None and self._stream is None:
            self._stream = Stream(self.config, self._read, self.plan.sequences, self.device)
        return self._stream

    def _float(self, name: str) -> Tensor:
        return self._read(name).float().to(self.device)

    def _quantized(
        self,
        prefix: str,
        sites: Sequence[Site],
        tensors: Values[str, Tensor],
        packed: Values[str, Packed],
        inputs: Values[Site, Inputs],
    ) -> tuple[dict[str, Tensor], dict[Site, Tensor]]:
        """The tensors to write, by their whole names, on the CPU; and the scale of each site's input, where it has one."""
        folded, scales = dict(tensors), dict[Site, Tensor]()
        for site in sites:
            weights = [(tensors[f"{name}.weight"], packed[name]) for name in site.linears if name in packed]
            scale = self._scale(site, weights, inputs[site]) if weights and site.taker and site in inputs else None
            if scale is not None:
                scales[site] = site.fold(folded, scale, self.kept)
        of = {name: site for site in sites for name in site.linears}
        made = {}
        for name, form in packed.items():
            site = of.get(name, _ALONE)
            seen, scale = inputs.get(site), scales.get(site)
            weight = folded.pop(f"{name}.weight")
            if seen and scale is None:
                scale = torch.ones_like(seen.largest)
            found = self._packed(name, weight, form, seen, scale)
            made |= {f"{name}.{part}": tensor for part, tensor in found.items()}
            error = _error(found, form, weight, seen.rows / scale) if seen and scale is not None else None
            nbytes = sum(tensor.nbytes for tensor in found.values())
            self.errors.append(LinearError(prefix + name, str(form), weight.numel(), nbytes, error))
        return {prefix + name: tensor.cpu() for name, tensor in (folded | made).items()}, scales

    def _scale(self, site: Site, weights: Sequence[tuple[Tensor, Packed]], inputs: Inputs) -> Tensor | None:
        """What the algorithm divides a site's input by; None for nothing."""
        rows = site.taker if isinstance(site.taker, Rows) else None
        algo = self.plan.quant_config.quant_algo
        if algo is QuantAlgo.W4A16_AWQ:
            return awq.input_scale([(weight, form) for weight, form in weights if isinstance(form, Int4)], inputs, rows)
        if algo is QuantAlgo.W8A8_SQ_PER_CHANNEL:
            strength = self.plan.quant_config.smoothquant_val
            return smoothquant.input_scale([weight for weight, _ in weights], inputs, strength, rows)
        return None

    def _packed(
        self, name: str, weight: Tensor, form: Packed, seen: Inputs | None, scale: Tensor | None
    ) -> dict[str, Tensor]:
        if isinstance(form, Int4) and self._products and seen and scale is not None:
            if self.plan.quant_config.quant_algo is QuantAlgo.W4A16_GPTQ:
                return gptq.pack(weight, form, seen)
            kept = 0
            if name == "attention.qkv":
                queries, keys, _ = self.config.layers[self._at].attention.qkv_sizes
                kept = queries + keys
            return awq.pack_clipped(weight, form, seen, scale, kept)
        found = pack(weight, form)
        if not isinstance(form, Int4) and form.activations == "tensor" and seen and scale is not None:
            reach = (seen.largest / scale).max().clamp(min=1e-6)
            found["input_scale"] = (reach / largest_code(form)).view(1)
        return found


def _error(tensors: Values[str, Tensor], form: Packed, weight: Tensor, rows: Tensor) -> float:
    """Of outputs for these inputs, relative."""
    slots = [slot.rstrip("?") for slot in OPERATORS[form.operator].inputs]
    attrs = form.attrs(weight.shape[1])
    got = REFERENCE[form.operator](x=rows, **{name: tensors[name] for name in slots if name in tensors}, **attrs)
    right = F.linear(rows, weight)
    return float(((got - right).square().sum() / right.square().sum().clamp(min=1e-30)).sqrt())
