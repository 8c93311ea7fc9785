"""Where linears read: those that share an input share its scale, and what stands before them can take it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from builder_svc.models.config import LayerSpec, MlpSpec


@dataclass(frozen=True)
class Rows:
    """Rows of a linear, each of which makes an input of the next one; with `shared` heads of queries to one of keys and values,
    each makes as many inputs: row h * head_dim + d those of all heads h * shared ... h * shared + shared - 1.
    """

    linear: str
    start: int
    count: int
    shared: int = 1
    head_dim: int = 1

    def spread(self, of_rows: Tensor) -> Tensor:
        """[count] -> [count * shared], an entry for each input."""
        heads = of_rows.view(-1, 1, self.head_dim)
        return heads.expand(-1, self.shared, -1).reshape(-1)

    def gathered(self, of_inputs: Tensor) -> Tensor:
        """[count * shared] -> [shared, count], the entries that belong to each row."""
        return of_inputs.view(-1, self.shared, self.head_dim).transpose(0, 1).reshape(self.shared, -1)


@dataclass(frozen=True)
class Site:
    """Linears that read one input, by their names in the layer.

    Attributes:
        taker: what can be divided by a scale of the input's channels: a norm's name, or rows of a linear; None where nothing can.
    """

    linears: tuple[str, ...]
    taker: str | Rows | None

    def fold(self, tensors: dict[str, Tensor], scale: Tensor, kept: torch.dtype) -> Tensor:
        """Divides the taker by the scale and multiplies the columns of all linears; the scale that it has come to.

        A norm's weight is stored in `kept`: the linears take what its rounding leaves, so that nothing is lost.

        Args:
            tensors: the layer's, by name, float32; changed.
            scale: of each input, float32 [inputs].
        """
        if isinstance(self.taker, Rows):
            rows = self.taker
            of_rows = rows.gathered(scale)[0]
            span = slice(rows.start, rows.start + rows.count)
            for name in (f"{rows.linear}.weight", f"{rows.linear}.bias"):
                if name in tensors:
                    divisor = of_rows[:, None] if tensors[name].dim() == 2 else of_rows
                    tensors[name] = tensors[name].clone()
                    tensors[name][span] /= divisor
        elif self.taker is not None:
            weight = tensors[f"{self.taker}.weight"]
            divided = (weight / scale).to(kept).float()
            scale = torch.where(divided != 0, weight / divided, scale)
            tensors[f"{self.taker}.weight"] = divided
            if f"{self.taker}.bias" in tensors:
                tensors[f"{self.taker}.bias"] = tensors[f"{self.taker}.bias"] / scale
        for linear in self.linears:
            tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * scale
        return scale


def layer_sites(layer: LayerSpec) -> Iterator[Site]:
    """A layer's places where linears read, in the order in which they are computed. Experts' own products are in none."""
    attention, mlp = layer.attention, layer.mlp
    norm = "attention_norm" if layer.attention_norm else None
    heads, groups = attention.num_heads, attention.num_kv_heads
    inner = ()
    if isinstance(mlp, MlpSpec):
        inner = ("mlp.gate_up" if mlp.gated else "mlp.up",)
    together = layer.parallel and layer.mlp_norm is None
    yield Site(("attention.qkv", *(inner if together else ())), norm if inner or not together else None)
    queries, keys, values = attention.qkv_sizes
    yield Site(("attention.out",), Rows("attention.qkv", queries + keys, values, heads // groups, attention.head_dim))
    if isinstance(mlp, MlpSpec):
        if not together:
            yield Site(inner, "mlp_norm" if layer.mlp_norm else None)
        yield _down("mlp", mlp)
    elif mlp.shared:
        # Experts and router read the same norm, whose scale would have to go into all of them: none is taken.
        yield Site(("mlp.shared.gate_up" if mlp.shared.gated else "mlp.shared.up",), None)
        yield _down("mlp.shared", mlp.shared)


def _down(name: str, mlp: MlpSpec) -> Site:
    size = mlp.intermediate_size
    return Site((f"{name}.down",), Rows(f"{name}.gate_up", size, size) if mlp.gated else None)


HEAD = Site(("lm_head",), "final_norm")
"""Of a head that is not tied to the embedding."""


def by_linear(sites: list[Site]) -> Mapping[str, Site]:
    """A linear's name -> its site."""
    return {linear: site for site in sites for linear in site.linears}
