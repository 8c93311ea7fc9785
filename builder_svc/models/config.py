"""What a decoder is, as data: one spec a layer, so that `decoder.py` knows no family."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions, every scaling resolved to its frequencies.

    Attributes:
        inv_freq: [rotary_dim / 2] radians per position, of the first rotary_dim dimensions of a head.
        scale: factor on cosine and sine.
        interleaved: whether the pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention of one layer; `window` 0 is unlimited."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool = False
    out_bias: bool = False
    window: int = 0

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections, which are one matrix."""
        return (self.num_heads * self.head_dim, *2 * (self.num_kv_heads * self.head_dim,))


@dataclass(frozen=True)
class MlpSpec:
    """A gated feed-forward part: down(silu(gate) * up)."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: norm, attention, norm, feed-forward, each added to the residual stream."""

    attention: AttentionSpec
    mlp: MlpSpec


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    tie_embeddings: bool
    max_position_embeddings: int

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary specs, in order of first use; each is one table a step."""
        return tuple(dict.fromkeys(layer.attention.rope for layer in self.layers))
