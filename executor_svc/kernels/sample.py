"""Triton kernels that draw tokens as `executor_svc/draw.py` defines it, with the numbers of `sampler.uniform`, for whole batches.

Three kernels over keys and weights (`logit_keys.py`), the first two with a program for each chunk of a row's vocabulary. `_weigh`
adds up how many tokens, and which mass, lie below each of a few edges of the key. From this follows in which bracket of edges the
last token lies that top-k, top-p or min-p keeps; `_gather` writes the bracket's keys down, one after another. `_choose`, one
program a row, finds the last token's key among them by bisection, then the chunk where the sum of kept weights passes the row's
number, and the token in it. So logits are read twice (once where nothing limits) and not sorted, and as sums are exact, neither
the rows beside nor the size of chunks change a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from executor_svc.kernels.logit_keys import (
    FIRST,
    INFINITE,
    LEVELS,
    WIDTH,
    keys_of,
    level_of,
    limits_of,
    probability_of,
    share_of,
    weight_of,
    wide,
)
from executor_svc.kernels.rows import pdl, wait_before

CHUNK = 2048  # tokens that a program reads, sixteen a thread
_WIDTH = tl.constexpr(WIDTH)


@triton.jit(do_not_specialize=["chunks"])
def _weigh(logits, tokens, settings, counts, masses, vocab, stride, chunks, CHUNK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, E501
    wait_before(PDL)
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    settings += row * _WIDTH
    temperature = tl.load(settings + 4).to(tl.float32, bitcast=True)
    if temperature > 0:
        logits += row * stride
        best = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        keys = keys_of(logits, at, vocab, best, temperature)
        weights = weight_of(keys)
        lines = (row * chunks + chunk) * LEVELS
        _, _, _, limited = limits_of(settings, vocab)
        total = tl.sum(weights)  # of what is behind the vocabulary it is 0
        if limited:
            size, level = tl.minimum(vocab - chunk * CHUNK, CHUNK), level_of(keys)
            lowest, highest = tl.min(level), tl.max(level)
            for edge in tl.static_range(LEVELS - 1):
                count, mass = tl.where(edge < highest, 0, size), tl.where(edge < highest, 0, total)
                if (edge >= lowest) & (edge < highest):
                    count, mass = tl.sum((level <= edge).to(tl.int32)), tl.sum(tl.where(level <= edge, weights, 0))
                tl.store(counts + lines + edge, count)
                tl.store(masses + lines + edge, mass)
            tl.store(counts + lines + LEVELS - 1, size)
        tl.store(masses + lines + LEVELS - 1, total)


@triton.jit
def _entry(column, number):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """column[number], 0 for a number below 0."""
    return tl.sum(tl.where(tl.arange(0, LEVELS) == number, column, 0))


@triton.jit
def _bracket(counts, masses, chunks, top_k, top_p, min_p, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The levels [first, last] that hold the last token that is kept; tokens before them and up to their end, mass so, and all.

    top_p's share is of the mass that top_k leaves, which is only known to be no less than what lies before top_k's level: so
    `first` may be too low, never too high. Where all of the bracket that top_k and top_p need is kept by them, min_p decides
    alone.
    """
    chunk, level = tl.arange(0, CHUNKS), tl.arange(0, LEVELS)
    lines = chunk[:, None] * LEVELS + level[None, :]
    there = (chunk < chunks)[:, None] & (level < LEVELS)[None, :]
    count, mass = tl.sum(tl.load(counts + lines, there, 0), 0), tl.sum(tl.load(masses + lines, there, 0), 0)
    by_count = tl.where(top_k > 0, tl.sum((count < top_k).to(tl.int32)), LEVELS - 1)
    everything = _entry(mass, LEVELS - 1)
    least = tl.where(top_k > 0, _entry(mass, by_count - 1), everything)
    by_mass = tl.where(top_p < 1, tl.sum((mass < share_of(top_p, least)).to(tl.int32)), by_count)
    last = tl.where(top_k > 0, by_count, by_mass)
    first = tl.minimum(by_mass, last)
    least_probable = probability_of((level + FIRST) << 22)  # of each level, at most
    by_ratio = tl.sum(((least_probable >= min_p) & (level < LEVELS - 1)).to(tl.int32))
    alone = by_ratio < first
    first, last = tl.minimum(first, by_ratio), tl.where(alone, by_ratio, last)
    before, until = _entry(count, first - 1), _entry(count, last)
    return first, last, alone, before, until, _entry(mass, first - 1), _entry(mass, last), everything


