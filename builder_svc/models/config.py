"""What a decoder is, as data: one spec a layer, so that `decoder.py` knows no family."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """A norm over the hidden dimension.

    Attributes:
        kind: "rms" (root mean square) or "layer" (mean and standard deviation).
        bias: of a layer norm.
        offset: added to the weight that the checkpoint holds; such a weight stays in float32.
    """

    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class LongRope:
    """LongRoPE: other frequencies for sequences of more than `original` tokens."""

    inv_freq: tuple[float, ...]
    original: int


@dataclass(frozen=True)
class DynamicRope:
    """Dynamic NTK: the base grows with sequences of more than `original` tokens."""

    theta: float
    factor: float
    original: int


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions, every scaling that does not depend on a sequence resolved to its frequencies.

    Attributes:
        inv_freq: [rotary_dim / 2] radians per position, of the first rotary_dim dimensions of a head.
        scale: factor on cosine and sine.
        interleaved: whether the pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        by_length: what long sequences do to the frequencies.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    by_length: LongRope | DynamicRope | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention of one layer.

    Attributes:
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        rope: None where positions are told in another way, or not at all.
        alibi: a slope for each head, empty without.
        qk_norm: of queries and keys before rotation: "head" is rms_norm of each head with one weight, "heads" layer_norm of each
            head with a weight of its own, "all" rms_norm over all heads together.
        window: 0 is unlimited.
        soft_cap: 0 is none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    window: int = 0
    scale: float | None = None
    soft_cap: float = 0.0
    alibi: tuple[float, ...] = ()
    qk_norm: Literal["", "head", "heads", "all"] = ""
    qk_norm_offset: float = 0.0

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections, which are one matrix."""
        return (self.num_heads * self.head_dim, *2 * (self.num_kv_heads * self.head_dim,))


Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class MlpSpec:
    """A feed-forward part: down(act(gate) * up), or down(act(up)) if it is not gated (which silu is not there for)."""

    intermediate_size: int
    bias: bool = False
    activation: Activation = "silu"
    gated: bool = True


@dataclass(frozen=True)
class ExpertsSpec:
    """Gated feed-forward parts (silu) of which a router chooses top_k a token.

    Attributes:
        normalize: whether the chosen ones' weights sum to one.
        shared: one that every token goes through, weighted by a gate of its own.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    shared: MlpSpec | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention and feed-forward, each added to the residual stream.

    Attributes:
        attention_norm, mlp_norm: of the stream, before each part. Without `mlp_norm`, a parallel layer shares the other one.
        attention_out_norm, mlp_out_norm: of each part's result, before it is added.
        parallel: both parts read the same stream.
        residual_scale: factor on each part's result.
    """

    attention: AttentionSpec
    mlp: MlpSpec | ExpertsSpec
    attention_norm: NormSpec | None
    mlp_norm: NormSpec | None
    attention_out_norm: NormSpec | None = None
    mlp_out_norm: NormSpec | None = None
    parallel: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        learned_positions: rows of the table of position embeddings; 0 is none.
        embedding_scale, logit_scale: factors on the embeddings and on the logits.
        logit_soft_cap: 0 is none.
        max_position_embeddings: the longest sequence.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tie_embeddings: bool
    max_position_embeddings: int
    head_bias: bool = False
    learned_positions: int = 0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary specs, in order of first use; each is one table a step."""
        return tuple(dict.fromkeys(layer.attention.rope for layer in self.layers if layer.attention.rope))

    @property
    def slopes(self) -> tuple[tuple[float, ...], ...]:
        """The distinct alibi slopes, in order of first use."""
        return tuple(dict.fromkeys(layer.attention.alibi for layer in self.layers if layer.attention.alibi))

    @property
    def rope_lengths(self) -> bool:
        """Whether rotary frequencies depend on how long a sequence is."""
        return any(rope.by_length for rope in self.ropes)
