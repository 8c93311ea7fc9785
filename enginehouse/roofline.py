"""How fast a model can be on a device, by the roofline (Williams, Waterman and Patterson, CACM 52(4), 2009).

A step is its parts one after another: the matrix products of the layers, attention, and the logits' product. Each part
takes the longer of the two times

    reading    bytes / (bandwidth x its efficiency)
    computing  operations / (throughput of the dtype x its efficiency)

With T tokens in a step, R rows of logits, and sequence i that has t_i tokens in the step and c_i in its context:

    layers     reads their weights once;                2 x parameters x T operations
    head       reads its matrix once;                   2 x parameters x R operations
    attention  reads kv_bytes x sum(c_i);               4 x heads x head_dim x (pairs of a query and a key) operations

Of a layer with E experts, a token computes with the k that its router chooses. T tokens that choose at random, each on its own,
reach E x (1 - (1 - k / E)^T) of them on average; only these are read. Tokens of one text choose alike, and then it is fewer.

The embedding is a table of which T rows are read: that, norms, activations and the writing of the KV cache are some tenths
of a percent and are left out, as are launches and the scheduler's work. So this is an upper bound of what an executor can
do, and the efficiencies say how near to it good kernels come.

Of an engine of several ranks each has a shape of its own, and a pipeline's places (`decode`) work one after
another. What ranks send to each other is counted in bytes; the time that takes is left out.

No torch and no click here: numbers in, numbers out. Bytes, bytes/s, operations/s and seconds throughout.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.errors import FailedPrecondition, InvalidArgument

BLOCK_SIZE = 16  # tokens in a KV block, the unit in which an executor gives memory to a sequence
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
QUANTIZED = ("fp8", "int8")


@dataclass(frozen=True)
class Attention:
    """Layers whose attention is alike; `window` 0 is unlimited."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True)
class Experts:
    """Layers whose experts are alike: `parameters` in each of `num_experts`, of which a token goes through `top_k`."""

    layers: int
    num_experts: int
    top_k: int
    parameters: int

    def idle(self, tokens: int) -> float:
        """Parameters of all these layers that a step of so many tokens is expected not to reach."""
        return self.layers * self.num_experts * self.parameters * (1 - self.top_k / self.num_experts) ** tokens


