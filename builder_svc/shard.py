"""The part of a model that each rank of a mapping has: some of the layers, and rows or columns of each of their matrices.

Tensor parallelism as Megatron-LM has it (Shoeybi et al. 2019): the first product of attention and of the feed-forward is divided
by rows, the second by columns, so that ranks add their results up once after each. Embedding and head are divided by rows, too.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from builder_svc.mapping import Mapping as RankMapping
from builder_svc.models.config import AttentionSpec, DecoderConfig, ExpertsSpec, LayerSpec, MlpSpec
from builder_svc.models.packed import Packed
from engine.errors import InvalidArgument

Span = tuple[int, int]
"""From the first one on, up to before the second."""


@dataclass(frozen=True)
class Cut:
    """What a rank has of a weight.

    Attributes:
        rows: spans of the whole weight's rows, one after another; None for all of them.
        columns: a span of its columns; None for all of them.
        padding: rows of zeros behind them.
        zeros: zeros of the whole weight's shape instead: of what is added once, and another rank has.
    """

    rows: tuple[Span, ...] | None = None
    columns: Span | None = None
    padding: int = 0
    zeros: bool = False

    def taken(self, parts: Iterable[Tensor], shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The rank's weight, in parts one after another.

        Args:
            parts: of the whole weight, stacked along their rows (experts': one expert's behind the other's); spans ascend, or
                there is one part.
            shape: of the rank's weight.
        """
        at = 0
        for part in parts:
            if part.dim() == 1 < len(shape):
                part = part.view(-1, *shape[1:])
            if self.zeros:
                yield torch.zeros_like(part)
                continue
            if self.columns:
                part = part[:, slice(*self.columns)]
            for start, stop in self.rows or ((0, at + len(part)),):
                if max(start, at) < min(stop, at + len(part)):
                    yield part[max(start - at, 0) : stop - at]
            at += len(part)
        if self.padding:
            yield torch.zeros(self.padding, *shape[1:])

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Writes a rank's weight to its place in the whole one, from which `taken` has taken it."""
        if self.zeros:
            return
        if whole.dim() > 2:  # experts, one behind the other
            part, whole = part.flatten(0, -2), whole.flatten(0, -2)
        at = 0
        for start, stop in self.rows or ((0, len(whole)),):
            rows = whole[start:stop]
            (rows[:, slice(*self.columns)] if self.columns else rows).copy_(part[at : at + stop - start])
            at += stop - start


def part_of(config: DecoderConfig, mapping: RankMapping) -> DecoderConfig:
    """The decoder of one rank: its layers, with the heads and the intermediate sizes that it has, and its rows of the vocabulary.

    Raises what `check_shards` raises.
    """
    if mapping.world_size == 1:
        return config
    check_shards(config, mapping, {})
    layers = [_layer(config.layers[number], mapping) for number in mapping.pp_layers(len(config.layers))]
    return replace(config, vocab_size=_share(config.vocab_size, mapping.tp_size), layers=tuple(layers))


def cuts(
    config: DecoderConfig,
    mapping: RankMapping,
    packed: Mapping[str, Packed] = {},  # noqa: B006  (not changed)
) -> dict[str, Cut]:
    """What a rank has of the whole model's weights, by our names; of those that are not named here, it has the whole.

    Args:
        packed: a linear's name -> the form of its weight, where it is not dense.

    Raises:
        InvalidArgument: a border lies within what a scale of a packed weight is for.
    """
    if not mapping.has_tp():
        return {}
    each = _share(config.vocab_size, mapping.tp_size)
    start, stop = (min(each * rank, config.vocab_size) for rank in (mapping.tp_rank, mapping.tp_rank + 1))
    vocabulary = Cut(((start, stop),), padding=each - (stop - start))
    found = {"embedding": vocabulary}
    found |= _linear("lm_head", vocabulary, (config.vocab_size, config.hidden_size), mapping, packed)
    for number in mapping.pp_layers(len(config.layers)):
        layer = config.layers[number]
        for name, cut, size in _products(layer, config.hidden_size, mapping):
            found |= _linear(f"layers.{number}.{name}", cut, size, mapping, packed)
        found |= {f"layers.{number}.attention.{name}": cut for name, cut in _head_norms(layer.attention, mapping)}
        if isinstance(layer.mlp, ExpertsSpec):
            found |= {f"layers.{number}.mlp.{name}": cut for name, cut in _experts(layer.mlp, mapping).items()}
    return found


