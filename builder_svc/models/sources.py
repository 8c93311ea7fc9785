"""Where the decoder's weights come from: what a family calls them, and how they lie in its checkpoints."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from builder_svc.models.config import AttentionSpec, DecoderConfig, ExpertsSpec, LayerSpec


@dataclass(frozen=True)
class Heads:
    """Rows of a fused projection that lie together by key head: its queries, its key, its value; head_dim rows each."""

    groups: int
    queries: int
    head_dim: int

    def sorted(self, x: Tensor) -> Tensor:
        """All queries, then all keys, then all values. [rows, ...] -> [rows, ...]."""
        parts = x.view(self.groups, self.queries + 2, self.head_dim, *x.shape[1:])
        queries, keys, values = parts.split([self.queries, 1, 1], 1)
        return torch.cat([part.reshape(-1, *x.shape[1:]) for part in (queries, keys, values)])


@dataclass(frozen=True)
class Source:
    """The checkpoint's tensors that form one weight of ours, stacked along their rows.

    Attributes:
        transposed: they are [in, out].
        heads: how their rows lie, if not queries, keys and values one after another.
        offset: added to every value.
        largest: the weight is the largest number of them all.
    """

    names: tuple[str, ...]
    transposed: bool = False
    heads: Heads | None = None
    offset: float = 0.0
    largest: bool = False


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the tensors of its experts. `{}` is an expert's number; a name without it holds all of them."""

    router: str = "mlp.gate"
    gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")
    down: tuple[str, ...] = ("mlp.experts.{}.down_proj.weight",)


# How transformers holds experts in memory, which a person may have saved: [E, 2n, hidden] and [E, hidden, n].
TOGETHER = ExpertNames("mlp.gate", ("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",))


@dataclass(frozen=True)
class Names:
    """What a family calls its modules, by default as LLaMA does. `{}` is a layer's, head's or expert's number.

    Attributes:
        prefix: of all but the head; checkpoints of a model without its head have none.
        head: or lm_head, as transformers has it in memory.
        transposed: its linears are [in, out].
        heads_together: its fused projection lies by key head (`Heads`).
    """

    prefix: str = "model."
    embedding: str = "embed_tokens"
    positions: str = ""
    layer: str = "layers.{}"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_out_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    experts: ExpertNames = ExpertNames()
    shared_gate_up: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    transposed: bool = False
    heads_together: bool = False

    def sources(self, config: DecoderConfig, tensors: Collection[str]) -> dict[str, Source]:
        """The source of each of the decoder's weights.

        Args:
            tensors: the checkpoint's names.
        """
        head = "lm_head" if "lm_head.weight" in tensors else self.head
        prefix = self.prefix if any(name.startswith(self.prefix) for name in tensors) else ""
        found = {
            "embedding": Source((f"{prefix}{self.embedding}.weight",)),
            **_norm("final_norm", prefix + self.final_norm, config.final_norm.bias, config.final_norm.offset),
        }
        if config.learned_positions:
            found["position_embedding"] = Source((f"{prefix}{self.positions}.weight",))
        if not config.tie_embeddings:
            found["lm_head.weight"] = Source((f"{head}.weight",))
        if config.head_bias:
            found["lm_head.bias"] = Source((f"{head}.bias",))
        for index, layer in enumerate(config.layers):
            inner = self._layer(layer, f"{prefix}{self.layer.format(index)}.", tensors)
            found |= {f"layers.{index}.{name}": source for name, source in inner.items()}
        return found

    def _layer(self, layer: LayerSpec, theirs: str, tensors: Collection[str]) -> dict[str, Source]:
        attention, mlp = layer.attention, layer.mlp
        found: dict[str, Source] = {}
        for name in ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"):
            if spec := getattr(layer, name):
                found |= _norm(name, theirs + getattr(self, name), spec.bias, spec.offset)
        heads = _heads(attention) if self.heads_together else None
        found |= self._linear("attention.qkv", theirs, self.qkv, attention.qkv_bias, heads)
        found |= self._linear("attention.out", theirs, (self.out,), attention.out_bias)
        if attention.qk_norm:
            counts = {"q_norm": attention.num_heads, "k_norm": attention.num_kv_heads}
            for name, count in counts.items():
                each = range(count if attention.qk_norm == "heads" else 1)
                parts = tuple(f"{theirs}{getattr(self, name).format(head)}.weight" for head in each)
                found[f"attention.{name}.weight"] = Source(parts, offset=attention.qk_norm_offset)
        if isinstance(mlp, ExpertsSpec):
            return found | self._experts(mlp, theirs, tensors)
        if mlp.gated:
            found |= self._linear("mlp.gate_up", theirs, self.gate_up, mlp.bias)
        else:
            found |= self._linear("mlp.up", theirs, (self.up,), mlp.bias)
        return found | self._linear("mlp.down", theirs, (self.down,), mlp.bias)

    def _experts(self, spec: ExpertsSpec, theirs: str, tensors: Collection[str]) -> dict[str, Source]:
        names = TOGETHER if theirs + TOGETHER.down[0] in tensors else self.experts
        found = self._linear("mlp.router", theirs, (names.router,), bias=False)
        for ours, parts in (("gate_up", names.gate_up), ("down", names.down)):
            each = (part.format(number) for number in range(spec.num_experts) for part in parts)
            found[f"mlp.{ours}"] = Source(tuple(dict.fromkeys(theirs + name for name in each)))
        if spec.shared:
            found |= self._linear("mlp.shared.gate_up", theirs, self.shared_gate_up, spec.shared.bias)
            found |= self._linear("mlp.shared.down", theirs, (self.shared_down,), spec.shared.bias)
            found |= self._linear("mlp.shared_gate", theirs, (self.shared_gate,), bias=False)
        return found

    def _linear(
        self, ours: str, theirs: str, parts: tuple[str, ...], bias: bool, heads: Heads | None = None
    ) -> dict[str, Source]:
        weights = tuple(f"{theirs}{part}.weight" for part in parts)
        found = {f"{ours}.weight": Source(weights, self.transposed, heads)}
        if bias:
            found[f"{ours}.bias"] = Source(tuple(f"{theirs}{part}.bias" for part in parts), heads=heads)
        return found


def _norm(ours: str, theirs: str, bias: bool, offset: float) -> dict[str, Source]:
    found = {f"{ours}.weight": Source((f"{theirs}.weight",), offset=offset)}
    return found | ({f"{ours}.bias": Source((f"{theirs}.bias",))} if bias else {})


def _heads(attention: AttentionSpec) -> Heads:
    groups = attention.num_kv_heads
    return Heads(groups, attention.num_heads // groups, attention.head_dim)
