"""Attention and its caches: padded, where every row of a step has a slot of its own, or packed, where rows follow each other."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from builder_svc.lower.tensorrt.lowered import BATCH, BORDERS, LOGITS, SEQ, TOKENS, Port
from builder_svc.lower.tensorrt.net import ITensor, Net, Weight
from engine.program import KVCache, Program


class AttentionIO(ABC):
    """How tokens come in, and how attention is made of them.

    Attributes:
        ports: the network's inputs, but for the caches.
        cache_ports: the caches, as `attend` makes them. aliases: what they are called when the step's tokens are in them.
    """

    def __init__(
        self, program: Program, capacity: int, tokens: tuple[str, ...], borders: tuple[Port, ...] = ()
    ) -> None:
        """`capacity`: tokens of a slot. `tokens`: dimensions of the program's inputs. `borders`: a further port."""
        self._caches, self._capacity, self._names = program.caches, capacity, tuple(program.inputs)
        of_tokens = [Port(name, "int32", tokens) for name in self._names if name != "logit_indices"]
        of_rows = [Port(name, "int32", (BATCH,)) for name in ("write_index", "kv_lengths")]
        self.ports = (*of_tokens, *of_rows, *borders, Port("logit_indices", "int32", (LOGITS,)))
        self.cache_ports: list[Port] = []
        self.aliases: dict[str, str] = {}
        self._inputs: dict[str, ITensor] = {}

    def inputs(self, net: Net) -> dict[str, ITensor]:
        """Makes the ports; the program's inputs by name."""
        self._inputs = {port.name: net.input(port.name, torch.int32, port.shape) for port in self.ports}
        return {name: self._inputs[name] for name in self._names}

    @abstractmethod
    def attend(
        self,
        net: Net,
        q: ITensor,
        k: ITensor,
        v: ITensor,
        alibi: Weight | None = None,
        *,
        cache: int,
        head_dim: int,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
    ) -> ITensor:
        """`engine.ops.attention` of [num_tokens, heads * D]; the caches are written."""

    def _update(self, net: Net, name: str, spec: KVCache, new: ITensor, lengths: ITensor | None) -> ITensor:
        """The cache [batch, G, capacity, D] with the step's keys or values in it; input and output share their memory."""
        dtype = getattr(torch, spec.dtype)
        shape = (BATCH, spec.num_kv_heads, self._capacity, spec.head_dim)
        before = net.input(name, dtype, shape)
        layer = net.network.add_kv_cache_update(before, new, self._inputs["write_index"], net.trt.KVCacheMode.LINEAR)
        if layer is not None and lengths is not None:
            layer.update_form = net.trt.AttentionIOForm.PACKED_NHD
            layer.update_lengths = lengths
        after = net.out(layer)
        net.output(f"{name}.new", after)
        self.cache_ports.append(Port(name, spec.dtype, shape))
        self.aliases[f"{name}.new"] = name
        return after

    def _scaled(self, net: Net, q: ITensor, scale: float) -> ITensor:
        """The layer has no scale."""
        return q if scale == 1 else net.multiply(q, net.number(scale, q))


