"""THE decoder: a module over the operator set, recorded on the meta device (`lower/program.py`), or computed to quantize it."""

from collections.abc import Callable, Iterator
from collections.abc import Mapping as Values
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from builder_svc.mapping import Mapping
from builder_svc.models.config import AttentionSpec, DecoderConfig, ExpertsSpec, MlpSpec, NormSpec
from builder_svc.models.layers import HeadNorm, Linear, Norm, Rope
from builder_svc.models.operators import op
from builder_svc.models.packed import Packed
from builder_svc.shard import part_of
from engine.opset import FLOATS
from engine.program import TensorType

KVScales = tuple[tuple[float, float], ...]
"""Of keys and of values, for each layer."""
Places = Callable[["Layer"], tuple[tuple[Tensor, Tensor] | None, Tensor | None]]
_ALONE = Mapping()


@contextmanager
def _default_dtype(dtype: str) -> Iterator[None]:
    """torch's default dtype, such as "bfloat16", for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Attention(nn.Module):
    """Self-attention; queries, keys and values are one product. The results of a tensor-parallel group's ranks add up to it."""

    def __init__(self, spec: AttentionSpec, hidden_size: int, eps: float, index: int, mapping: Mapping) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.kv_scales, self.kv_int8 = (0.0, 0.0), False  # a cache in the dtype of keys and values
        self.qkv = Linear(hidden_size, sum(spec.qkv_sizes), spec.qkv_bias)
        self.q_norm = HeadNorm(spec, spec.num_heads, eps, mapping) if spec.qk_norm else None
        self.k_norm = HeadNorm(spec, spec.num_kv_heads, eps, mapping) if spec.qk_norm else None
        self.out = Linear(spec.num_heads * spec.head_dim, hidden_size, spec.out_bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, alibi: Tensor | None) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        spec = self.spec
        q, k, v = op.split(self.qkv(x), list(spec.qkv_sizes))
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation:
            q, k = (op.rope(part, *rotation, spec.head_dim, spec.rope.interleaved) for part in (q, k))
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        settings = (self.index, spec.head_dim, scale, spec.window, spec.soft_cap, *self.kv_scales, self.kv_int8)
        return self.out(op.attention(q, k, v, alibi, *settings))