def check_shards(config: DecoderConfig, mapping: RankMapping, packed: Mapping[str, Packed]) -> None:
    """Whether a model can be divided so.

    Raises:
        InvalidArgument: heads, intermediate sizes, layers or the groups of packed weights do not divide; the message says which
            tp_size would fit.
    """
    mapping.pp_layers(len(config.layers))
    try:
        _check(config, mapping, packed)
    except InvalidArgument as error:
        most = max(layer.attention.num_heads for layer in config.layers)
        fitting = [tp for tp in range(1, most + 1) if _fits(config, RankMapping(tp, tp_size=tp), packed)]
        raise InvalidArgument(
            f"{error.message}; tp_size {' or '.join(map(str, fitting))} would fit", reason=error.reason
        ) from None


def _check(config: DecoderConfig, mapping: RankMapping, packed: Mapping[str, Packed]) -> None:
    _check_sizes(config, mapping.tp_size)
    for rank in range(mapping.tp_size):
        cuts(config, RankMapping(mapping.tp_size, rank, tp_size=mapping.tp_size), packed)


def _fits(config: DecoderConfig, mapping: RankMapping, packed: Mapping[str, Packed]) -> bool:
    try:
        _check(config, mapping, packed)
    except InvalidArgument:
        return False
    return True


def _check_sizes(config: DecoderConfig, tp_size: int) -> None:
    for layer in dict.fromkeys(config.layers):
        heads, kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads
        if heads % tp_size:
            raise _indivisible(f"{heads} attention heads", tp_size)
        if kv_heads % tp_size and tp_size % kv_heads:
            raise _indivisible(f"{kv_heads} heads of keys and values", tp_size)
        shared = layer.mlp.shared if isinstance(layer.mlp, ExpertsSpec) else None
        for size in (layer.mlp.intermediate_size, shared.intermediate_size if shared else 0):
            if size % tp_size:
                raise _indivisible(f"an intermediate size of {size}", tp_size)


def _indivisible(what: str, tp_size: int) -> InvalidArgument:
    return InvalidArgument(f"mapping: {what} cannot be divided among tp_size {tp_size}", reason="MAPPING_INVALID")


