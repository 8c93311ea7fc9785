"""One handler an operator of `engine/opset.py`: what it means in layers of TensorRT. Values are [num_tokens or num_logits, n]."""

import json

import torch

from builder_svc.lower.tensorrt.lowered import TOKENS
from builder_svc.lower.tensorrt.net import ITensor, Net, Weight


def embedding(net: Net, token_ids: ITensor, weight: Weight) -> ITensor:
    """Rows of a table."""
    return net.gather(net.weight(weight), token_ids)


def embedding_shard(net: Net, token_ids: ITensor, weight: Weight, first: Weight) -> ITensor:
    """Rows of a part of a table; zeros for ids of other parts."""
    rows = net.elementwise(token_ids, net.number(int(first.tensor), token_ids), "SUB")
    above = net.elementwise(rows, net.number(-1, rows), "GREATER")
    below = net.elementwise(rows, net.number(len(weight.tensor), rows), "LESS")
    there = net.elementwise(above, below, "AND")
    found = net.gather(net.weight(weight), net.select(there, rows, net.number(0, rows)))
    return net.select(net.reshape(there, (TOKENS, 1)), found, net.number(0.0, found))


def _rms(net: Net, x: ITensor, weight: Weight, eps: float, axis: int) -> ITensor:
    """There is no layer for it: `add_normalization_v2` subtracts the mean. The statistic is float32."""
    wide = net.cast(x, torch.float32)
    mean = net.reduce(net.multiply(wide, wide), "AVG", axis)
    inverse = net.unary(net.unary(net.add(mean, net.number(eps, mean)), "SQRT"), "RECIP")
    normal = net.cast(net.multiply(wide, inverse), weight.tensor.dtype)
    scaled = net.multiply(normal, net.weight(weight, (*(1,) * axis, len(weight.tensor))))
    return net.cast(scaled, net.torch_dtypes[x.dtype])


def rms_norm(net: Net, x: ITensor, weight: Weight, *, eps: float) -> ITensor:
    """Each row over its root mean square."""
    return _rms(net, x, weight, eps, 1)


def add_rms_norm(net: Net, x: ITensor, residual: ITensor, weight: Weight, *, eps: float) -> tuple[ITensor, ITensor]:
    """rms_norm of a sum, and the sum."""
    total = net.add(x, residual)
    return rms_norm(net, total, weight, eps=eps), total


