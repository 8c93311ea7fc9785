"""How the kernels that draw tokens see a logit: its key, its weight, and the settings of its row.

The key is the bits of the float32 (best - logit) / temperature, which order as the number does, from +0 for the best one. The
weight, exp of minus that, is a multiple of 2**-44 in int64: sums of weights are exact, whatever the order of adding.
"""

import triton
import triton.language as tl

WIDTH = 8  # int32 of a row's settings: seed and top_p (two each), temperature, top_k, min_p, position
LEVELS = tl.constexpr(8)  # of keys: below 2, 3, 4, 6, 8, 12, 16, and all
FIRST = tl.constexpr(0x40000000 >> 22)  # of 2.0: key >> 22 is the same between two neighbouring edges
INFINITE = tl.constexpr(0x7F800000)
_UNIT = tl.constexpr(2.0**44)  # the weight of the best token; fewer than 2**19 of them fit into int64


@triton.jit
def wide(settings):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """64 bits of which the lower half comes first."""
    low = tl.load(settings).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (tl.load(settings + 1).to(tl.uint32, bitcast=True).to(tl.uint64) << 32)


@triton.jit
def limits_of(settings, vocab):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """top_k (0 for all), top_p and min_p, and whether any of them leaves a token out."""
    top_p = wide(settings + 2).to(tl.float64, bitcast=True)
    top_k = tl.load(settings + 5)
    top_k = tl.where(top_k < vocab, top_k, 0)
    min_p = tl.load(settings + 6).to(tl.float32, bitcast=True)
    return top_k, top_p, min_p, (top_k > 0) | (top_p < 1) | (min_p > 0)


@triton.jit
def keys_of(logits, at, vocab, best, temperature):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Of the logits at [BLOCK], int32."""
    logit = tl.load(logits + at, at < vocab, float("-inf")).to(tl.float32)
    distance = tl.div_rn(best - logit, temperature)  # rounded as in torch, so that the same logits come to be equal
    return tl.where(distance >= 0, distance, float("inf")).to(tl.int32, bitcast=True)


@triton.jit
def probability_of(keys):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Of the tokens with these keys, as a share of the best one's, float32."""
    return tl.exp(-keys.to(tl.float32, bitcast=True))


@triton.jit
def weight_of(keys):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Of the tokens with these keys, int64; 0 behind the vocabulary, where the key is infinity."""
    return (probability_of(keys) * _UNIT).to(tl.int64)


@triton.jit
def level_of(keys):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The first level that has such keys, [0, LEVELS)."""
    return tl.minimum(tl.maximum((keys >> 22) - (FIRST - 1), 0), LEVELS - 1)


@triton.jit
def share_of(top_p, mass):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The least mass that reaches top_p of this mass, and a token's at least."""
    return tl.maximum(tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64), 1)
