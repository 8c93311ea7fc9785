"""The modules that the decoder is made of: products, norms, rotary positions."""

import torch
from torch import Tensor, nn

from builder_svc.mapping import Mapping
from builder_svc.models.config import AttentionSpec, DynamicRope, LongRope, NormSpec, RopeSpec
from builder_svc.models.operators import op
from builder_svc.models.packed import Packed
from engine.opset import OPERATORS


class Linear(nn.Module):
    """y = x W^T + b, whose weight may be packed."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.packed: Packed | None = None
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def pack(self, form: Packed) -> None:
        """Takes the weight in this form instead."""
        rows, columns = self.weight.shape
        self.packed, self.attrs = form, form.attrs(columns)
        del self.weight
        for name, (dtype, shape) in form.tensors(rows, columns).items():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs]."""
        if self.packed is None:
            return op.linear(x, self.weight, self.bias)
        _, *slots = OPERATORS[self.packed.operator].inputs
        tensors = [getattr(self, slot.rstrip("?"), None) for slot in slots]
        return getattr(op, self.packed.operator)(x, *tensors, *self.attrs.values())


class Norm(nn.Module):
    """A norm, of the sum with the residual stream where there is one."""

    def __init__(self, size: int, spec: NormSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32 if spec.offset else None))
        self.bias = nn.Parameter(torch.empty(size)) if spec.bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (the norm, the residual stream)."""
        eps, weights = self.spec.eps, (self.weight, self.bias) if self.spec.kind == "layer" else (self.weight,)
        if residual is None:
            norm = op.layer_norm if self.spec.kind == "layer" else op.rms_norm
            return norm(x, *weights, eps), x
        norm = op.add_layer_norm if self.spec.kind == "layer" else op.add_rms_norm
        return norm(x, residual, *weights, eps)


class HeadNorm(nn.Module):
    """The norm of queries or keys. One of all heads together needs those of all ranks of the tensor-parallel group."""

    def __init__(self, spec: AttentionSpec, heads: int, eps: float, mapping: Mapping) -> None:
        super().__init__()
        self.kind, self.eps, self.mapping = spec.qk_norm, eps, mapping
        self.gathers = spec.qk_norm == "all" and mapping.has_tp()
        heads *= mapping.tp_size if self.gathers else 1
        shape = {"head": (spec.head_dim,), "heads": (heads, spec.head_dim), "all": (heads * spec.head_dim,)}[self.kind]
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32 if spec.qk_norm_offset else None))

    def forward(self, x: Tensor) -> Tensor:
        """[T, heads * D] -> [T, heads * D]."""
        norm = {"head": op.head_rms_norm, "heads": op.head_layer_norm, "all": op.rms_norm}[self.kind]
        if not self.gathers:
            return norm(x, self.weight, self.eps)
        whole = norm(op.all_gather(x), self.weight, self.eps)
        return op.split(whole, [x.shape[1]] * self.mapping.tp_size)[self.mapping.tp_rank]


class Rope(nn.Module):
    """Cosines and sines of a step, shared by all layers of one rotary spec."""

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self.spec = spec
        if not isinstance(spec.by_length, DynamicRope):
            self.register_buffer("inv_freq", torch.empty(len(spec.inv_freq), dtype=torch.float32))
        if isinstance(spec.by_length, LongRope):
            self.register_buffer("long_inv_freq", torch.empty(len(spec.inv_freq), dtype=torch.float32))

    def forward(self, positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """[T], [T] -> twice [T, rotary_dim / 2]."""
        spec, long = self.spec, self.spec.by_length
        if isinstance(long, LongRope):
            return op.long_rope_table(positions, lengths, self.inv_freq, self.long_inv_freq, long.original, spec.scale)
        if isinstance(long, DynamicRope):
            return op.dynamic_rope_table(
                positions, lengths, 2 * len(spec.inv_freq), long.theta, long.factor, long.original
            )
        return op.rope_table(positions, self.inv_freq, spec.scale)

    def constants(self) -> dict[str, tuple[float, ...]]:
        """The buffers' values by name."""
        spec, long = self.spec, self.spec.by_length
        if isinstance(long, DynamicRope):
            return {}
        return {"inv_freq": spec.inv_freq} | ({"long_inv_freq": long.inv_freq} if long else {})