def _share(size: int, ranks: int) -> int:
    """Of each rank, where the last one's may be padded."""
    return -(-size // ranks)


def _heads(attention: AttentionSpec, mapping: RankMapping) -> tuple[Span, Span]:
    """The heads of queries, and of keys and values, that a rank has. Of the latter several may have the same one."""
    tp, rank = mapping.tp_size, mapping.tp_rank
    queries, each = attention.num_heads // tp, max(1, attention.num_kv_heads // tp)
    first = rank * attention.num_kv_heads // tp
    return (rank * queries, (rank + 1) * queries), (first, first + each)


def _layer(layer: LayerSpec, mapping: RankMapping) -> LayerSpec:
    queries, keys = _heads(layer.attention, mapping)
    attention = replace(
        layer.attention,
        num_heads=queries[1] - queries[0],
        num_kv_heads=keys[1] - keys[0],
        alibi=layer.attention.alibi[slice(*queries)],
    )
    mlp = replace(layer.mlp, intermediate_size=layer.mlp.intermediate_size // mapping.tp_size)
    if isinstance(mlp, ExpertsSpec) and mlp.shared:
        shared = replace(mlp.shared, intermediate_size=mlp.shared.intermediate_size // mapping.tp_size)
        mlp = replace(mlp, shared=shared)
    return replace(layer, attention=attention, mlp=mlp)


def _products(layer: LayerSpec, hidden: int, mapping: RankMapping) -> Iterator[tuple[str, Cut, tuple[int, int]]]:
    """A layer's linears: name, cut, and size of the whole matrix."""
    attention = layer.attention
    queries, keys = (_times(heads, attention.head_dim) for heads in _heads(attention, mapping))
    q_rows, k_rows, _ = attention.qkv_sizes
    yield (
        "attention.qkv",
        Cut((queries, _moved(keys, q_rows), _moved(keys, q_rows + k_rows))),
        (sum(attention.qkv_sizes), hidden),
    )
    yield "attention.out", Cut(columns=queries), (hidden, q_rows)
    mlp, name = (layer.mlp, "mlp") if isinstance(layer.mlp, MlpSpec) else (layer.mlp.shared, "mlp.shared")
    if mlp:
        size, own = mlp.intermediate_size, _own(mlp, mapping)
        if mlp.gated:
            yield f"{name}.gate_up", Cut((own, _moved(own, size))), (2 * size, hidden)
        else:
            yield f"{name}.up", Cut((own,)), (size, hidden)
        yield f"{name}.down", Cut(columns=own), (hidden, size)


def _experts(experts: ExpertsSpec, mapping: RankMapping) -> dict[str, Cut]:
    """Each rank has a part of every expert."""
    size, own = experts.intermediate_size, _own(experts, mapping)
    parts = tuple(_moved(own, part * size) for part in range(2 * experts.num_experts))  # gate, up, gate, up, ...
    return {"gate_up": Cut(parts), "down": Cut(columns=own)}


def _own(mlp: MlpSpec | ExpertsSpec, mapping: RankMapping) -> Span:
    each = mlp.intermediate_size // mapping.tp_size
    return mapping.tp_rank * each, (mapping.tp_rank + 1) * each


def _head_norms(attention: AttentionSpec, mapping: RankMapping) -> Iterator[tuple[str, Cut]]:
    """A norm of each head by itself has the rank's heads' weights; one of all heads has them all, as they are gathered."""
    queries, keys = _heads(attention, mapping)
    if attention.qk_norm == "heads":
        yield "q_norm.weight", Cut((queries,))
        yield "k_norm.weight", Cut((keys,))
    elif attention.qk_norm == "all" and attention.num_kv_heads < mapping.tp_size:
        ranks = (replace(mapping, rank=rank) for rank in mapping.tp_group)
        yield "k_norm.weight", Cut(tuple(_times(_heads(attention, rank)[1], attention.head_dim) for rank in ranks))


def _linear(
    name: str, cut: Cut, size: tuple[int, int], mapping: RankMapping, packed: Mapping[str, Packed]
) -> dict[str, Cut]:
    """The tensors of a linear. One that is cut by columns adds its bias on the first rank alone, since results are added up."""
    bias = Cut(zeros=mapping.tp_rank > 0) if cut.columns else cut
    found = {f"{name}.bias": bias} if bias != Cut() else {}
    if name not in packed:
        return found | {f"{name}.weight": cut}
    form = packed[name]
    for tensor, units in form.units.items():
        try:
            found[f"{name}.{tensor}"] = _in_units(cut, units, size)
        except ValueError as error:
            raise InvalidArgument(
                f"mapping: tp_size {mapping.tp_size} cuts the weight of {name}, [{size[0]}, {size[1]}] in {form}, {error}",
                reason="MAPPING_INVALID",
            ) from None
    return found


def _in_units(cut: Cut, units: tuple[int, int], size: tuple[int, int]) -> Cut:
    """The cut of a tensor each of whose elements is for so many rows and columns of the matrix, 0 for all."""
    rows = columns = None
    padding = 0
    if cut.rows and units[0]:
        rows = tuple(_unit_span(span, units[0], size[0], "row") for span in cut.rows)
        have = sum(stop - start for start, stop in cut.rows)
        padding = _share(have + cut.padding, units[0]) - _share(have, units[0])
    if cut.columns and units[1]:
        columns = _unit_span(cut.columns, units[1], size[1], "column")
    return Cut(rows, columns, padding)


def _unit_span(span: Span, unit: int, size: int, axis: str) -> Span:
    """Raises ValueError where it does not begin and end with one; the last one may be short."""
    start, stop = span
    for border in span:
        if border % unit and border != size:
            raise ValueError(f"at {axis} {border}, which is no multiple of {unit}")
    return start // unit, _share(stop, unit)


def _times(span: Span, size: int) -> Span:
    return span[0] * size, span[1] * size


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
