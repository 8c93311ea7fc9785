"""THE decoder: a module over the operator set, traced on the meta device and never run as it stands."""

import torch
from torch import Tensor, nn

import engine.ops  # noqa: F401  (registers torch.ops.enginehouse)
from builder_svc.models.config import AttentionSpec, DecoderConfig, MlpSpec, RopeSpec

op = torch.ops.enginehouse


class Linear(nn.Module):
    """y = x W^T + b."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs]."""
        return op.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Self-attention; queries, keys and values are one product."""

    def __init__(self, spec: AttentionSpec, hidden_size: int, index: int) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.qkv = Linear(hidden_size, sum(spec.qkv_sizes), spec.qkv_bias)
        self.out = Linear(spec.num_heads * spec.head_dim, hidden_size, spec.out_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        spec = self.spec
        q, k, v = op.split(self.qkv(x), list(spec.qkv_sizes))
        q = op.rope(q, cos, sin, spec.head_dim, spec.rope.interleaved)
        k = op.rope(k, cos, sin, spec.head_dim, spec.rope.interleaved)
        return self.out(op.attention(q, k, v, self.index, spec.head_dim, spec.head_dim**-0.5, spec.window))


class Mlp(nn.Module):
    """The gated feed-forward part; gate and up are one product."""

    def __init__(self, spec: MlpSpec, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * spec.intermediate_size, spec.bias)
        self.down = Linear(spec.intermediate_size, hidden_size, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down(op.silu_mul(self.gate_up(x)))


class Norm(nn.Module):
    """Root mean square norm, of the sum with the residual stream where there is one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> (the norm, the residual stream)."""
        if residual is None:
            return op.rms_norm(x, self.weight, self.eps), x
        return op.add_rms_norm(x, residual, self.weight, self.eps)


class Rope(nn.Module):
    """Cosines and sines of a step, shared by all layers of one rotary spec."""

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self.scale = spec.scale
        self.register_buffer("inv_freq", torch.empty(len(spec.inv_freq), dtype=torch.float32))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[T] -> twice [T, rotary_dim / 2]."""
        return op.rope_table(positions, self.inv_freq, self.scale)


class Layer(nn.Module):
    """Norm, attention, norm, feed-forward."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        spec = config.layers[index]
        self.input_norm = Norm(config.hidden_size, config.norm_eps)
        self.attention = Attention(spec.attention, config.hidden_size, index)
        self.post_norm = Norm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(spec.mlp, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(this layer's addition, the residual stream without it)."""
        x, residual = self.input_norm(x, residual)
        x = self.attention(x, cos, sin)
        x, residual = self.post_norm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """token ids -> logits of the rows that are asked for.

    Build it under `torch.device("meta")` with the engine's default dtype: it is there to be traced.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.rope = nn.ModuleList(Rope(spec) for spec in config.ropes)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(len(config.layers)))
        self.final_norm = Norm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        """int32 [T], int32 [T], int32 [N] -> logits [N, vocab_size]."""
        tables = {spec: rope(positions) for spec, rope in zip(self.config.ropes, self.rope, strict=True)}
        x, residual = op.embedding(token_ids, self.embedding), None
        for spec, layer in zip(self.config.layers, self.layers, strict=True):
            x, residual = layer(x, residual, *tables[spec.attention.rope])
        x, residual = op.gather(x, logit_indices), op.gather(residual, logit_indices)
        x, _ = self.final_norm(x, residual)
        return self.lm_head(x) if self.lm_head else op.linear(x, self.embedding, None)

    def constants(self) -> dict[str, Tensor]:
        """The weights that no checkpoint holds, by name: rotary frequencies, float32."""
        return {
            f"rope.{index}.inv_freq": torch.tensor(spec.inv_freq, dtype=torch.float32, device="cpu")
            for index, spec in enumerate(self.config.ropes)
        }