@triton.jit(do_not_specialize=["chunks"])
def _gather(
    logits, tokens, settings, counts, masses, found, vocab, stride, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    wait_before(PDL)
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    settings += row * _WIDTH
    temperature = tl.load(settings + 4).to(tl.float32, bitcast=True)
    top_k, top_p, min_p, limited = limits_of(settings, vocab)
    if (temperature > 0) & limited:
        counts += row * chunks * LEVELS
        masses += row * chunks * LEVELS
        first, last, _, _, _, _, _, _ = _bracket(counts, masses, chunks, top_k, top_p, min_p, CHUNKS)
        chunk = tl.arange(0, CHUNKS)
        earlier = chunk < number
        sizes = tl.load(counts + chunk * LEVELS + last, earlier, 0)
        sizes -= tl.load(counts + chunk * LEVELS + first - 1, earlier & (first > 0), 0)
        logits += row * stride
        best = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
        found += row * (vocab + CHUNK) + tl.sum(sizes)
        for start in range(number * CHUNK, (number + 1) * CHUNK, BLOCK):
            at = start + tl.arange(0, BLOCK)
            keys = keys_of(logits, at, vocab, best, temperature)
            level = level_of(keys)
            inside = ((level >= first) & (level <= last) & (at < vocab)).to(tl.int32)
            tl.store(found + tl.cumsum(inside, 0) - 1, keys, inside > 0)
            found += tl.sum(inside)


@triton.jit
def _halve(enough, low, middle, high, fewer, count, more, lighter, mass, heavier):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """(low, middle] if that is enough, else (middle, high], with tokens and mass up to both ends."""
    low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
    fewer, more = tl.where(enough, fewer, count), tl.where(enough, count, more)
    return low, high, fewer, more, tl.where(enough, lighter, mass), tl.where(enough, mass, heavier)


@triton.jit
def _search(
    found, size, few, low, high, fewer, more, lighter, heavier, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The least key up to which there are `wanted` tokens, or so much mass; and how many tokens and which mass are up to it.

    It lies in (low, high]. Up to low there are `fewer` tokens with the mass `lighter`, up to high `more` with `heavier`. The keys
    between are in found[:size]; as soon as a block holds them, they are brought together in `few`.
    """
    at = tl.arange(0, BLOCK)
    while (more - fewer > BLOCK) & (high - low > 1):
        middle = low + (high - low) // 2
        counts, masses = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int64)
        for start in range(0, size, BLOCK):
            keys = tl.load(found + start + at, start + at < size, INFINITE)
            inside = (keys > low) & (keys <= middle) & (start + at < size)
            counts += inside.to(tl.int32)
            masses += tl.where(inside, weight_of(keys), 0)
        count, mass = fewer + tl.sum(counts), lighter + tl.sum(masses)
        low, high, fewer, more, lighter, heavier = _halve(
            mass >= wanted if MASS else count >= wanted, low, middle, high, fewer, count, more, lighter, mass, heavier
        )
    if high - low > 1:
        there = 0
        tl.debug_barrier()  # another search may have left `few` just now
        for start in range(0, size, BLOCK):
            keys = tl.load(found + start + at, start + at < size, INFINITE)
            inside = ((keys > low) & (keys <= high) & (start + at < size)).to(tl.int32)
            tl.store(few + there + tl.cumsum(inside, 0) - 1, keys, inside > 0)
            there += tl.sum(inside)
        tl.debug_barrier()
        keys = tl.load(few + at, at < there, INFINITE)
        weights = tl.where(at < there, weight_of(keys), 0)
        while high - low > 1:
            middle = low + (high - low) // 2
            inside = (keys > low) & (keys <= middle) & (at < there)
            count, mass = fewer + tl.sum(inside.to(tl.int32)), lighter + tl.sum(tl.where(inside, weights, 0))
            low, high, fewer, more, lighter, heavier = _halve(
                mass >= wanted if MASS else count >= wanted, low, middle, high, fewer, count, more, lighter, mass, heavier
            )  # fmt: skip
    return high, more, heavier


@triton.jit
def _kept(found, start, stop, bound, min_p, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The mass of those of found[start:stop] that are kept."""
    at, mass = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int64)
    for begin in range(start, stop, BLOCK):
        keys = tl.load(found + begin + at, begin + at < stop, INFINITE)
        mass += tl.where((keys <= bound) & (probability_of(keys) >= min_p), weight_of(keys), 0)  # that of infinity is 0
    return tl.sum(mass)


@triton.jit(do_not_specialize=["chunks"])
def _choose(
    logits, tokens, settings, counts, masses, found, vocab, stride, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # type: ignore[no-untyped-def]  # noqa: ANN001  # fmt: skip
    wait_before(PDL)
    row = tl.program_id(0).to(tl.int64)
    settings += row * _WIDTH
    temperature = tl.load(settings + 4).to(tl.float32, bitcast=True)
    if temperature > 0:
        counts += row * chunks * LEVELS
        masses += row * chunks * LEVELS
        top_k, top_p, min_p, limited = limits_of(settings, vocab)
        zero = tl.full((), 0, tl.int32)
        first, last, size = zero + LEVELS, zero, zero  # without limits there is no bracket, and all are before it
        low, bound = zero + INFINITE, zero + INFINITE
        if limited:
            found += row * (vocab + CHUNK)
            few = found + vocab
            first, last, alone, before, until, lighter, heavier, everything = _bracket(
                counts, masses, chunks, top_k, top_p, min_p, CHUNKS
            )
            size = until - before
            low = tl.where(first > 0, (first + (FIRST - 1)) << 22, 0) - 1
            bound = tl.where(last < LEVELS - 1, ((last + FIRST) << 22) - 1, INFINITE)
            if (top_k > 0) & (alone == 0):
                bound, until, heavier = _search(
                    found, size, few, low, bound, before, until, lighter, heavier, top_k, False, CHUNK
                )
            if (top_p < 1) & (alone == 0):
                equals = tl.where(top_k > 0, until - top_k, 0)  # of the last one, that top_k does not count
                mass = tl.where(top_k > 0, heavier - equals.to(tl.int64) * weight_of(bound), everything)
                bound, until, heavier = _search(
                    found, size, few, low, bound, before, until, lighter, heavier, share_of(top_p, mass), True, CHUNK
                )
        chunk = tl.arange(0, CHUNKS)
        lines, there = chunk * LEVELS, chunk < chunks
        sums = tl.load(masses + lines + first - 1, there & (first > 0), 0)  # before the bracket
        sizes = tl.load(counts + lines + last, there & limited, 0)
        sizes -= tl.load(counts + lines + first - 1, there & limited & (first > 0), 0)
        total = tl.sum(sums) + _kept(found, 0, size, bound, min_p, CHUNK)
        if total > 0:  # else nothing is known of the row, and its token stays
            word, _, _, _ = tl.philox(wide(settings), tl.load(settings + 7), 0, 0, 0)
            number = (word >> 8).to(tl.int64)  # of 2**24; its product with the total has more than 64 bits
            rest = (total >> 24) * number + (((total & 0xFFFFFF) * number) >> 24)
            begin, end, place = zero, chunks, zero  # place: in `found`, of what `begin` has there
            while end - begin > 1:
                middle = (begin + end) // 2
                part = (chunk >= begin) & (chunk < middle)
                stop = place + tl.sum(tl.where(part, sizes, 0))
                mass = tl.sum(tl.where(part, sums, 0)) + _kept(found, place, stop, bound, min_p, CHUNK)
                behind = mass <= rest
                begin, end = tl.where(behind, middle, begin), tl.where(behind, end, middle)
                place, rest = tl.where(behind, stop, place), tl.where(behind, rest - mass, rest)
            logits += row * stride
            best = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
            keys = keys_of(logits, begin * CHUNK + tl.arange(0, CHUNK), vocab, best, temperature)
            kept = (keys <= bound) & ((keys <= low) | (probability_of(keys) >= min_p))
            inside = tl.cumsum(tl.where(kept, weight_of(keys), 0), 0)
            tl.debug_barrier()  # the token that is overwritten has been read
            tl.store(tokens + row, begin * CHUNK + tl.sum((inside <= rest).to(tl.int32)))


def sample(logits: Tensor, tokens: Tensor, settings: Tensor, *, limited: bool, chunk: int = CHUNK) -> None:
    """Draws the tokens of all rows whose temperature is above 0; those of the others stay.

    Args:
        logits: [N, vocab < 2**19], float32 or 16 bits, the last dimension contiguous. They stay as they are.
        tokens: int32 [N], the most probable ones, which are overwritten. In a row of NaN, they stay.
        settings: int32 [N * WIDTH], of each row.
        limited: whether any row may have top_k, top_p or min_p. Then 4 bytes a logit are taken for the time of the call.
        chunk: tokens that a program reads, a power of 2.
    """
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, chunk)
    size = chunks * LEVELS.value
    counts, masses = tokens.new_empty(rows * size), tokens.new_empty(rows * size, dtype=torch.int64)
    form = {"vocab": vocab, "stride": logits.stride(0), "chunks": chunks, "CHUNK": chunk}
    warps = max(chunk // 512, 1)
    # not launched early: what is before it may be a graph
    _weigh[(rows, chunks)](logits, tokens, settings, counts, masses, **form, PDL=pdl()["PDL"], num_warps=warps)
    form |= {"CHUNKS": triton.next_power_of_2(chunks), **pdl()}
    found = counts  # which nobody looks at
    if limited:
        found, block = tokens.new_empty(rows * (vocab + chunk)), min(chunk, 128 * warps)
        _gather[(rows, chunks)](
            logits, tokens, settings, counts, masses, found, BLOCK=block, num_warps=warps, **form
        )  # fmt: skip
    _choose[(rows,)](logits, tokens, settings, counts, masses, found, num_warps=2 * warps, **form)
