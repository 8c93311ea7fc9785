"""Computes an INetworkDefinition with torch, on the CPU: what TensorRT documents of each layer, rounded to each tensor's dtype.

Layers are computed in float32 (or float64) and rounded where the network says so; shapes are compared with those that TensorRT
infers.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from builder_svc.lower.tensorrt.lowered import LoweredNetwork

Collective = Callable[[dict[str, Any], Tensor], Tensor]
"""Takes a collective layer's metadata and this rank's tensor, and gives what all ranks make of theirs."""


class Evaluator:
    """A lowered network, ready to run.

    Args:
        trt: the module that made it.
        wide: in what layers are computed.
        collective: of several ranks.
    """

    def __init__(
        self,
        lowered: LoweredNetwork,
        trt: Any,
        *,
        wide: torch.dtype = torch.float32,
        collective: Collective | None = None,
    ) -> None:
        self._lowered, self._trt, self._wide, self._collective = lowered, trt, wide, collective
        self._dtypes = {
            trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.int32: torch.int32,
            trt.int64: torch.int64, trt.int8: torch.int8, trt.bool: torch.bool, trt.fp8: torch.float8_e4m3fn,
        }  # fmt: skip
        network = lowered.network
        self._constants: dict[str, Tensor] = {}
        # The binding gives plain ILayers; their type is asked before the class is set, since IActivationLayer has another `type`.
        waiting = []
        for number in range(network.num_layers):
            layer = network.get_layer(number)
            kind = layer.type.name
            layer.__class__ = getattr(trt, CLASSES[kind])
            if kind == "CONSTANT":
                self._constants[layer.get_output(0).name] = self._constant(layer)
            else:
                waiting.append((kind, layer))
        known = {network.get_input(number).name for number in range(network.num_inputs)} | set(self._constants)
        self._order: list[tuple[str, Any]] = []
        while waiting:  # layers do not stand in the order of their use
            ready = [each for each in waiting if all(t is None or t.name in known for t in self._inputs(*each))]
            assert ready, "the network has a cycle"
            waiting = [each for each in waiting if each not in ready]
            self._order += ready
            known |= {layer.get_output(at).name for _, layer in ready for at in range(layer.num_outputs)}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; the inputs are not changed."""
        network, values = self._lowered.network, dict(self._constants)
        for number in range(network.num_inputs):
            tensor = network.get_input(number)
            self._check(tensor, inputs[tensor.name])
            assert inputs[tensor.name].dtype == self._dtypes[tensor.dtype], tensor.name
            values[tensor.name] = inputs[tensor.name]
        for kind, layer in self._order:
            if kind == "ATTENTION_INPUT":  # computed with its output
                continue
            given = [None if t is None else values[t.name] for t in self._inputs(kind, layer)]
            made = getattr(self, f"_{kind.lower()}")(layer, *given)
            for at, result in enumerate(made if isinstance(made, tuple) else (made,)):
                tensor = layer.get_output(at)
                self._check(tensor, result)
                values[tensor.name] = result.to(self._dtypes[tensor.dtype])
        outputs = [network.get_output(number).name for number in range(network.num_outputs)]
        return {name: values[name] for name in outputs}

    def _inputs(self, kind: str, layer: Any) -> list[Any]:
        if kind == "ATTENTION_INPUT":
            return [layer.attention.get_input(at) for at in range(3)]
        if kind == "ATTENTION_OUTPUT":
            of = layer.attention
            return [*(of.get_input(at) for at in range(3)), of.mask, of.query_lengths, of.key_value_lengths]
        return [layer.get_input(at) for at in range(layer.num_inputs)]

    def _check(self, tensor: Any, value: Tensor) -> None:
        shape = tuple(tensor.shape)
        fits = len(shape) == value.dim() and all(
            size in (-1, is_) for size, is_ in zip(shape, value.shape, strict=True)
        )
        assert fits, f"{tensor.name}: TensorRT infers {shape}, here it is {tuple(value.shape)}"

    def _constant(self, layer: Any) -> Tensor:
        tensor, shape = self._lowered.constants[layer.name], tuple(layer.shape)
        if layer.get_output(0).dtype != self._trt.int4:
            return tensor.reshape(shape)
        nibbles = torch.stack((tensor & 15, tensor >> 4), -1).reshape(shape).to(torch.int8)
        return torch.where(nibbles > 7, nibbles - 16, nibbles)

    def _f(self, x: Tensor) -> Tensor:
        return x.to(self._wide) if x.is_floating_point() else x

    # One method a kind of layer

    def _cast(self, layer: Any, x: Tensor) -> Tensor:
        return x.to(self._dtypes[layer.to_type])

    def _shape(self, layer: Any, x: Tensor) -> Tensor:
        return torch.tensor(x.shape)

    def _gather(self, layer: Any, data: Tensor, indices: Tensor) -> Tensor:
        assert layer.num_elementwise_dims == 0 and layer.mode == self._trt.GatherMode.DEFAULT
        return data[(slice(None),) * layer.axis + (indices.long(),)]

    def _concatenation(self, layer: Any, *parts: Tensor) -> Tensor:
        return torch.cat(parts, layer.axis)

    def _slice(self, layer: Any, x: Tensor, _: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        shape = layer.shape if sizes is None else sizes.tolist()
        parts = zip(layer.start, shape, layer.stride, strict=True)
        return x[tuple(slice(start, start + size * stride, stride) for start, size, stride in parts)]

    def _shuffle(self, layer: Any, x: Tensor, shape: Tensor | None = None) -> Tensor:
        x = x.permute(*list(layer.first_transpose)[: x.dim()])
        try:
            dims = list(layer.reshape_dims) if shape is None else shape.tolist()
        except (TypeError, ValueError):  # none were set: None, or of a negative length
            return x
        return x.reshape([x.shape[at] if size == 0 else size for at, size in enumerate(dims)])

    def _elementwise(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        assert a.dim() == b.dim() and a.dtype == b.dtype, (a.dtype, b.dtype)
        return ELEMENTWISE[layer.op.name](self._f(a), self._f(b))

    def _unary(self, layer: Any, x: Tensor) -> Tensor:
        return UNARY[layer.op.name](self._f(x))

    def _activation(self, layer: Any, x: Tensor) -> Tensor:
        return ACTIVATIONS[layer.type.name](self._f(x))

    def _reduce(self, layer: Any, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
        return REDUCE[layer.op.name](self._f(x), dim=axes, keepdim=layer.keep_dims)

    def _select(self, layer: Any, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

    def _softmax(self, layer: Any, x: Tensor) -> Tensor:
        return torch.softmax(self._f(x), layer.axes.bit_length() - 1)

    def _topk(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.topk(self._f(x), layer.k, layer.axes.bit_length() - 1))  # type: ignore[return-value]

    def _normalization(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
        wide = self._f(x)
        variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        return (wide - mean) / torch.sqrt(variance + layer.epsilon) * self._f(weight) + self._f(bias)

    def _matrix_multiply(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        assert a.dim() == b.dim() and a.dtype == b.dtype, (a.dtype, b.dtype)
        turn = self._trt.MatrixOperation.TRANSPOSE
        a, b = (x.mT if operation == turn else x for x, operation in ((a, layer.op0), (b, layer.op1)))
        return self._f(a) @ self._f(b)

    def _rotary_embedding(self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None = None) -> Tensor:
        """x [batch, heads, seq, D]; cos and sin [positions, r / 2], or [batch, seq, r / 2] without positions."""
        size = layer.rotary_embedding_dim or x.shape[-1]
        cos, sin = ((table if at is None else table[at.long()])[:, None] for table in (self._f(cos), self._f(sin)))
        turned, kept = self._f(x[..., :size]), self._f(x[..., size:])
        if layer.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, -1)
        pair = first * cos - second * sin, second * cos + first * sin
        return torch.cat((torch.stack(pair, -1).flatten(-2) if layer.interleaved else torch.cat(pair, -1), kept), -1)

    def _kv_cache_update(
        self, layer: Any, cache: Tensor, new: Tensor, starts: Tensor, borders: Tensor | None = None
    ) -> Tensor:
        cache = cache.clone()
        for row, start in enumerate(starts.tolist()):
            if borders is None:
                assert layer.update_form == self._trt.AttentionIOForm.PADDED_BHND
                part = new[row]
            else:
                assert layer.update_form == self._trt.AttentionIOForm.PACKED_NHD
                part = new[int(borders[row]) : int(borders[row + 1])].transpose(0, 1)
            assert start >= 0 and start + part.shape[1] <= cache.shape[2], "tokens beyond the end of the slot"
            cache[row, :, start : start + part.shape[1]] = part
        return cache

    def _attention_output(
        self,
        layer: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        borders: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """Row after row; the last query of a row sees all its keys, the one before it one less."""
        forms, of = self._trt.AttentionIOForm, layer.attention
        assert of.key_value_form == forms.PADDED_BHND and of.norm_op == self._trt.AttentionNormalizationOp.SOFTMAX
        packed = of.query_form == forms.PACKED_NHD
        results = []
        for row in range(len(k)):
            if packed:
                assert borders is not None
                queries = q[int(borders[row]) : int(borders[row + 1])].transpose(0, 1)
            else:
                queries = q[row]
            length = k.shape[2] if lengths is None else int(lengths[row])
            count, repeats = queries.shape[1], q.shape[1] // k.shape[1]
            keys, values = (self._f(x[row, :, :length]).repeat_interleave(repeats, 0) for x in (k, v))
            scores = self._f(queries) @ keys.mT
            if of.causal_kind == self._trt.CausalMaskKind.LOWER_RIGHT:
                seen = torch.arange(length) <= torch.arange(length - count, length)[:, None]
                scores = scores.masked_fill(~seen, float("-inf"))
            if mask is not None:
                part = mask[row, :, :, :length]
                scores = (
                    scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + self._f(part)
                )
            made = scores.softmax(-1).nan_to_num(0.0) @ values
            results.append(made.transpose(0, 1) if packed else made)
        return torch.cat(results) if packed else torch.stack(results)

    def _quantize(self, layer: Any, x: Tensor, scale: Tensor) -> Tensor:
        wide = self._f(x) / spread(self._f(scale), x, layer.axis)
        if layer.get_output(0).dtype == self._trt.fp8:
            return wide.float().clamp(-448, 448).to(torch.float8_e4m3fn)
        return wide.round().clamp(-128, 127).to(torch.int8)

    def _dequantize(self, layer: Any, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.to(self._wide) * spread(self._f(scale), codes, layer.axis)

    def _dist_collective(self, layer: Any, x: Tensor) -> Tensor:
        assert self._collective is not None
        facts = json.loads(layer.metadata)
        assert facts["ranks"] == layer.num_ranks
        return self._collective(facts, x)


def spread(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """A scale as it is broadcast over x: one for all, one an index of an axis, or one a block."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:
        return scale.view([-1 if at == axis else 1 for at in range(x.dim())])
    for at, size in enumerate(x.shape):
        scale = scale.repeat_interleave(size // scale.shape[at], at)
    return scale


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add, "PROD": torch.mul, "SUB": torch.sub, "DIV": torch.div, "MAX": torch.maximum, "POW": torch.pow,
    "GREATER": torch.gt, "LESS": torch.lt, "EQUAL": torch.eq, "AND": torch.logical_and,
}  # fmt: skip
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "ABS": torch.abs, "COS": torch.cos, "SIN": torch.sin,
}  # fmt: skip
REDUCE: dict[str, Callable[..., Tensor]] = {"SUM": torch.sum, "AVG": torch.mean, "MAX": torch.amax}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SIGMOID": torch.sigmoid, "TANH": torch.tanh, "GELU_ERF": F.gelu, "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
CLASSES = {
    "CONSTANT": "IConstantLayer", "SHUFFLE": "IShuffleLayer", "GATHER": "IGatherLayer", "ELEMENTWISE": "IElementWiseLayer",
    "REDUCE": "IReduceLayer", "UNARY": "IUnaryLayer", "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer", "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "ATTENTION_INPUT": "IAttentionInputLayer", "ATTENTION_OUTPUT": "IAttentionOutputLayer", "ACTIVATION": "IActivationLayer",
    "CAST": "ICastLayer", "QUANTIZE": "IQuantizeLayer", "DEQUANTIZE": "IDequantizeLayer",
    "DIST_COLLECTIVE": "IDistCollectiveLayer", "SOFTMAX": "ISoftMaxLayer", "CONCATENATION": "IConcatenationLayer",
    "SLICE": "ISliceLayer", "NORMALIZATION": "INormalizationLayer", "SELECT": "ISelectLayer", "SHAPE": "IShapeLayer",
    "TOPK": "ITopKLayer",
}  # fmt: skip