class Mlp(nn.Module):
    """The feed-forward part; gate and up, where it is gated, are one product. Ranks' results add up as attention's do."""

    def __init__(self, spec: MlpSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.gated:
            self.gate_up = Linear(hidden_size, 2 * spec.intermediate_size, spec.bias)
        else:
            self.up = Linear(hidden_size, spec.intermediate_size, spec.bias)
        self.down = Linear(spec.intermediate_size, hidden_size, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        tanh = self.spec.activation == "gelu_tanh"
        if not self.spec.gated:
            return self.down(op.gelu(self.up(x), tanh))
        if self.spec.activation == "silu":
            return self.down(op.silu_mul(self.gate_up(x)))
        return self.down(op.gelu_mul(self.gate_up(x), tanh))


class Experts(nn.Module):
    """Feed-forward parts that a router chooses from, and the one that all tokens share. Ranks' results add up, too."""

    def __init__(self, spec: ExpertsSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.router = Linear(hidden_size, spec.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(spec.num_experts, 2 * spec.intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(spec.num_experts, hidden_size, spec.intermediate_size))
        self.shared = Mlp(spec.shared, hidden_size) if spec.shared else None
        self.shared_gate = Linear(hidden_size, 1, bias=False) if spec.shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        y = op.experts(x, self.router(x), self.gate_up, self.down, self.spec.top_k, self.spec.normalize)
        if self.shared and self.shared_gate:
            y = op.add(y, op.sigmoid_mul(self.shared(x), self.shared_gate(x)))
        return y


class Layer(nn.Module):
    """Attention and feed-forward around the residual stream, which is the sum of `residual` and what is to be added to it."""

    def __init__(self, config: DecoderConfig, index: int, mapping: Mapping) -> None:
        super().__init__()
        self.spec = spec = config.layers[index]
        self.divided = mapping.has_tp()
        self.attention_norm = self._norm(config, spec.attention_norm)
        self.attention = Attention(spec.attention, config.hidden_size, config.final_norm.eps, index, mapping)
        self.attention_out_norm = self._norm(config, spec.attention_out_norm)
        self.mlp_norm = self._norm(config, spec.mlp_norm)
        self.mlp = (Mlp if isinstance(spec.mlp, MlpSpec) else Experts)(spec.mlp, config.hidden_size)
        self.mlp_out_norm = self._norm(config, spec.mlp_out_norm)

    @staticmethod
    def _norm(config: DecoderConfig, spec: NormSpec | None) -> Norm | None:
        return Norm(config.hidden_size, spec) if spec else None

    def forward(
        self, x: Tensor, residual: Tensor | None, rotation: tuple[Tensor, Tensor] | None, alibi: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(this layer's last addition, the residual stream without it)."""
        stream, residual = self._enter(self.attention_norm, x, residual)
        attended = self.attention(stream, rotation, alibi)
        if not self.spec.parallel:
            attended = self._leave(self.attention_out_norm, attended)
            stream, residual = self._enter(self.mlp_norm, attended, residual)
            return self._leave(self.mlp_out_norm, self.mlp(stream)), residual
        if self.mlp_norm:
            stream, _ = self.mlp_norm(residual)
        made = self.mlp(stream)
        if self.attention_out_norm or self.mlp_out_norm:
            attended, made = self._leave(self.attention_out_norm, attended), self._leave(self.mlp_out_norm, made)
            return op.add(attended, made), residual
        return self._leave(None, op.add(attended, made)), residual

    def _enter(self, norm: Norm | None, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a part reads, and the stream that its result is added to."""
        if norm:
            return norm(x, residual)
        stream = x if residual is None else op.add(x, residual)
        return stream, stream

    def _leave(self, norm: Norm | None, x: Tensor) -> Tensor:
        """What is added of a part's result, of which each rank has a summand."""
        if self.divided:
            x = op.all_reduce(x)
        if norm:
            x, _ = norm(x)
        return x if self.spec.residual_scale == 1 else op.scale(x, self.spec.residual_scale)


class Head(Linear):
    """The product that makes logits, with the embedding where both are tied.

    Args:
        config: of the rank, whose rows of the vocabulary it has.
        vocab_size: of all ranks.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, mapping: Mapping) -> None:
        super().__init__(config.hidden_size, config.vocab_size, config.head_bias)
        self.divided, self.vocab_size = mapping.has_tp(), vocab_size
        self.padding = config.vocab_size * mapping.tp_size - vocab_size
        self.tied = config.tie_embeddings
        if self.tied:
            self.weight = None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab_size]."""
        logits = op.linear(x, embedding, self.bias) if self.tied else super().forward(x)
        if self.divided:
            logits = op.all_gather(logits)
        return op.split(logits, [self.vocab_size, self.padding])[0] if self.padding else logits


class Decoder(nn.Module):
    """token ids -> logits of the rows that are asked for.

    It is there to be recorded: `on_meta` makes it without memory for weights. `quantize/forward.py` computes it layer by layer.

    Args:
        config: of the whole model.
        packed: name of a linear, such as "layers.0.attention.qkv" -> the form of its weight, where it is not dense.
        kv_scales: of keys and of values, for each layer, where the KV cache has 8 bits.
        mapping: the rank whose part it is; weights and layers have the whole model's names.
        kv_int8: such a cache is int8 and not float8_e4m3fn.
    """

    def __init__(
        self,
        config: DecoderConfig,
        packed: Values[str, Packed] = {},  # noqa: B006  (not changed)
        kv_scales: KVScales | None = None,
        mapping: Mapping = _ALONE,
        kv_int8: bool = False,
    ) -> None:
        super().__init__()
        numbers, vocab_size = mapping.pp_layers(len(config.layers)), config.vocab_size
        self.config = config = part_of(config, mapping)
        self.mapping, self.dtype = mapping, str(torch.get_default_dtype()).removeprefix("torch.")
        if mapping.is_first_pp_rank() or config.tie_embeddings:
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        if mapping.has_tp():
            self.register_buffer("first_id", torch.empty(1, dtype=torch.int32))
        if config.learned_positions and mapping.is_first_pp_rank():
            self.position_embedding = nn.Parameter(torch.empty(config.learned_positions, config.hidden_size))
        self.rope = nn.ModuleList(Rope(spec) for spec in config.ropes)
        for index, slopes in enumerate(config.slopes):
            self.register_buffer(f"alibi_{index}", torch.empty(len(slopes), dtype=torch.float32))
        self.layers = nn.ModuleDict({str(number): Layer(config, at, mapping) for at, number in enumerate(numbers)})
        if mapping.is_last_pp_rank():
            self.final_norm = Norm(config.hidden_size, config.final_norm)
            self.lm_head = Head(config, vocab_size, mapping)
        linears = {name: module for name, module in self.named_modules() if isinstance(module, Linear)}
        for name in linears.keys() & packed.keys():
            linears[name].pack(packed[name])
        if kv_scales is not None:
            for number in numbers:
                attention = self.layers[str(number)].attention
                attention.kv_scales, attention.kv_int8 = kv_scales[number], kv_int8

    def forward(
        self, token_ids: Tensor, positions: Tensor, logit_indices: Tensor, rope_lengths: Tensor | None = None
    ) -> Tensor | None:
        """int32 [T], int32 [T], int32 [N], int32 [T] where `config.rope_lengths` -> logits [N, vocab_size].

        A rank that is not the last of a pipeline sends the residual stream [T, hidden] to the next one.
        """
        config = self.config
        places = self.places(positions, rope_lengths)
        residual = None
        if self.mapping.is_first_pp_rank():
            x = self.embedded(token_ids, positions)
        else:
            x = op.recv(FLOATS.index(self.dtype), config.hidden_size)
        for layer in self.layers.values():
            x, residual = layer(x, residual, *places(layer))
        if not self.mapping.is_last_pp_rank():
            op.send(op.add(x, residual))
            return None
        return self.logits(op.gather(x, logit_indices), op.gather(residual, logit_indices))

    def places(self, positions: Tensor, rope_lengths: Tensor | None = None) -> Places:
        """int32 [T] twice -> what tells a layer the positions: its rotation and its slopes."""
        config = self.config
        rotations = {spec: rope(positions, rope_lengths) for spec, rope in zip(config.ropes, self.rope, strict=True)}
        slopes = {found: getattr(self, f"alibi_{index}") for index, found in enumerate(config.slopes)}

        def of_layer(layer: Layer) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
            attention = layer.spec.attention
            return rotations.get(attention.rope), slopes.get(attention.alibi)

        return of_layer

    def logits(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """[N, hidden] twice, or once all of the residual stream -> [N, vocab_size]."""
        config = self.config
        x, _ = self.final_norm(x, residual)
        logits = self.lm_head(x, self.embedding if config.tie_embeddings else None)
        if config.logit_scale != 1:
            logits = op.scale(logits, config.logit_scale)
        return op.soft_cap(logits, config.logit_soft_cap) if config.logit_soft_cap else logits

    def embedded(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """-> [T, hidden]; each rank of a tensor-parallel group looks up the ids that it has."""
        config = self.config
        if self.mapping.has_tp():
            x = op.all_reduce(op.embedding_shard(token_ids, self.embedding, self.first_id))
        else:
            x = op.embedding(token_ids, self.embedding)
        if config.embedding_scale != 1:
            x = op.scale(x, config.embedding_scale)
        return op.add(x, op.embedding(positions, self.position_embedding)) if config.learned_positions else x

    @classmethod
    def on_meta(
        cls,
        config: DecoderConfig,
        dtype: str,
        packed: Values[str, Packed] = {},  # noqa: B006
        kv_scales: KVScales | None = None,
        mapping: Mapping = _ALONE,
        kv_int8: bool = False,
    ) -> "Decoder":
        """The decoder on the meta device, its weights of this dtype where the config does not say otherwise."""
        with torch.device("meta"), _default_dtype(dtype):
            return cls(config, packed, kv_scales, mapping, kv_int8)

    def declared(self) -> dict[str, TensorType]:
        """Name and type of each weight that a checkpoint holds, module after module; of a packed one, its tensors."""
        found = {}
        for outer, module in self.named_modules():
            tensors = dict(module.named_parameters(outer, recurse=False))
            if isinstance(module, Linear):
                tensors |= dict(module.named_buffers(outer, recurse=False))
            found |= tensors
        return {
            name: TensorType(str(weight.dtype).removeprefix("torch."), tuple(weight.shape))  # type: ignore[arg-type]
            for name, weight in found.items()
        }

    def linears(self) -> dict[str, int]:
        """The products whose weight may be packed: name -> columns of the weight."""
        found = {name: module for name, module in self.named_modules() if isinstance(module, Linear)}
        return {name: linear.weight.shape[1] for name, linear in found.items() if linear.weight is not None}

    def constants(self) -> dict[str, Tensor]:
        """The weights that no checkpoint holds, by name: rotary frequencies, alibi slopes, a shard's first id."""
        values = {
            f"rope.{index}.{name}": numbers
            for index, rope in enumerate(self.rope)
            for name, numbers in rope.constants().items()
        }
        values |= {f"alibi_{index}": slopes for index, slopes in enumerate(self.config.slopes)}
        made = {name: torch.tensor(numbers, dtype=torch.float32, device="cpu") for name, numbers in values.items()}
        first = torch.tensor([self.mapping.tp_rank * self.config.vocab_size], dtype=torch.int32, device="cpu")
        return made | ({"first_id": first} if self.mapping.has_tp() else {})