def head_rms_norm(net: Net, x: ITensor, weight: Weight, *, eps: float) -> ITensor:
    """rms_norm of each head."""
    columns, dim = x.shape[1], len(weight.tensor)
    heads = net.reshape(x, (TOKENS, columns // dim, dim))
    return net.reshape(_rms(net, heads, weight, eps, 2), (TOKENS, columns))


def _normalized(net: Net, x: ITensor, weight: ITensor, bias: ITensor, eps: float) -> ITensor:
    """Along the last axis, in float32."""
    axis = len(x.shape) - 1
    layer = net.network.add_normalization_v2(net.cast(x, torch.float32), weight, bias, 1 << axis)
    normal = net.out(layer)
    layer.epsilon = eps
    return normal


def layer_norm(net: Net, x: ITensor, weight: Weight, bias: Weight | None = None, *, eps: float) -> ITensor:
    """Each row less its mean, over its standard deviation."""
    size = len(weight.tensor)
    scale = net.constant(weight.name, weight.tensor.float(), (1, size))
    shift = torch.zeros(size) if bias is None else bias.tensor.float()
    shifts = net.constant(f"{size} zeros" if bias is None else bias.name, shift, (1, size))
    return net.cast(_normalized(net, x, scale, shifts, eps), net.torch_dtypes[x.dtype])


def add_layer_norm(
    net: Net, x: ITensor, residual: ITensor, weight: Weight, bias: Weight | None = None, *, eps: float
) -> tuple[ITensor, ITensor]:
    """layer_norm of a sum, and the sum."""
    total = net.add(x, residual)
    return layer_norm(net, total, weight, bias, eps=eps), total


def head_layer_norm(net: Net, x: ITensor, weight: Weight, *, eps: float) -> ITensor:
    """layer_norm of each head, times a weight of its own."""
    heads, dim = weight.tensor.shape
    dtype = net.torch_dtypes[x.dtype]
    one, none = (net.constant(f"{dim} {value}s", torch.full((1, 1, dim), value)) for value in (1.0, 0.0))
    normal = net.cast(_normalized(net, net.reshape(x, (TOKENS, heads, dim)), one, none, eps), dtype)
    scaled = net.multiply(normal, net.weight(weight, (1, heads, dim)))
    return net.reshape(scaled, (TOKENS, heads * dim))


def _halves(net: Net, x: ITensor, rows: tuple[int | str, ...] = (TOKENS,)) -> tuple[ITensor, ITensor]:
    half = x.shape[-1] // 2
    return net.columns(x, 0, half, rows), net.columns(x, half, half, rows)


def silu_mul(net: Net, gate_up: ITensor, rows: tuple[int | str, ...] = (TOKENS,)) -> ITensor:
    """silu(gate) * up."""
    gate, up = _halves(net, gate_up, rows)
    return net.multiply(net.multiply(gate, net.activation(gate, "SIGMOID")), up)


def gelu(net: Net, x: ITensor, *, tanh: bool) -> ITensor:
    """x * Phi(x), or its approximation."""
    return net.activation(x, "GELU_TANH" if tanh else "GELU_ERF")


def gelu_mul(net: Net, gate_up: ITensor, *, tanh: bool) -> ITensor:
    """gelu(gate) * up."""
    gate, up = _halves(net, gate_up)
    return net.multiply(gelu(net, gate, tanh=tanh), up)


def sigmoid_mul(net: Net, x: ITensor, gate: ITensor) -> ITensor:
    """sigmoid(gate) * x, with one gate a row."""
    return net.multiply(x, net.activation(gate, "SIGMOID"))


def experts(
    net: Net, x: ITensor, router_logits: ITensor, gate_up: Weight, down: Weight, *, top_k: int, normalize: bool
) -> ITensor:
    """Every expert computes every token, and those that the router has not chosen count 0.

    TensorRT's own layer for experts has no kernels for weights of 16 bits. Weights are read once a step either way, by all
    but the smallest; products grow by experts / top_k.
    """
    trt, dtype, number = net.trt, net.torch_dtypes[x.dtype], gate_up.tensor.shape[0]
    softmax = net.network.add_softmax(net.cast(router_logits, torch.float32))
    shares = net.out(softmax)
    softmax.axes = 1 << 1
    best = net.network.add_topk(shares, trt.TopKOperation.MAX, top_k, 1 << 1)
    weights, chosen = net.out(best, 0), net.out(best, 1)
    if normalize:
        weights = net.divide(weights, net.reduce(weights, "SUM", 1))
    numbers = net.constant(f"{number} experts", torch.arange(number, dtype=torch.int32)[None, None])
    one = net.elementwise(net.reshape(chosen, (TOKENS, top_k, 1)), numbers, "EQUAL")
    weights = net.reshape(weights, (TOKENS, top_k, 1))
    of_all = net.reduce(net.select(one, weights, net.number(0.0, weights)), "SUM", 1, keep=False)
    counts = net.reshape(net.transpose(net.cast(of_all, dtype), (1, 0)), (number, TOKENS, 1))
    inner = net.matmul(net.reshape(x, (1, TOKENS, x.shape[1])), net.weight(gate_up), transposed=True)
    made = net.matmul(silu_mul(net, inner, (number, TOKENS)), net.weight(down), transposed=True)
    return net.reduce(net.multiply(made, counts), "SUM", 0, keep=False)


def add(net: Net, x: ITensor, y: ITensor) -> ITensor:
    """x + y."""
    return net.add(x, y)


def scale(net: Net, x: ITensor, *, factor: float) -> ITensor:
    """x * factor."""
    return net.multiply(x, net.number(factor, x))


def soft_cap(net: Net, x: ITensor, *, cap: float) -> ITensor:
    """cap * tanh(x / cap)."""
    return net.multiply(net.activation(net.divide(x, net.number(cap, x)), "TANH"), net.number(cap, x))


def split(net: Net, x: ITensor, *, sizes: list[int]) -> tuple[ITensor, ...]:
    """Pieces of the columns."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return tuple(net.columns(x, start, size, (TOKENS,)) for start, size in zip(starts, sizes, strict=True))


def gather(net: Net, x: ITensor, indices: ITensor) -> ITensor:
    """Rows, of last tokens mostly."""
    return net.gather(x, indices)


def _collective(net: Net, x: ITensor, operation: str, reduce: str, ranks: int) -> ITensor:
    """The layer's attributes cannot be read back: its metadata has them, for whoever evaluates the network."""
    kind, by = getattr(net.trt.CollectiveOperation, operation), getattr(net.trt.ReduceOperation, reduce)
    layer = net.network.add_dist_collective(x, kind, by, -1, list(range(ranks)))
    result = net.out(layer)
    layer.num_ranks = ranks
    layer.metadata = json.dumps({"operation": operation, "reduce": reduce, "ranks": ranks})
    return result


def all_reduce(net: Net, x: ITensor, *, ranks: int) -> ITensor:
    """The sum over the ranks."""
    return _collective(net, x, "ALL_REDUCE", "SUM", ranks)


def all_gather(net: Net, x: ITensor, *, ranks: int) -> ITensor:
    """[N, n] of each rank, side by side: the layer puts them one behind another."""
    columns = x.shape[1]
    stacked = net.reshape(_collective(net, x, "ALL_GATHER", "NONE", ranks), (ranks, -1, columns))
    return net.reshape(net.transpose(stacked, (1, 0, 2)), (-1, ranks * columns))