@dataclass(frozen=True)
class Shape:
    """What matters of a model here.

    Attributes:
        dtype: of activations, and of weights that are not quantized.
        layer_dtype: what the layers' matrices are multiplied in, which is their dtype unless an engine has them packed.
        weight_bytes: dtype -> bytes of all weights that have it.
        layer_parameters, layer_bytes: of the matrices in the layers, all experts included.
        head_parameters, head_bytes: of the matrix that makes logits, which may be the embedding.
        replicated_bytes: of what every rank keeps whole: norms, biases, rotary frequencies.
        attention, experts: of the layers, by kind.
        kv_dtype: of the KV cache.
        max_seq_len: tokens in a sequence at most.
        max_num_tokens: tokens in a step at most; longer prompts take several.
        max_batch_size: sequences in a step at most; None for a checkpoint, whose build decides.
        dummy_weights: whether an engine has them: they are in no file, and in memory as large as real ones.
        sent_per_token, sent_per_row: bytes that a rank sends to others, for each token of a step and each row of logits.
        vocab_size: columns of the logits; 0 for a rank that makes none.
    """

    name: str
    dtype: str
    layer_dtype: str
    weight_bytes: Mapping[str, int]
    layer_parameters: int
    layer_bytes: int
    head_parameters: int
    head_bytes: int
    replicated_bytes: int
    attention: tuple[Attention, ...]
    kv_dtype: str
    num_parameters: int
    max_seq_len: int
    max_num_tokens: int
    max_batch_size: int | None = None
    dummy_weights: bool = False
    experts: tuple[Experts, ...] = ()
    sent_per_token: float = 0
    sent_per_row: float = 0
    vocab_size: int = 0

    @property
    def layers(self) -> int:
        """How many there are."""
        return sum(kind.layers for kind in self.attention)

    @property
    def active_parameters(self) -> int:
        """All parameters but those of the experts that a token does not go through."""
        return self.num_parameters - self._unused

    @property
    def _unused(self) -> int:
        """Parameters of the experts that one token does not go through."""
        return sum(kind.layers * (kind.num_experts - kind.top_k) * kind.parameters for kind in self.experts)

    def layer_operations(self, tokens: int) -> float:
        """Of the products with the layers' matrices, in a step of so many tokens."""
        return 2.0 * (self.layer_parameters - self._unused) * tokens

    def layer_read(self, tokens: int) -> float:
        """Bytes of the layers' matrices that a step of so many tokens is expected to read."""
        idle = sum(kind.idle(tokens) for kind in self.experts)
        return self.layer_bytes * (1 - idle / self.layer_parameters)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weight_bytes.values())

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache of one sequence, over all ranks: keys and values of each layer.

        Windows do not shrink it: the executor keeps what it has computed.
        """
        per_token = sum(2 * a.layers * a.num_kv_heads * a.head_dim for a in self.attention) * ITEM_SIZE[self.kv_dtype]
        return per_token * tokens

    def quantized(self, dtype: str) -> "Shape":
        """The same model with the layers' matrices in fp8 or int8, one byte a weight; scales are left out.

        Embedding, head, norms and biases stay as they are, which is what usual recipes do.

        Raises:
            InvalidArgument: its matrices are quantized.
        """
        if self.layer_bytes != self.layer_parameters * ITEM_SIZE[self.layer_dtype]:
            raise InvalidArgument(
                f"{self.name} is quantized as it is: plan it without --dtype {dtype}", reason="DTYPE_FIXED"
            )
        rest = dict(self.weight_bytes)
        rest[self.layer_dtype] -= self.layer_bytes
        rest[dtype] = rest.get(dtype, 0) + self.layer_parameters
        kept = {name: size for name, size in rest.items() if size}
        return replace(self, layer_dtype=dtype, weight_bytes=kept, layer_bytes=self.layer_parameters)


@dataclass(frozen=True)
class Device:
    """What one card can do, at best.

    Attributes:
        memory: bytes.
        bandwidth: bytes/s.
        flops: dtype -> operations/s.
        bandwidth_efficiency, compute_efficiency: the share of them that kernels are expected to reach.
    """

    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    bandwidth_efficiency: float = 1.0
    compute_efficiency: float = 1.0

    def at_best(self) -> "Device":
        """The same with both efficiencies 1."""
        return replace(self, bandwidth_efficiency=1.0, compute_efficiency=1.0)


@dataclass(frozen=True)
class Time:
    """Seconds of a step, and what of it was reading (memory) and what computing (compute) that nothing hid."""

    seconds: float
    memory: float
    compute: float

    @property
    def bound(self) -> str:
        """What takes more of it, "memory" or "compute"."""
        return "memory" if self.memory >= self.compute else "compute"


def decode(stages: Sequence[Shape], device: Device, batch: int, context: float) -> Time:
    """One token for each of `batch` sequences, through a pipeline that has as many parts of the batch under way as it has places.

    Args:
        stages: one rank of each place; the others of its tensor-parallel group do the same at the same time.
    """
    parts = min(len(stages), batch)
    times = [decode_step(stage, device, math.ceil(batch / parts), context) for stage in stages]
    busiest, through = max(times, key=lambda time: time.seconds), total(times)
    return total([busiest] * parts) if parts * busiest.seconds > through.seconds else through


def total(times: Sequence[Time]) -> Time:
    """One after another."""
    memory, compute = sum(time.memory for time in times), sum(time.compute for time in times)
    return Time(memory + compute, memory, compute)


def decode_step(shape: Shape, device: Device, batch: int, context: float) -> Time:
    """One token for each of `batch` sequences whose context is `context` tokens on average."""
    pairs, read = [], 0.0
    for attention in shape.attention:
        seen = min(context, attention.window) if attention.window else context
        read += batch * seen * _kv_elements(attention) * ITEM_SIZE[shape.kv_dtype]
        pairs.append(batch * seen)
    return _step(shape, device, batch, batch, pairs, read)


def prefill(shape: Shape, device: Device, tokens: int) -> Time:
    """One prompt of `tokens` alone, in chunks of at most max_num_tokens, to its first token."""
    steps = []
    for start in range(0, tokens, shape.max_num_tokens):
        count = min(shape.max_num_tokens, tokens - start)
        pairs, read = [], 0.0
        for attention in shape.attention:
            first = start + 1  # the first query of the chunk sees itself and all before it
            seen = count * first + count * (count - 1) / 2
            reach = start + count
            if attention.window:
                seen = _windowed(start, count, attention.window)
                reach = min(reach, attention.window + count)
            pairs.append(seen)
            read += reach * _kv_elements(attention) * ITEM_SIZE[shape.kv_dtype]
        steps.append(_step(shape, device, count, 1, pairs, read))
    return total(steps)


def kv_memory(shape: Shape, device: Device, share: float) -> float:
    """Bytes on a card for the KV cache: a share of its memory, less the weights. Negative where they do not fit."""
    return device.memory * share - shape.total_bytes


def max_sequences(shape: Shape, device: Device, tokens: int, share: float) -> int:
    """How many sequences of `tokens` tokens the KV cache holds at the same time, in whole blocks of 16."""
    blocks = math.ceil(tokens / BLOCK_SIZE) * BLOCK_SIZE
    per_sequence = blocks * sum(_kv_elements(a) for a in shape.attention) * ITEM_SIZE[shape.kv_dtype]
    return max(0, int(kv_memory(shape, device, share) // per_sequence))


def _kv_elements(attention: Attention) -> int:
    """Elements of keys and values that are kept of a token."""
    return 2 * attention.layers * attention.num_kv_heads * attention.head_dim


def _windowed(start: int, count: int, window: int) -> float:
    """Pairs of a query at start, ..., start + count - 1 and the keys in its window."""
    full = max(0, min(count, start + count - window))  # queries that see a whole window
    rest = count - full
    return full * window + rest * (start + 1) + rest * (rest - 1) / 2


def _step(shape: Shape, device: Device, tokens: int, rows: int, pairs: list[float], kv_read: float) -> Time:
    attention = sum(
        4 * a.layers * a.num_heads * a.head_dim * seen for a, seen in zip(shape.attention, pairs, strict=True)
    )
    parts = (
        (
            shape.layer_read(tokens) + shape.replicated_bytes,
            shape.layer_operations(tokens),
            shape.layer_dtype,
        ),
        (shape.head_bytes, 2 * shape.head_parameters * rows, shape.dtype),
        (kv_read, attention, shape.dtype),
    )
    memory = compute = 0.0
    for size, operations, dtype in parts:
        reading = size / (device.bandwidth * device.bandwidth_efficiency)
        computing = operations / (_flops(device, dtype) * device.compute_efficiency)
        if reading >= computing:
            memory += reading
        else:
            compute += computing
    return Time(memory + compute, memory, compute)


def _flops(device: Device, dtype: str) -> float:
    if dtype not in device.flops:
        raise FailedPrecondition(
            f"the device has no {dtype} matrix units; it has {', '.join(device.flops)}: choose one of these with --dtype, or say "
            "with --flops how fast it is",
            reason="DTYPE_NOT_ON_DEVICE",
        )
    return device.flops[dtype]