class Padded(AttentionIO):
    """Tokens [batch, seq]: row i is slot i of the caches, its tokens stand at write_index[i] and behind it.

    kv_lengths is write_index + seq, also for rows of fewer tokens: the query at place t sees kv_lengths - seq + t + 1 keys. What
    a row has behind its tokens is written to the cache, too, unseen, and overwritten by those that follow.
    """

    def __init__(self, program: Program, capacity: int) -> None:
        super().__init__(program, capacity, (BATCH, SEQ))
        self._masks: dict[Any, ITensor] = {}

    def inputs(self, net: Net) -> dict[str, ITensor]:
        ports = super().inputs(net)
        net.set_extent(TOKENS, net.multiply(net.extent(BATCH), net.extent(SEQ)))
        return {name: net.reshape(port, (-1,)) if len(port.shape) == 2 else port for name, port in ports.items()}

    def attend(
        self,
        net: Net,
        q: ITensor,
        k: ITensor,
        v: ITensor,
        alibi: Weight | None = None,
        *,
        cache: int,
        head_dim: int,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
    ) -> ITensor:
        def heads(x: ITensor) -> ITensor:
            """[tokens, heads * D] -> [batch, heads, seq, D]."""
            return net.transpose(net.reshape(x, (BATCH, SEQ, x.shape[1] // head_dim, head_dim)), (0, 2, 1, 3))

        query, spec = self._scaled(net, heads(q), scale), self._caches[cache]
        keys, values = (
            self._update(net, f"{kind}_cache.{cache}", spec, heads(new), None) for kind, new in (("k", k), ("v", v))
        )
        if soft_cap:
            attended = self._by_steps(net, query, keys, values, self._mask(net, alibi, window, torch.float32), soft_cap)
        else:
            attended = self._by_layer(net, query, keys, values, alibi, window)
        return net.reshape(net.transpose(attended, (0, 2, 1, 3)), (-1, q.shape[1]))

    def _by_layer(
        self, net: Net, query: ITensor, keys: ITensor, values: ITensor, alibi: Weight | None, window: int
    ) -> ITensor:
        trt, dtype = net.trt, net.torch_dtypes[query.dtype]
        masked = alibi is not None or window > 0
        causal = trt.CausalMaskKind.NONE if masked else trt.CausalMaskKind.LOWER_RIGHT
        attention = net.network.add_attention_v2(query, keys, values, trt.AttentionNormalizationOp.SOFTMAX, causal)
        result = net.out(attention)
        if masked:
            attention.mask = self._mask(net, alibi, window, dtype)
        attention.key_value_lengths = self._inputs["kv_lengths"]
        _finish(net, attention)
        return result

    def _by_steps(
        self, net: Net, query: ITensor, keys: ITensor, values: ITensor, mask: ITensor, soft_cap: float
    ) -> ITensor:
        """Products, cap and softmax (float32) as layers of their own: the attention layer caps no scores."""
        dtype = net.torch_dtypes[query.dtype]
        (heads, dim), groups = (query.shape[1], query.shape[3]), keys.shape[1]
        grouped = net.reshape(query, (BATCH, groups, heads // groups, SEQ, dim))
        keys, values = (net.reshape(each, (BATCH, groups, 1, self._capacity, dim)) for each in (keys, values))
        scores = net.cast(net.matmul(grouped, keys, transposed=True), torch.float32)
        capped = net.activation(net.divide(scores, net.number(soft_cap, scores)), "TANH")
        scores = net.multiply(capped, net.number(soft_cap, capped))
        hidden = net.reshape(mask, (BATCH, 1, 1, SEQ, self._capacity))
        scores = net.select(hidden, scores, net.number(float("-inf"), scores))
        softmax = net.network.add_softmax(scores)
        weights = net.out(softmax)
        softmax.axes = 1 << 4
        return net.reshape(net.matmul(net.cast(weights, dtype), values), (BATCH, heads, SEQ, dim))

    def _mask(self, net: Net, alibi: Weight | None, window: int, dtype: torch.dtype) -> ITensor:
        """Which keys a query sees, bool [batch, 1, seq, capacity]; with alibi what scores get, [batch, heads, seq, capacity]."""
        key = (alibi and alibi.name, window, dtype)
        if key in self._masks:
            return self._masks[key]
        at = net.reshape(self._inputs["positions"], (BATCH, 1, SEQ, 1))
        places = net.constant("places", torch.arange(self._capacity, dtype=torch.int32)[None, None, None])
        behind = net.elementwise(places, at, "SUB")  # 0 is the query's own place
        seen = net.elementwise(behind, net.number(1, behind), "LESS")
        if window:
            near = net.elementwise(behind, net.number(-window, behind), "GREATER")
            seen = net.elementwise(seen, near, "AND")
        if alibi is not None:
            slopes = net.constant(alibi.name, alibi.tensor.float().view(1, -1, 1, 1))
            bias = net.multiply(slopes, net.cast(behind, torch.float32))
            seen = net.cast(net.select(seen, bias, net.number(float("-inf"), bias)), dtype)
        self._masks[key] = seen
        return seen


class Packed(AttentionIO):
    """Tokens [num_tokens], one row after another: row i, in slot i of the caches, from query_lengths[i] to the next."""

    def __init__(self, program: Program, capacity: int) -> None:
        super().__init__(program, capacity, (TOKENS,), (Port("query_lengths", "int32", (BORDERS,)),))

    def attend(
        self,
        net: Net,
        q: ITensor,
        k: ITensor,
        v: ITensor,
        alibi: Weight | None = None,  # noqa: ARG002  (a table sends those that need a mask to Padded)
        *,
        cache: int,
        head_dim: int,
        scale: float,
        window: int,  # noqa: ARG002
        soft_cap: float = 0.0,  # noqa: ARG002
    ) -> ITensor:
        trt, spec, borders = net.trt, self._caches[cache], self._inputs["query_lengths"]

        def heads(x: ITensor) -> ITensor:
            return net.reshape(x, (TOKENS, x.shape[1] // head_dim, head_dim))

        query = self._scaled(net, heads(q), scale)
        keys, values = (
            self._update(net, f"{kind}_cache.{cache}", spec, heads(new), borders) for kind, new in (("k", k), ("v", v))
        )
        attention = net.network.add_attention_v2(
            query, keys, values, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.LOWER_RIGHT
        )
        result = net.out(attention)
        attention.query_form = trt.AttentionIOForm.PACKED_NHD
        attention.query_lengths = borders
        attention.key_value_lengths = self._inputs["kv_lengths"]
        _finish(net, attention)
        return net.reshape(result, (TOKENS, q.shape[1]))


def _finish(net: Net, attention: Any) -> None:
    """Where TensorRT has no kernel for the shape (float32, two heads, 264 dimensions), it is computed step by step."""
    attention.decomposable = True
    attention.name = net.where
