/* A token of each row, and logits of forbidden tokens. A mask has a bit a token, from the lowest bit of its first
 * byte on, in whole words of 32 bits. */

/* All ones in the lanes of the tokens i, i + 1 ... whose bit is set; i is a multiple of LANES. */
INLINE vu NAME(allowed)(const uint8_t *mask, long i) {
#if LANES == 16 && defined(__x86_64__) /* the compiler would set lane after lane */
    return (vu)_mm512_movm_epi32((__mmask16)(mask[i >> 3] | mask[(i >> 3) + 1] << 8));
#else
    const vi lane = __builtin_convertvector(NAME(ramp)(), vi);
    uint32_t bits = mask[i >> 3] | (LANES == 16 ? (uint32_t)mask[(i >> 3) + 1] << 8 : 0);
    if (LANES == 4) bits >>= i & 4;
    return (vu)((((vu)(lane - lane) + bits) & ((vu)(lane - lane) + 1) << (vu)lane) != 0);
#endif
}

/* Whether any of the tokens i, i + 1 ... may be allowed. */
INLINE int NAME(any_allowed)(const uint8_t *mask, long i) { return mask[i >> 3] | (LANES == 16 ? mask[(i >> 3) + 1] : 0); }

/* The first of the largest logits that the mask allows; a NaN counts as infinite. Without a mask all are allowed. */
INLINE int64_t NAME(best_of)(const float *logits, long size, const uint8_t *mask) {
    vf most = SPLAT(-INFINITY);
    vi at = (vi)SPLAT(0);
    at -= 1;
    VECTORS(size, if (!mask || NAME(any_allowed)(mask, i)) {
        vf v = NAME(load_some)(FP32, logits, i, n);
        v = NAME(choose)((vu)(v != v), SPLAT(INFINITY), v);
        vu larger = (vu)(v > most);
        if (mask) larger &= NAME(allowed)(mask, i);
        if (n < LANES) larger &= (vu)(NAME(ramp)() < (float)n);
        most = NAME(choose)(larger, v, most);
        at = (at & (vi)~larger) | ((vi)larger & (int32_t)i);
    });
    int64_t best = -1;
    float largest = -INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        if (at[lane] >= 0 && (most[lane] > largest || (most[lane] == largest && at[lane] + lane < best)))
            largest = most[lane], best = at[lane] + lane;
    for (long i = 0; best < 0 && mask && i < size; i++) /* all of them are -inf */
        if (mask[i >> 3] >> (i & 7) & 1) best = i;
    return best < 0 ? 0 : best;
}

/* The weights of the tokens i, i + 1 ...: e to the distance from the largest logit over the temperature; 0 where none is allowed. */
INLINE vf NAME(weights)(const float *logits, long i, long n, const uint8_t *mask, float most, float temperature) {
    vf v = NAME(exp)((NAME(load_some)(FP32, logits, i, n) - most) / temperature);
    if (mask) v = (vf)((vu)v & NAME(allowed)(mask, i));
    return NAME(keep)(v, n);
}

/* The first allowed token at which the sum of weights exceeds the number's share, 0 <= number < 1. Weights of SUMMED tokens are
 * summed in float32, these sums in float64. Where the largest logit is not finite, its token. */
INLINE int64_t NAME(draw_of)(const float *logits, long size, const uint8_t *mask, float temperature, double number) {
    int64_t token = NAME(best_of)(logits, size, mask);
    const float most = logits[token];
    if (!isfinite(most)) return token;
    float *sums = scratch(0, size / SUMMED + 1);
    double total = 0;
    for (long first = 0; first < size; first += SUMMED) {
        const long end = first + SUMMED < size ? first + SUMMED : size;
        vf sum = SPLAT(0);
        for (long i = first; i < end; i += LANES)
            if (!mask || NAME(any_allowed)(mask, i)) sum += NAME(weights)(logits, i, end - i, mask, most, temperature);
        total += sums[first / SUMMED] = NAME(sum)(sum);
    }
    double left = number * total;
    long first = 0;
    for (; first + SUMMED < size && left >= sums[first / SUMMED]; first += SUMMED) left -= sums[first / SUMMED];
    for (long i = first; i < size && i < first + SUMMED; i += LANES) {
        vf each = NAME(weights)(logits, i, size - i, mask, most, temperature);
        for (int lane = 0; lane < LANES; lane++) {
            if (!(each[lane] > 0)) continue;
            token = i + lane; /* the last one, where the sums' rounding would lead past it */
            if ((left -= each[lane]) < 0) return token;
        }
    }
    return token;
}

/* At temperature 0 the most probable token, else one that is drawn. */
static void NAME(choose_tokens)(const float *logits, long stride, long rows, long size, const uint8_t *const *masks,
                                const float *temperatures, const double *numbers, int64_t *tokens) {
#pragma omp parallel for schedule(static) if (rows * size > 8 * ALONE)
    for (long row = 0; row < rows; row++) {
        const float *own = logits + row * stride;
        if (temperatures[row] > 0) tokens[row] = NAME(draw_of)(own, size, masks[row], temperatures[row], numbers[row]);
        else if (masks[row]) tokens[row] = NAME(best_of)(own, size, masks[row]);
        else tokens[row] = NAME(best_of)(own, size, 0);
    }
}

/* -inf where a row's mask has no bit; rows without a mask stay as they are. */
static void NAME(forbid)(float *logits, long stride, long rows, long size, const uint8_t *const *masks) {
#pragma omp parallel for schedule(static) if (rows * size > 8 * ALONE)
    for (long row = 0; row < rows; row++)
        if (masks[row]) {
            float *own = logits + row * stride;
            VECTORS(size, {
                vf v = NAME(load_some)(FP32, own, i, n);
                NAME(store_some)(FP32, own, i, NAME(choose)(NAME(allowed)(masks[row], i), v, SPLAT(-INFINITY)), n);
            });
        }
}
